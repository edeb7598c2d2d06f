/* avx_vnni.c - the kernel table for AVX-VNNI (Alder Lake, Sierra Forest, Zen 5 and later), which is AVX2 with vpdpbusd.
 *
 * Built with -mavx2 -mfma -mavxvnni, -ffp-contract=off and -DOURO_HAVE_AVX_VNNI. It is avx2.c with other flags: only the
 * products of int8 and int4 differ (vec_avx2.h).
 */
#include "kernels/vec_avx2.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_avx_vnni = V_TABLE("avx_vnni");
