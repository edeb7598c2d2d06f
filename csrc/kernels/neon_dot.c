/* neon_dot.c - the kernel table for AArch64 with the dot product of Armv8.2 (Cortex-A76, Graviton 2 and later).
 *
 * Built with -march=armv8.2-a+dotprod, -ffp-contract=off and -DOURO_HAVE_NEON_DOT. It is neon.c with
 * other flags: only the products of int8 and int4 differ, by SDOT (vec_neon.h).
 */
#include "kernels/vec_neon.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_neon_dot = V_TABLE("neon_dot");
