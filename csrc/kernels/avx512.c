/* avx512.c - the kernel table for AVX-512 with BF16 and VNNI (Zen 4, Sapphire Rapids and later).
 *
 * Built with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mavx2 -mfma, -ffp-contract=off and
 * -DOURO_HAVE_AVX512 for this file, dispatch.c and nothing that runs before the choice. What is special about the
 * instruction set is in vec_avx512.h; everything else is shared with the other vector files.
 */
#include "kernels/vec_avx512.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_avx512 = V_TABLE("avx512");
