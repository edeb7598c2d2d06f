/* limits.h - what this machine can do at most, measured now: a plain read of memory and the peak of its multiply-add
 * units. Nothing of the model is in it; `ouro bench` sets what the model reached beside it.
 */
#ifndef OURO_BENCH_LIMITS_H
#define OURO_BENCH_LIMITS_H

#include "base/pool.h"

#include <stddef.h>

/* the unit that the products of a compute mode keep busy; int4 weights go through the int8 unit */
typedef enum ouro_unit { OURO_UNIT_F32, OURO_UNIT_BF16, OURO_UNIT_INT8, OURO_N_UNITS } ouro_unit;

/* The instruction that the peak is measured with. Where the processor has no bf16 products: that of f32, which the
 * kernels use then too. */
const char *ouro_unit_instruction(ouro_unit unit);

/* Reads `bytes` of memory once per round, each thread its own contiguous part (touched first by that thread).
 * rates: [rounds] bytes per second. OURO_ERR_MEMORY when there are not that many. */
int ouro_measure_read(ouro_pool *pool, size_t bytes, int rounds, double *rates);

/* Runs independent multiply-adds from registers for some 30 ms per round on every thread.
 * rates: [rounds] operations per second, all threads; a multiply-add is two operations. */
int ouro_measure_peak(ouro_pool *pool, ouro_unit unit, int rounds, double *rates);

#endif
