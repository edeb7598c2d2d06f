/* avx2.c - the kernel table for AVX2 with FMA (Haswell, Zen and later).
 *
 * Built with -mavx2 -mfma, -ffp-contract=off and -DOURO_HAVE_AVX2. What is special about the instruction set is in
 * vec_avx2.h; everything else is shared with the other vector files.
 */
#include "kernels/vec_avx2.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_avx2 = V_TABLE("avx2");
