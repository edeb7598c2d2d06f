/* limits.h - what this machine can do at most, measured now: a plain read of memory and the peak of its multiply-add
 * units. Nothing of the model is in it; `ouro bench` sets what the model reached beside it.
 */
#ifndef OURO_BENCH_LIMITS_H
#define OURO_BENCH_LIMITS_H

#include "base/pool.h"
#include "bench/loops.h"

/* Reads `bytes` of memory once per round, each thread its own contiguous part (touched first by that thread).
 * rates: [rounds] bytes per second. OURO_ERR_MEMORY when there are not that many. */
int ouro_measure_read(ouro_pool *pool, size_t bytes, int rounds, double *rates);

/* Memory at an address that is a multiple of 64. */
typedef struct ouro_extent { const uint8_t *data; size_t bytes; } ouro_extent;

/* Reads extents [n] once, one behind the other, each thread its own contiguous part of every one, as products read weights.
 * Parts are multiples of 512 bytes; what is left of an extent is not read. */
int ouro_measure_extents(ouro_pool *pool, const ouro_extent *extents, int n, double *seconds);

/* Runs independent multiply-adds from registers for some 30 ms per round on every thread.
 * rates: [rounds] operations per second, all threads; a multiply-add is two operations. */
int ouro_measure_peak(ouro_pool *pool, ouro_unit unit, int rounds, double *rates);

#endif
