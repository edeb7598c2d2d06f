/* loops.h - the loops that show what a core can do at most: multiply-adds from registers, and a plain read. Each is written
 * once per instruction set and chosen at run time, so that one build measures what the machine it runs on has.
 */
#ifndef OURO_BENCH_LOOPS_H
#define OURO_BENCH_LOOPS_H

#include <stddef.h>
#include <stdint.h>

/* the unit that the products of a compute mode keep busy; int4 weights go through the int8 unit */
typedef enum ouro_unit { OURO_UNIT_F32, OURO_UNIT_BF16, OURO_UNIT_INT8, OURO_N_UNITS } ouro_unit;

/* Independent multiply-adds from registers: `turns` turns of `operations` each, where a multiply-add is two. What run
 * returns means nothing; use it, so that the work is not dropped. */
typedef struct ouro_peak_loop {
    const char *instruction;
    double operations;
    uint64_t (*run)(int64_t turns);
} ouro_peak_loop;

/* Where the processor has no bf16 products, the loop of f32, which the kernels use then too. */
ouro_peak_loop ouro_peak_loop_of(ouro_unit unit);

/* Reads bytes, a multiple of 512 at an address that is a multiple of 64, and returns something of all of them. */
typedef uint64_t (*ouro_read_loop)(const uint8_t *p, size_t bytes);
ouro_read_loop ouro_read_loop_of_machine(void);

#endif
