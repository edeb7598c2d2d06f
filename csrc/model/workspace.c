/* workspace.c - allocation of pass scratch; see workspace.h. */
#include "model/workspace.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/attention.h"
#include "model/seen.h"
#include "ouro_status.h"

/* Rows of activations for products over `cols`; the row stride is an odd number of cache lines, so that rows of a
 * register tile do not fall into one cache set. */
static int acts_new(ouro_workspace *ws, ouro_acts *x, ouro_act_kind kind, int cols, int lanes)
{
    size_t element = kind == OURO_ACT_F32 ? 4 : kind == OURO_ACT_BF16 ? 2 : 1;
    x->kind = (int)kind;
    x->kpad = ouro_round_up(cols, kind == OURO_ACT_S8 ? OURO_GROUP : OURO_TILE);
    size_t lines = ((size_t)x->kpad * element + 63) / 64;
    x->stride = (lines | 1) * 64;
    size_t groups = (size_t)x->kpad / OURO_GROUP4;
    size_t bytes = (size_t)lanes * x->stride;
    x->data = ouro_alloc(bytes);
    x->scale = kind == OURO_ACT_S8 ? ouro_alloc((size_t)lanes * groups / 2 * sizeof(float)) : NULL;
    x->sum = kind == OURO_ACT_S8 ? ouro_alloc((size_t)lanes * groups * sizeof(int32_t)) : NULL;
    if (!x->data || (kind == OURO_ACT_S8 && (!x->scale || !x->sum))) return OURO_ERR_MEMORY;
    memset(x->data, 0, bytes);
    ws->bytes += bytes;
    return OURO_OK;
}

static void acts_free(ouro_acts *x)
{
    ouro_free(x->data);
    ouro_free(x->scale);
    ouro_free(x->sum);
    memset(x, 0, sizeof *x);
}

static void free_rows(ouro_workspace *ws)
{
    acts_free(&ws->x_model);
    acts_free(&ws->x_heads);
    acts_free(&ws->x_mlp);
    float **buffer[] = {&ws->qkv, &ws->z, &ws->y, &ws->mlp, &ws->rope};
    for (size_t i = 0; i < sizeof buffer / sizeof *buffer; i++) {
        ouro_free(*buffer[i]);
        *buffer[i] = NULL;
    }
    for (int i = 0; ws->blas_scratch && i < ws->n_threads; i++) {
        ouro_free(ws->blas_scratch[i]);
        ws->blas_scratch[i] = NULL;
    }
    free(ws->spans);
    ws->spans = NULL;
    ws->lanes = 0;
    ws->bytes = 0;
}

static float *rows_new(ouro_workspace *ws, int lanes, size_t stride)
{
    size_t bytes = (size_t)lanes * stride * sizeof(float);
    float *p = ouro_alloc(bytes);
    if (p) memset(p, 0, bytes);
    ws->bytes += bytes;
    return p;
}

static int blas_reserve(ouro_workspace *ws, int lanes)
{
    const ouro_config *c = &ws->model->config;
    int heads = c->n_heads * c->d_head, longest = c->d_model > c->d_mlp ? c->d_model : c->d_mlp;
    ws->blas_cols = longest > heads ? longest : heads;
    size_t floats = (size_t)OURO_BLAS_TILES * OURO_TILE * (size_t)ws->blas_cols + (size_t)lanes * 2 * OURO_TILE;
    if (!ws->blas_scratch) ws->blas_scratch = calloc((size_t)ws->n_threads, sizeof *ws->blas_scratch);
    for (int i = 0; ws->blas_scratch && i < ws->n_threads; i++) {
        ws->blas_scratch[i] = ouro_alloc(floats * sizeof(float));
        if (!ws->blas_scratch[i]) return OURO_ERR_MEMORY;
        ws->bytes += floats * sizeof(float);
    }
    return ws->blas_scratch ? OURO_OK : OURO_ERR_MEMORY;
}

int ouro_workspace_reserve(ouro_workspace *ws, int lanes)
{
    if (lanes <= ws->lanes) return OURO_OK;
    const ouro_model *m = ws->model;
    const ouro_config *c = &m->config;
    free_rows(ws);
    int status = acts_new(ws, &ws->x_model, m->act, c->d_model, lanes);
    if (status == OURO_OK) status = acts_new(ws, &ws->x_heads, m->act, c->n_heads * c->d_head, lanes);
    if (status == OURO_OK) status = acts_new(ws, &ws->x_mlp, m->act, c->d_mlp, lanes);
    ws->qkv = rows_new(ws, lanes, ouro_qkv_stride(c));
    ws->z = rows_new(ws, lanes, (size_t)c->n_heads * (size_t)c->d_head);
    ws->y = rows_new(ws, lanes, ouro_y_stride(c));
    ws->rope = rows_new(ws, lanes, (size_t)c->d_head);
    if (m->act == OURO_ACT_S8) ws->mlp = rows_new(ws, lanes, ouro_mlp_stride(c));
    ws->spans = calloc((size_t)lanes, sizeof *ws->spans);
    if (status == OURO_OK && m->blas) status = blas_reserve(ws, lanes);
    if (status != OURO_OK || !ws->qkv || !ws->z || !ws->y || !ws->rope || !ws->spans
        || (m->act == OURO_ACT_S8 && !ws->mlp)) {
        free_rows(ws);
        return ouro_fail(OURO_ERR_MEMORY, "no memory for a pass of %d lanes", lanes);
    }
    ws->lanes = lanes;
    return OURO_OK;
}

int ouro_workspace_reserve_logits(ouro_workspace *ws)
{
    if (ws->logits) return OURO_OK;
    const ouro_model *m = ws->model;
    size_t bytes = OURO_READOUT_ROWS * ouro_logits_stride(&m->config) * sizeof(float);
    acts_free(&ws->x_state);
    if (acts_new(ws, &ws->x_state, m->head_act, m->config.d_model, OURO_READOUT_ROWS) == OURO_OK) ws->logits = ouro_alloc(bytes);
    return ws->logits ? OURO_OK : ouro_fail(OURO_ERR_MEMORY, "no memory for %zu bytes of logits", bytes);
}

size_t ouro_workspace_available(ouro_workspace *ws, size_t need)
{
    size_t available = ouro_available_memory();
    if (available < need && ouro_stock_empty(&ws->pages)) available = ouro_available_memory();
    return available;
}

int ouro_workspace_new(const ouro_model *m, ouro_kv_dtype kv, int n_threads, ouro_workspace **out)
{
    *out = NULL;
    if (!m->ready) return ouro_fail(OURO_ERR_STATE, "the model's weights are not complete");
    if ((m->compute == OURO_FLOAT32) != (kv == OURO_KV_F32))
        return ouro_fail(OURO_ERR_ARGUMENT, "float32 keys and values go with float32 compute, and only with it");
    ouro_workspace *ws = calloc(1, sizeof *ws);
    if (!ws) return ouro_fail(OURO_ERR_MEMORY, "no memory for a workspace");
    ws->model = m;
    int status = ouro_kv_layout_init(&ws->kv, &m->config, kv);
    if (status == OURO_OK) status = ouro_stock_init(&ws->pages, ws->kv.page_bytes, OURO_KEPT_PAGES);
    if (status != OURO_OK) {
        free(ws);
        return status;
    }
    ws->pool = ouro_pool_new(n_threads);
    ws->n_threads = ws->pool ? ouro_pool_threads(ws->pool) : 0;
    ws->scratch = calloc((size_t)ws->n_threads + 1, sizeof *ws->scratch);
    ws->all_layers = calloc((size_t)m->config.n_layers, sizeof *ws->all_layers);
    ws->half_done = calloc((size_t)m->config.n_kv_heads, sizeof *ws->half_done);
    int complete = ws->pool && ws->scratch && ws->all_layers && ws->half_done;
    for (int l = 0; complete && l < m->config.n_layers; l++) ws->all_layers[l] = l;
    for (int i = 0; complete && i < ws->n_threads; i++) {
        ws->scratch[i] = ouro_alloc(ouro_attention_scratch_bytes(ws));
        complete = ws->scratch[i] != NULL;
    }
    if (!complete) {
        ouro_workspace_free(ws);
        return ouro_fail(OURO_ERR_MEMORY, "no memory for the workspace of %d threads", n_threads);
    }
    *out = ws;
    return OURO_OK;
}

void ouro_workspace_free(ouro_workspace *ws)
{
    if (!ws) return;
    free_rows(ws);
    acts_free(&ws->x_state);
    ouro_seen_free(ws->seen);
    ouro_free(ws->logits);
    for (int i = 0; ws->scratch && i < ws->n_threads; i++) ouro_free(ws->scratch[i]);
    free(ws->scratch);
    free(ws->all_layers);
    free(ws->half_done);
    free(ws->blas_scratch);
    ouro_pool_free(ws->pool);
    ouro_stock_fini(&ws->pages);
    free(ws);
}
