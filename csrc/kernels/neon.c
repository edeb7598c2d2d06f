/* neon.c - the kernel table for AArch64.
 *
 * Built with -ffp-contract=off and -DOURO_HAVE_NEON; any AArch64 processor runs it. What is special about the
 * instruction set is in vec_neon.h; everything else is shared with the other vector files.
 */
#include "kernels/vec_neon.h"

#include "kernels/blocks.h"
#include "kernels/rows_body.h"

#include "kernels/drive.h"

const ouro_kernels ouro_kernels_neon = V_TABLE("neon");
