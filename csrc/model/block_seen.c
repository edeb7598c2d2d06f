/* block_seen.c - the phases of block.c and pass.c as they run when an observer wants to see inside.
 *
 * Each operation is a stage (seen.h) whose rows stay in memory, shown behind it. Same kernels, same order of every sum:
 * rows that nobody changes come out with the bits of the fused phases (tests: test_tap.py compares every point in every
 * compute).
 */
#include "model/block_seen.h"

#include <string.h>

#include "model/attention.h"
#include "model/product.h"
#include "model/seen.h"

#define COUNT(stages) ((int)(sizeof(stages) / sizeof *(stages)))
#define NOTHING OURO_N_POINTS

static float *normed_row(const ouro_workspace *ws, int i) { return ws->seen->normed + (size_t)i * ouro_y_stride(&ws->model->config); }

/* weight of the norm whose scale is shown at `point` */
static const float *norm_weight(const ouro_model *m, ouro_point point, int layer)
{
    switch (point) {
    case OURO_P_LN1_SCALE: return m->layers[layer].ln1;
    case OURO_P_LN1_POST_SCALE: return m->layers[layer].ln1_post;
    case OURO_P_LN2_SCALE: return m->layers[layer].ln2;
    case OURO_P_LN2_POST_SCALE: return m->layers[layer].ln2_post;
    default: return m->norm;
    }
}

/* and its input: what a block adds, or the residual row */
static const float *norm_input(const ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point)
{
    bool post = point == OURO_P_LN1_POST_SCALE || point == OURO_P_LN2_POST_SCALE;
    return post ? ws->y + (size_t)i * ouro_y_stride(&ws->model->config) : lane->h;
}

/* normed = RMS(x; weight); shown: the scale */
static void norm(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    const ouro_model *m = ws->model;
    float r = m->kernels->rmsnorm(norm_input(ws, lane, i, point), norm_weight(m, point, layer), m->config.eps, m->config.d_model,
                                  normed_row(ws, i));
    ws->seen->scalars[i] = 1.0f / r;
}

/* once more when the scale was changed; shown: the result */
static void rescale(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    if (!ws->seen->changed[i]) return;
    const float *x = norm_input(ws, lane, i, point - 1), *weight = norm_weight(ws->model, point - 1, layer);
    float r = 1.0f / ws->seen->scalars[i], *to = normed_row(ws, i);
    for (int k = 0; k < ws->model->config.d_model; k++) to[k] = x[k] * r * weight[k];
}

static void add(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)point, (void)layer;
    const float *row = normed_row(ws, i);
    for (int k = 0; k < ws->model->config.d_model; k++) lane->h[k] = lane->h[k] + row[k];
}

static void prepare(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    ouro_prepare(ws->model->kernels, &ws->x_model, i, normed_row(ws, i), ws->model->config.d_model);
}

static void close(crew *c, const ouro_lane *lanes, int n, int layer)
{
    static const ouro_stage stages[] = {{norm, OURO_P_LN2_POST_SCALE}, {rescale, OURO_P_LN2_POST}, {NULL, OURO_P_MLP_OUT},
                                        {add, OURO_P_RESID_POST}};
    ouro_stages(c, lanes, n, layer, stages, COUNT(stages));
}

void ouro_seen_open(crew *c, const ouro_sweep *sweep, const ouro_lane *lanes, int n)
{
    int begins = 0, embeds = 0, layers = c->ws->model->config.n_layers;
    while (begins < n && lanes[begins].first_layer == 0) begins++;
    for (int i = 0; i < begins; i++) embeds |= lanes[i].step == 0;
    if (sweep->embeds && embeds) ouro_see(c, lanes, begins, OURO_P_EMBED, layers);
    if (sweep->opens) ouro_see(c, lanes, begins, OURO_P_STEP_PRE, layers);
}

void ouro_seen_enter(crew *c, const ouro_lane *lanes, int n, ouro_place at)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_RESID_PRE}, {norm, OURO_P_LN1_SCALE}, {rescale, OURO_P_LN1}, {prepare, NOTHING}};
    int older = 0;
    while (older < n && lanes[older].first_layer < at.slot) older++;
    if (older && at.before >= 0) close(c, lanes, older, at.before);
    ouro_stages(c, lanes, n, at.layer, stages, COUNT(stages));
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static void rotate(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    for (int head = 0; head < ws->model->config.n_heads + ws->model->config.n_kv_heads; head++) ouro_block_rope(ws, i, head);
}

void ouro_seen_qkv(crew *c, const ouro_lane *lanes, int n, ouro_place at)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_Q}, {NULL, OURO_P_K}, {NULL, OURO_P_V}, {rotate, OURO_P_ROT_Q}, {NULL, OURO_P_ROT_K}};
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_matrix *qkv = &ws->model->layers[at.layer].qkv;
    int begin, end, kv = g->n_kv_heads, tiles = ouro_head_tiles(g);
    for (ouro_work *w = crew_phase(c, g->n_heads + 2 * kv); crew_take(c, w, 1, &begin, &end);)
        ouro_product(ws, c->thread, qkv, begin * tiles, (begin + 1) * tiles, &ws->x_model, n, ws->qkv, ouro_qkv_stride(g));
    ouro_stages(c, lanes, n, at.layer, stages, COUNT(stages));
    for (ouro_work *w = crew_phase(c, kv); crew_take(c, w, 1, &begin, &end);)
        ouro_block_store(ws, lanes, n, at.slot, begin);
}

static void soften(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)point, (void)layer;
    ouro_attend_pattern(ws, lane, i);
}

void ouro_seen_attend(crew *c, const ouro_lane *lanes, int n, int n_spans, ouro_place at)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_SCORES}, {soften, OURO_P_PATTERN}};
    ouro_workspace *ws = c->ws;
    int begin, end, heads = ws->model->config.n_kv_heads;
    bool pattern = ouro_wanted(ws, at.layer) & OURO_BIT(OURO_P_PATTERN);
    for (ouro_work *w = crew_phase(c, n_spans * heads); crew_take(c, w, 1, &begin, &end);)
        ouro_attend_scores(ws, lanes, ws->spans[begin / heads], at.slot, begin % heads, c->thread);
    ouro_stages(c, lanes, n, at.layer, stages, pattern ? 2 : 1);
    for (ouro_work *w = crew_phase(c, n_spans * heads); crew_take(c, w, 1, &begin, &end);)
        ouro_attend_values(ws, lanes, ws->spans[begin / heads], at.slot, begin % heads, c->thread, pattern ? ws->seen->changed : NULL);
}

static void prepare_heads(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    int cols = ws->model->config.n_heads * ws->model->config.d_head;
    ouro_prepare(ws->model->kernels, &ws->x_heads, i, ws->z + (size_t)i * (size_t)cols, cols);
}

void ouro_seen_z(crew *c, const ouro_lane *lanes, int n, int layer)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_Z}, {prepare_heads, NOTHING}};
    ouro_stages(c, lanes, n, layer, stages, COUNT(stages));
}

/* Row i of x_heads with everything but columns [from, to) zero. Zeros leave a chain of sums as it is, so products of
 * these rows are exactly the head's terms. */
static void keep_columns(const ouro_acts *x, ouro_acts *one, int i, int from, int to)
{
    size_t element = x->kind == OURO_ACT_F32 ? 4 : x->kind == OURO_ACT_BF16 ? 2 : 1;
    uint8_t *row = one->data + (size_t)i * one->stride;
    memset(row, 0, (size_t)x->kpad * element);
    memcpy(row + (size_t)from * element, x->data + (size_t)i * x->stride + (size_t)from * element, (size_t)(to - from) * element);
    if (!x->scale) return;
    int groups = x->kpad / OURO_GROUP;
    memcpy(one->scale + i * groups, x->scale + i * groups, (size_t)groups * sizeof(float));
    for (int g = 0; g < 2 * groups; g++) {
        int32_t sum = 0;
        for (int k = g * OURO_GROUP4; k < (g + 1) * OURO_GROUP4; k++) sum += (int8_t)row[k];
        one->sum[i * 2 * groups + g] = sum;
    }
}

/* Heads as column ranges of the output projection: a range of k of a float matrix, and of its inputs, is one as well. */
static bool heads_are_ranges(const ouro_workspace *ws) { return ws->x_heads.kind != OURO_ACT_S8 && ws->model->config.d_head % 8 == 0; }

static void head_range(const ouro_workspace *ws, int layer, int h, ouro_matrix *w, ouro_acts *x)
{
    int dh = ws->model->config.d_head;
    size_t from = (size_t)h * (size_t)dh;
    *w = ws->model->layers[layer].o;
    *x = ws->x_heads;
    w->data += from * OURO_TILE * (w->format == OURO_F32 ? 4 : 2);
    w->cols = w->kpad = x->kpad = dh;
    x->data += from * (x->kind == OURO_ACT_F32 ? 4 : 2);
}

/* seen->result [lanes][H][d]: what each head gives alone */
static void head_products(crew *c, int n, int layer)
{
    ouro_workspace *ws = c->ws;
    ouro_seen *s = ws->seen;
    const ouro_config *g = &ws->model->config;
    int begin, end;
    size_t row = ouro_y_stride(g), stride = (size_t)g->n_heads * row;
    for (int h = 0; h < g->n_heads; h++) {
        ouro_matrix w = ws->model->layers[layer].o;
        ouro_acts x = s->one_head;
        if (heads_are_ranges(ws)) head_range(ws, layer, h, &w, &x);
        else
            for (ouro_work *k = crew_phase(c, n); crew_take(c, k, 2, &begin, &end);)
                for (int i = begin; i < end; i++) keep_columns(&ws->x_heads, &s->one_head, i, h * g->d_head, (h + 1) * g->d_head);
        ouro_block_product(c, &w, &x, n, s->result + (size_t)h * row, stride);
    }
}

/* what the layer goes on with when a head was changed: the sum over heads */
static void sum_heads(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    const ouro_config *g = &ws->model->config;
    size_t row = ouro_y_stride(g), stride = (size_t)g->n_heads * row;
    if (!ws->seen->changed[i]) return;
    float *y = ws->y + (size_t)i * row;
    memset(y, 0, (size_t)g->d_model * sizeof *y);
    for (int h = 0; h < g->n_heads; h++)
        for (int k = 0; k < g->d_model; k++) y[k] += ws->seen->result[(size_t)i * stride + (size_t)h * row + (size_t)k];
}

void ouro_seen_result(crew *c, const ouro_lane *lanes, int n, int layer)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_RESULT}, {sum_heads, NOTHING}};
    head_products(c, n, layer);
    ouro_stages(c, lanes, n, layer, stages, COUNT(stages));
}

void ouro_seen_middle(crew *c, const ouro_lane *lanes, int n, int layer)
{
    static const ouro_stage stages[] = {{norm, OURO_P_LN1_POST_SCALE}, {rescale, OURO_P_LN1_POST}, {NULL, OURO_P_ATTN_OUT},
                                        {add, OURO_P_RESID_MID}, {norm, OURO_P_LN2_SCALE}, {rescale, OURO_P_LN2}, {prepare, NOTHING}};
    ouro_stages(c, lanes, n, layer, stages, COUNT(stages));
}

/* ---- feed-forward ------------------------------------------------------------------------------------------------ */

/* A row of gate_up: [what the product left, later silu(gate) up: 2 half][gate: half][up: half] */
static float *gate_up_row(const ouro_workspace *ws, int i) { return ws->seen->gate_up + (size_t)i * 4 * ouro_mlp_stride(&ws->model->config); }

/* The product leaves tiles of gate and up in turns; here they part. */
static void part(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    size_t half = ouro_mlp_stride(&ws->model->config);
    float *row = gate_up_row(ws, i);
    for (size_t at = 0; at < half; at += OURO_TILE) {
        memcpy(row + 2 * half + at, row + 2 * at, OURO_TILE * sizeof *row);
        memcpy(row + 3 * half + at, row + 2 * at + OURO_TILE, OURO_TILE * sizeof *row);
    }
}

static void swiglu(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    size_t half = ouro_mlp_stride(&ws->model->config);
    float *row = gate_up_row(ws, i);
    ws->model->kernels->swiglu_rows(row + 2 * half, row + 3 * half, ws->model->config.d_mlp, row);
}

static void prepare_mlp(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)lane, (void)point, (void)layer;
    int f = ws->model->config.d_mlp;
    if (ws->mlp) memcpy(ws->mlp + (size_t)i * ouro_mlp_stride(&ws->model->config), gate_up_row(ws, i), (size_t)f * sizeof(float));
    else ouro_prepare(ws->model->kernels, &ws->x_mlp, i, gate_up_row(ws, i), f);
}

void ouro_seen_mlp(crew *c, const ouro_lane *lanes, int n, int layer)
{
    static const ouro_stage stages[] = {{part, OURO_P_MLP_PRE}, {NULL, OURO_P_MLP_PRE_LINEAR}, {swiglu, OURO_P_MLP_POST},
                                        {prepare_mlp, NOTHING}};
    size_t stride = 4 * ouro_mlp_stride(&c->ws->model->config);
    ouro_block_product(c, &c->ws->model->layers[layer].gate_up, &c->ws->x_model, n, c->ws->seen->gate_up, stride);
    ouro_stages(c, lanes, n, layer, stages, COUNT(stages));
}

/* ---- the end of a step ------------------------------------------------------------------------------------------- */

/* the state, and its gate logit */
static void enter_state(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer)
{
    (void)point, (void)layer;
    const ouro_model *m = ws->model;
    memcpy(lane->h, normed_row(ws, i), (size_t)m->config.d_model * sizeof(float));
    ws->seen->scalars[i] = m->kernels->dot(lane->h, m->exit_w, m->config.d_model) + m->exit_b;
}

void ouro_seen_boundary(crew *c, const ouro_sweep *sweep, ouro_lane *lanes, int n, int last)
{
    static const ouro_stage stages[] = {{NULL, OURO_P_STEP_POST}, {norm, OURO_P_LN_FINAL_SCALE}, {rescale, OURO_P_LN_FINAL},
                                        {enter_state, OURO_P_GATE}};
    int begin, end;
    if (last >= 0) close(c, lanes, n, last);
    if (!sweep->closes) return;
    ouro_stages(c, lanes, n, c->ws->model->config.n_layers, stages, COUNT(stages));
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) lanes[i].gate = c->ws->seen->scalars[i];
}
