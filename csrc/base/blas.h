/* blas.h - OpenBLAS, opened privately from a file the caller names; one thread, called from our own workers. */
#ifndef OURO_BASE_BLAS_H
#define OURO_BASE_BLAS_H

#include <stddef.h>

typedef struct ouro_blas ouro_blas;

/* Opens the library with a handle of its own, so that its names never meet another BLAS of the process.
 * OURO_ERR_UNSUPPORTED with the loader's words when it can not be opened or lacks sgemm. Free with ouro_blas_close. */
int ouro_blas_open(const char *path, ouro_blas **out);
void ouro_blas_close(ouro_blas *b);
/* What the library says of itself (version, kernel); "" when it says nothing. */
const char *ouro_blas_config(const ouro_blas *b);

/* c [m][n] = a [m][k] b[n][k]^T, f32, rows lda, ldb, ldc floats apart. Safe from several threads at once. */
void ouro_blas_sgemm_nt(const ouro_blas *b, int m, int n, int k, const float *a, size_t lda, const float *bt,
                        size_t ldb, float *c, size_t ldc);

#endif
