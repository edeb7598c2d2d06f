/* avx_vnni_vl.c - the kernel table for AVX-512 with VNNI and VL but without BF16 (Cascade Lake, Ice Lake, Tiger Lake), in
 * vectors of 256 bits.
 *
 * Built with -mavx2 -mfma -mavx512f -mavx512vl -mavx512vnni, -ffp-contract=off and -DOURO_HAVE_AVX_VNNI_VL. It is avx_vnni.c
 * with other flags: vpdpbusd is the same instruction in the other of its two encodings (vec_avx2.h), so that a machine
 * with AVX-512 tests what a machine with AVX-VNNI runs.
 */
#include "kernels/vec_avx2.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_avx_vnni_vl = V_TABLE("avx_vnni_vl");
