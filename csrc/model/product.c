/* product.c - which routine does a product.
 *
 * Own kernels always, unless the model was loaded with exact=False: then float32 products of many lanes may go to
 * OpenBLAS (sgemm, one thread, called from each of our workers for its own rows of output). A BLAS chooses its order
 * of summation by shape, so those results agree to rounding only; nothing goes there by default.
 */
#include "model/product.h"

#include "kernels/math.h"

#define BLAS_LEAST_LANES 32      /* below this the own kernels win */

static int goes_to_blas(const ouro_model *m, const ouro_acts *x, int n)
{
    return m->blas && x->kind == OURO_ACT_F32 && n >= BLAS_LEAST_LANES;
}

/* One tile as f32 [16][cols], dense: what sgemm reads. */
static void unpack_tile(const ouro_matrix *w, int tile, float *dense)
{
    const uint8_t *base = w->data + (size_t)tile * w->tile_bytes;
    for (int k = 0; k < w->cols; k++)
        for (int r = 0; r < OURO_TILE; r++) {
            size_t at = ouro_tile_at(w->format, r, k);
            dense[(size_t)r * (size_t)w->cols + (size_t)k] =
                w->format == OURO_F32 ? ((const float *)(const void *)base)[at]
                                      : ouro_bf16_to_f32(((const uint16_t *)(const void *)base)[at]);
        }
}

/* out [n][stride] begins at tile0 */
static void blas_tiles(ouro_workspace *ws, int thread, const ouro_matrix *w, int tile0, int tile1,
                       const ouro_acts *x, int n, float *out, size_t stride)
{
    float *dense = ws->blas_scratch[thread];
    for (int tile = tile0; tile < tile1; tile += OURO_BLAS_TILES) {
        int count = tile1 - tile < OURO_BLAS_TILES ? tile1 - tile : OURO_BLAS_TILES;
        for (int i = 0; i < count; i++) unpack_tile(w, tile + i, dense + (size_t)i * OURO_TILE * (size_t)w->cols);
        ouro_blas_sgemm_nt(ws->model->blas, n, count * OURO_TILE, w->cols, (const float *)(const void *)x->data,
                           x->stride / sizeof(float), dense, (size_t)w->cols, out + (size_t)(tile - tile0) * OURO_TILE, stride);
    }
}

void ouro_product(ouro_workspace *ws, int thread, const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x,
                  int n, float *out, size_t stride)
{
    if (goes_to_blas(ws->model, x, n)) blas_tiles(ws, thread, w, tile0, tile1, x, n, out + (size_t)tile0 * OURO_TILE, stride);
    else ws->model->kernels->matmul[w->format][x->kind](w, tile0, tile1, x, 0, n, out, stride, NULL);
}

static void blas_swiglu(ouro_workspace *ws, int thread, const ouro_matrix *w, int pair0, int pair1, int n)
{
    const ouro_acts *x = &ws->x_model;
    float *both = ws->blas_scratch[thread] + (size_t)OURO_BLAS_TILES * OURO_TILE * (size_t)ws->blas_cols;
    for (int pair = pair0; pair < pair1; pair++) {
        blas_tiles(ws, thread, w, 2 * pair, 2 * pair + 2, x, n, both, 2 * OURO_TILE);    /* [n][gate 16, up 16] */
        for (int i = 0; i < n; i++) {
            float *row = (float *)(void *)(ws->x_mlp.data + (size_t)i * ws->x_mlp.stride);
            ws->model->kernels->swiglu_rows(both + (size_t)i * 2 * OURO_TILE, both + (size_t)i * 2 * OURO_TILE + OURO_TILE,
                                            OURO_TILE, row + (size_t)pair * OURO_TILE);
        }
    }
}

void ouro_product_swiglu(ouro_workspace *ws, int thread, const ouro_matrix *w, int pair0, int pair1, int n)
{
    const ouro_acts *x = &ws->x_model;
    if (goes_to_blas(ws->model, x, n)) {
        blas_swiglu(ws, thread, w, pair0, pair1, n);
        return;
    }
    size_t element = x->kind == OURO_ACT_BF16 ? 2 : 4;
    void *out = ws->mlp ? (void *)ws->mlp : (void *)ws->x_mlp.data;
    size_t stride = ws->mlp ? ouro_mlp_stride(&ws->model->config) : ws->x_mlp.stride / element;
    ws->model->kernels->swiglu[w->format][x->kind](w, pair0, pair1, x, 0, n, out, stride);
}
