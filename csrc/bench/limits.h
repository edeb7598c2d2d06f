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

/* Runs independent multiply-adds from registers for some 30 ms per round on every thread.
 * rates: [rounds] operations per second, all threads; a multiply-add is two operations. */
int ouro_measure_peak(ouro_pool *pool, ouro_unit unit, int rounds, double *rates);

#endif
