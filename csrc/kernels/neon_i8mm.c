/* neon_i8mm.c - the kernel table for AArch64 with i8mm (Neoverse V1, Graviton 3 and later).
 *
 * Built with -march=armv8.2-a+dotprod+i8mm, -ffp-contract=off and -DOURO_HAVE_NEON_I8MM. It is neon.c with
 * other flags: only the products of int8 and int4 differ, by USDOT, which takes u8 weights as they are (vec_neon.h).
 */
#include "kernels/vec_neon.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_neon_i8mm = V_TABLE("neon_i8mm");
