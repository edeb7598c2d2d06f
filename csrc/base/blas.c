/* blas.c - see blas.h. Knows the plain names and those of the scipy-openblas32 build. */
#include "base/blas.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "ouro_status.h"

typedef void (*sgemm_fn)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                         const float *b, int ldb, float beta, float *c, int ldc);

struct ouro_blas {
    void *handle;
    sgemm_fn sgemm;
    char config[256];
};

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

/* dlsym for a function pointer, without the cast that ISO C forbids */
static int find(void *handle, const char *first, const char *second, void *pointer_to_fn)
{
    void *symbol = dlsym(handle, first);
    if (!symbol) symbol = dlsym(handle, second);
    memcpy(pointer_to_fn, &symbol, sizeof symbol);
    return symbol != NULL;
}

int ouro_blas_open(const char *path, ouro_blas **out)
{
    if (!path || !out) return ouro_fail(OURO_ERR_ARGUMENT, "path and out must not be NULL");
    *out = NULL;
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return ouro_fail(OURO_ERR_UNSUPPORTED, "%s", dlerror());
    ouro_blas *b = calloc(1, sizeof *b);
    void (*set_threads)(int) = NULL;
    char *(*config)(void) = NULL;
    if (!b || !find(handle, "scipy_cblas_sgemm", "cblas_sgemm", &b->sgemm)) {
        free(b);
        dlclose(handle);
        return ouro_fail(OURO_ERR_UNSUPPORTED, "%s has no cblas_sgemm", path);
    }
    if (find(handle, "scipy_openblas_set_num_threads", "openblas_set_num_threads", &set_threads)) set_threads(1);
    if (find(handle, "scipy_openblas_get_config", "openblas_get_config", &config))
        strncpy(b->config, config(), sizeof b->config - 1);
    b->handle = handle;
    *out = b;
    return OURO_OK;
}

void ouro_blas_close(ouro_blas *b)
{
    if (!b) return;
    dlclose(b->handle);
    free(b);
}

const char *ouro_blas_config(const ouro_blas *b) { return b->config; }

void ouro_blas_sgemm_nt(const ouro_blas *b, int m, int n, int k, const float *a, size_t lda, const float *bt,
                        size_t ldb, float *c, size_t ldc)
{
    b->sgemm(ROW_MAJOR, NO_TRANS, TRANS, m, n, k, 1.0f, a, (int)lda, bt, (int)ldb, 0.0f, c, (int)ldc);
}
