/* weights.c - layout, packing and bookkeeping of the weights; see model.h.
 *
 * Everything lives in one arena of huge pages. Rows are packed as they come, in any order and from any thread, so a
 * checkpoint is read once, piece by piece, and never held twice.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/model.h"
#include "ouro_status.h"

static const char *const names[OURO_N_TENSORS] = {
    "embed_tokens", "lm_head", "norm", "early_exit_gate.weight", "early_exit_gate.bias",
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2",
};

const char *ouro_tensor_name(ouro_tensor tensor)
{
    return (unsigned)tensor < OURO_N_TENSORS ? names[tensor] : "unknown";
}

void ouro_tensor_shape(const ouro_config *c, ouro_tensor tensor, int *rows, int *cols)
{
    int d = c->d_model, q = c->n_heads * c->d_head, kv = c->n_kv_heads * c->d_head;
    switch (tensor) {
    case OURO_T_EMBED: case OURO_T_HEAD: *rows = c->d_vocab, *cols = d; break;
    case OURO_T_Q: *rows = q, *cols = d; break;
    case OURO_T_K: case OURO_T_V: *rows = kv, *cols = d; break;
    case OURO_T_O: *rows = d, *cols = q; break;
    case OURO_T_GATE: case OURO_T_UP: *rows = c->d_mlp, *cols = d; break;
    case OURO_T_DOWN: *rows = d, *cols = c->d_mlp; break;
    case OURO_T_EXIT_B: *rows = 1, *cols = 1; break;
    default: *rows = 1, *cols = d; break;
    }
}

/* ---- layout ------------------------------------------------------------------------------------------------- */

static int tiles_of(int rows) { return ouro_round_up(rows, OURO_TILE) / OURO_TILE; }

/* Hands out 64-byte-aligned pieces of the arena; with base NULL it only counts. Whatever changes here or in the tiles
 * changes the packed files: raise OURO_PACKED_VERSION (packed.h). */
typedef struct cutter { uint8_t *base; size_t used; } cutter;

static void *cut(cutter *c, size_t bytes)
{
    size_t at = c->used;
    c->used = (at + bytes + 63) & ~(size_t)63;
    return c->base ? c->base + at : NULL;
}

static void cut_matrix(cutter *c, ouro_matrix *m, ouro_format format, int rows, int cols, int tiles)
{
    ouro_matrix_layout(m, format, rows, cols, tiles);
    m->data = cut(c, ouro_matrix_bytes(m));
}

static void lay_out(ouro_model *m, cutter *c)
{
    const ouro_config *g = &m->config;
    const ouro_formats *f = &m->formats;
    int d = g->d_model, q = g->n_heads * g->d_head, heads = g->n_heads + 2 * g->n_kv_heads;
    size_t row = (size_t)d * sizeof(float);
    for (int l = 0; l < g->n_layers; l++) {
        ouro_layer *y = &m->layers[l];
        cut_matrix(c, &y->qkv, f->layers, heads * g->d_head, d, heads * ouro_head_tiles(g));
        cut_matrix(c, &y->o, f->o, d, q, tiles_of(d));
        cut_matrix(c, &y->gate_up, f->layers, 2 * g->d_mlp, d, 2 * tiles_of(g->d_mlp));
        cut_matrix(c, &y->down, f->down, d, g->d_mlp, tiles_of(d));
        y->ln1 = cut(c, row), y->ln1_post = cut(c, row), y->ln2 = cut(c, row), y->ln2_post = cut(c, row);
    }
    cut_matrix(c, &m->embed, f->embed, g->d_vocab, d, tiles_of(g->d_vocab));
    if (g->tied) m->head = m->embed;
    else cut_matrix(c, &m->head, f->head, g->d_vocab, d, tiles_of(g->d_vocab));
    m->norm = cut(c, row);
    m->exit_w = cut(c, row);
    m->rope_inv_freq = cut(c, (size_t)g->d_head / 2 * sizeof(float));
}

static int n_counters(const ouro_config *c)
{
    return OURO_T_Q + c->n_layers * (OURO_N_TENSORS - OURO_T_Q);
}

static int counter_of(ouro_tensor tensor, int layer)
{
    return tensor < OURO_T_Q ? (int)tensor : (int)tensor + layer * (OURO_N_TENSORS - OURO_T_Q);
}

/* Layers are all float or all integer, as the compute says; embedding and head have 8 bits at least, 16 on request. */
static int check_formats(ouro_compute compute, const ouro_formats *f)
{
    int integer = compute == OURO_COMPUTE_INT8 || compute == OURO_COMPUTE_INT4;
    const ouro_format layer[] = {f->layers, f->o, f->down}, table[] = {f->head, f->embed};
    int good = 1;
    for (int i = 0; i < 3; i++) good &= integer ? layer[i] == OURO_INT8 || layer[i] == OURO_INT4
                                                : layer[i] == OURO_BF16 || (layer[i] == OURO_F32 && compute == OURO_FLOAT32);
    for (int i = 0; i < 2; i++) good &= integer ? table[i] == OURO_INT8 || table[i] == OURO_BF16
                                                : table[i] == OURO_BF16 || (table[i] == OURO_F32 && compute == OURO_FLOAT32);
    if (good) return OURO_OK;
    return ouro_fail(OURO_ERR_ARGUMENT, "weight formats %d %d %d, head %d, embedding %d do not go with compute %d", (int)f->layers,
                     (int)f->o, (int)f->down, (int)f->head, (int)f->embed, (int)compute);
}

int ouro_model_shape(const ouro_config *config, ouro_compute compute, const ouro_formats *formats, const char *isa,
                     ouro_model **out)
{
    if (!config || !formats || !out) return ouro_fail(OURO_ERR_ARGUMENT, "config, formats and out must not be NULL");
    *out = NULL;
    int status = ouro_config_check(config);
    if (status == OURO_OK) status = check_formats(compute, formats);
    if (status == OURO_OK && config->tied && formats->embed != formats->head)
        status = ouro_fail(OURO_ERR_ARGUMENT, "a tied model has one format for embedding and head");
    if (status != OURO_OK) return status;

    ouro_model *m = calloc(1, sizeof *m);
    if (!m) return ouro_fail(OURO_ERR_MEMORY, "no memory for a model");
    m->config = *config;
    m->compute = compute;
    m->formats = *formats;
    m->act = compute == OURO_FLOAT32 ? OURO_ACT_F32 : compute == OURO_BFLOAT16 ? OURO_ACT_BF16 : OURO_ACT_S8;
    m->head_act = m->act == OURO_ACT_S8 && formats->head == OURO_BF16 ? OURO_ACT_BF16 : m->act;
    m->kv_format = compute == OURO_FLOAT32 ? OURO_F32 : OURO_BF16;
    m->kernels = ouro_kernels_select(isa);
    m->map.fd = -1;
    m->layers = calloc((size_t)config->n_layers, sizeof *m->layers);
    if (!m->kernels || !m->layers) {
        status = !m->kernels ? OURO_ERR_UNSUPPORTED : ouro_fail(OURO_ERR_MEMORY, "no memory for %d layers", (int)config->n_layers);
        ouro_model_free(m);
        return status;
    }
    cutter count = {NULL, 0};
    lay_out(m, &count);
    m->arena_bytes = count.used;
    *out = m;
    return OURO_OK;
}

void ouro_model_place(ouro_model *m, uint8_t *arena)
{
    cutter real = {arena, 0};
    m->arena = arena;
    lay_out(m, &real);
}

int ouro_model_new(const ouro_config *config, ouro_compute compute, const ouro_formats *formats, const char *isa,
                   ouro_model **out)
{
    ouro_model *m;
    int status = ouro_model_shape(config, compute, formats, isa, &m);
    if (status != OURO_OK) return status;
    uint8_t *arena = ouro_big_alloc(m->arena_bytes);
    m->rows_seen = calloc((size_t)n_counters(config), sizeof *m->rows_seen);
    if (arena) ouro_model_place(m, arena);
    if (!arena || !m->rows_seen) {
        status = ouro_fail(OURO_ERR_MEMORY, "the packed weights need %zu bytes, %zu are free", m->arena_bytes,
                           ouro_available_memory());
        ouro_model_free(m);
        return status;
    }
    for (int i = 0; i < config->d_head / 2; i++)
        m->rope_inv_freq[i] = 1.0f / (float)pow(config->rope_theta, 2.0 * i / config->d_head);
    *out = m;
    return OURO_OK;
}

void ouro_model_free(ouro_model *m)
{
    if (!m) return;
    if (m->arena && !m->map.data) ouro_big_free(m->arena, m->arena_bytes);
    ouro_map_close(&m->map);
    free(m->rows_seen);
    free(m->layers);
    free(m);
}

/* ---- packing ------------------------------------------------------------------------------------------------ */

static int is_vector(ouro_tensor t)
{
    return t == OURO_T_NORM || t == OURO_T_EXIT_W || t == OURO_T_EXIT_B || t >= OURO_T_LN1;
}

/* the f32 vector such a tensor goes to */
static float *vector_of(ouro_model *m, ouro_tensor tensor, int layer)
{
    ouro_layer *y = &m->layers[layer];
    switch (tensor) {
    case OURO_T_NORM: return m->norm;
    case OURO_T_EXIT_W: return m->exit_w;
    case OURO_T_EXIT_B: return &m->exit_b;
    case OURO_T_LN1: return y->ln1;
    case OURO_T_LN1_POST: return y->ln1_post;
    case OURO_T_LN2: return y->ln2;
    default: return y->ln2_post;
    }
}

/* the matrix and tile slot a row of a tensor goes to */
static ouro_matrix *slot_of(ouro_model *m, ouro_tensor tensor, int layer, int row, int *slot)
{
    const ouro_config *c = &m->config;
    ouro_layer *y = &m->layers[layer];
    int head = row / c->d_head, in_head = row % c->d_head, pad = ouro_head_pad(c);
    *slot = row;
    switch (tensor) {
    case OURO_T_EMBED: return &m->embed;
    case OURO_T_HEAD: return &m->head;
    case OURO_T_O: return &y->o;
    case OURO_T_DOWN: return &y->down;
    case OURO_T_GATE: *slot = row / OURO_TILE * 2 * OURO_TILE + row % OURO_TILE; return &y->gate_up;
    case OURO_T_UP: *slot = (row / OURO_TILE * 2 + 1) * OURO_TILE + row % OURO_TILE; return &y->gate_up;
    case OURO_T_V: head += c->n_kv_heads; /* fall through */
    case OURO_T_K: head += c->n_heads; /* fall through */
    default: *slot = head * pad + in_head; return &y->qkv;
    }
}

/* What both directions ask: the tensor exists, and so do the rows. */
static int check_rows(const ouro_model *m, ouro_tensor tensor, int layer, int row0, int n_rows, int *cols)
{
    int rows;
    if ((unsigned)tensor >= OURO_N_TENSORS) return ouro_fail(OURO_ERR_ARGUMENT, "unknown tensor %d", (int)tensor);
    ouro_tensor_shape(&m->config, tensor, &rows, cols);
    if (layer < 0 || layer >= m->config.n_layers || row0 < 0 || n_rows < 0 || row0 > rows - n_rows)
        return ouro_fail(OURO_ERR_SHAPE, "%s: layer %d rows %d..%d are outside of %d layers of %d rows",
                         names[tensor], layer, row0, row0 + n_rows, (int)m->config.n_layers, rows);
    return OURO_OK;
}

int ouro_model_put(ouro_model *m, ouro_tensor tensor, int layer, ouro_dtype dtype, int row0, int n_rows,
                   const void *data)
{
    int cols;
    if (!m || !data) return ouro_fail(OURO_ERR_ARGUMENT, "model and data must not be NULL");
    if ((unsigned)dtype > OURO_DT_F32) return ouro_fail(OURO_ERR_ARGUMENT, "unknown dtype %d", (int)dtype);
    if (m->ready) return ouro_fail(OURO_ERR_STATE, "the model is finished; its weights can not change");
    if (tensor == OURO_T_HEAD && m->config.tied)
        return ouro_fail(OURO_ERR_ARGUMENT, "a tied model has no separate head");
    if (tensor < OURO_T_Q) layer = 0;
    int status = check_rows(m, tensor, layer, row0, n_rows, &cols);
    if (status != OURO_OK) return status;
    size_t stride = (size_t)cols * ouro_dtype_size(dtype);
    for (int i = 0; i < n_rows; i++) {
        const uint8_t *src = (const uint8_t *)data + (size_t)i * stride;
        if (is_vector(tensor)) {
            ouro_widen(dtype, src, (size_t)cols, vector_of(m, tensor, layer));
            continue;
        }
        int slot;
        ouro_matrix *w = slot_of(m, tensor, layer, row0 + i, &slot);
        ouro_matrix_put_row(w, slot, dtype, src);
    }
    atomic_fetch_add(&m->rows_seen[counter_of(tensor, layer)], n_rows);
    return OURO_OK;
}

int ouro_model_put_int4(ouro_model *m, ouro_tensor tensor, int layer, int row0, int n_rows, const uint16_t *scales,
                        const int8_t *q)
{
    int cols, slot;
    if (!m || !scales || !q) return ouro_fail(OURO_ERR_ARGUMENT, "model, scales and q must not be NULL");
    if (m->ready) return ouro_fail(OURO_ERR_STATE, "the model is finished; its weights can not change");
    if (is_vector(tensor) || tensor < OURO_T_Q) return ouro_fail(OURO_ERR_ARGUMENT, "tensor %d is no matrix of a layer", (int)tensor);
    int status = check_rows(m, tensor, layer, row0, n_rows, &cols);
    if (status != OURO_OK) return status;
    if (slot_of(m, tensor, layer, 0, &slot)->format != OURO_INT4)
        return ouro_fail(OURO_ERR_ARGUMENT, "%s is not stored as int4", names[tensor]);
    size_t groups = (size_t)(cols + OURO_GROUP4 - 1) / OURO_GROUP4;
    for (int i = 0; i < n_rows; i++) {
        ouro_matrix *w = slot_of(m, tensor, layer, row0 + i, &slot);
        ouro_matrix_put_int4(w, slot, scales + (size_t)i * groups, q + (size_t)i * (size_t)cols);
    }
    atomic_fetch_add(&m->rows_seen[counter_of(tensor, layer)], n_rows);
    return OURO_OK;
}

int ouro_model_get(const ouro_model *m, ouro_tensor tensor, int layer, int row0, int n_rows, float *out)
{
    int cols;
    if (!m || !out) return ouro_fail(OURO_ERR_ARGUMENT, "model and out must not be NULL");
    if (!m->ready) return ouro_fail(OURO_ERR_STATE, "the model's weights are not complete");
    if (tensor < OURO_T_Q) layer = 0;
    int status = check_rows(m, tensor, layer, row0, n_rows, &cols);
    if (status == OURO_OK) status = ouro_map_check(&m->map);
    if (status != OURO_OK) return status;
    if (tensor == OURO_T_HEAD && m->config.tied) tensor = OURO_T_EMBED;
    ouro_model *place = (ouro_model *)(uintptr_t)m;            /* only to find where a row lies */
    for (int i = 0; i < n_rows; i++) {
        if (is_vector(tensor)) {
            memcpy(out, vector_of(place, tensor, layer), (size_t)cols * sizeof *out);
            continue;
        }
        int slot;
        ouro_matrix *w = slot_of(place, tensor, layer, row0 + i, &slot);
        ouro_matrix_get_row(w, slot, out + (size_t)i * (size_t)cols);
    }
    return OURO_OK;
}

int ouro_model_finish(ouro_model *m)
{
    if (!m) return ouro_fail(OURO_ERR_ARGUMENT, "model must not be NULL");
    if (m->ready) return OURO_OK;
    for (int layer = 0; layer < m->config.n_layers; layer++)
        for (int t = layer ? OURO_T_Q : 0; t < OURO_N_TENSORS; t++) {
            int rows, cols, seen = atomic_load(&m->rows_seen[counter_of((ouro_tensor)t, layer)]);
            ouro_tensor_shape(&m->config, (ouro_tensor)t, &rows, &cols);
            if (t == OURO_T_HEAD && m->config.tied) rows = 0;
            if (seen != rows)
                return ouro_fail(OURO_ERR_STATE, "%s of layer %d: %d of %d rows were given", names[t], layer, seen, rows);
        }
    m->ready = 1;
    return OURO_OK;
}
