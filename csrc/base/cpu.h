/* cpu.h - what this processor can do, how many of it we may use, and its floating-point mode. */
#ifndef OURO_BASE_CPU_H
#define OURO_BASE_CPU_H

#include <stdbool.h>
#include <stddef.h>

typedef struct ouro_cpu {
    bool avx2, fma, f16c, avx_vnni;                              /* x86-64, with the operating system's consent */
    bool avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16, avx512_vnni;
    bool neon, dotprod, i8mm, bf16;                              /* AArch64 */
    char features[160];                                          /* the true ones by name, space separated */
} ouro_cpu;

/* Detected once; safe from any thread. */
const ouro_cpu *ouro_cpu_get(void);

/* Processors in this thread's affinity mask, at least 1. */
int ouro_cpu_count(void);

/* Denormals in and out count as zero, rounding to nearest even: the mode of all arithmetic here. Returns the mode
 * before, for ouro_ftz_leave. */
unsigned ouro_ftz_enter(void);
/* Denormals as usual, for foreign code called from inside; returns the mode before likewise. */
unsigned ouro_ftz_suspend(void);
void ouro_ftz_leave(unsigned before);

#endif
