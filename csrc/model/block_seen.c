/* block_seen.c - the phases of block.c and pass.c as they run when an observer wants to see inside.
 *
 * Each operation is a phase of its own whose rows stay in memory, with an ouro_see behind it. Same kernels, same order
 * of every sum: rows that nobody changes come out with the bits of the fused phases (tests: test_tap.py compares every
 * point in every compute).
 */
#include "model/block_seen.h"

#include <string.h>

#include "model/attention.h"
#include "model/product.h"
#include "model/seen.h"

static const ouro_rows H_ROWS = {0};     /* data NULL: the lanes' h; cols is set by rows_of_h */

static ouro_rows rows_of_h(const ouro_workspace *ws)
{
    ouro_rows rows = H_ROWS;
    rows.heads = 1;
    rows.cols = ws->model->config.d_model;
    return rows;
}

static ouro_rows rows_at(float *data, size_t stride, int cols)
{
    return (ouro_rows){.data = data, .stride = stride, .heads = 1, .cols = cols};
}

static void see_h(crew *c, const ouro_lane *lanes, int n, ouro_point point, int layer)
{
    ouro_see(c, lanes, n, point, layer, rows_of_h(c->ws));
}

/* seen->normed = RMS(x; weight) with scale and result shown; x: ws->y rows, or the lanes' h when NULL */
static void seen_norm(crew *c, const ouro_lane *lanes, int n, const float *x, const float *weight, ouro_point scale,
                      int layer)
{
    ouro_workspace *ws = c->ws;
    ouro_seen *s = ws->seen;
    int begin, end, d = ws->model->config.d_model;
    size_t stride = ouro_y_stride(&ws->model->config);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            const float *row = x ? x + (size_t)i * stride : lanes[i].h;
            s->scalars[i] = 1.0f / ws->model->kernels->rmsnorm(row, weight, ws->model->config.eps, d, s->normed + (size_t)i * stride);
        }
    if (ouro_see(c, lanes, n, scale, layer, rows_at(s->scalars, 1, 1)))
        for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
            for (int i = begin; i < end; i++) {
                if (!s->changed[i]) continue;
                const float *row = x ? x + (size_t)i * stride : lanes[i].h;
                float r = 1.0f / s->scalars[i], *to = s->normed + (size_t)i * stride;
                for (int k = 0; k < d; k++) to[k] = row[k] * r * weight[k];
            }
    ouro_see(c, lanes, n, scale + 1, layer, rows_at(s->normed, stride, d));
}

/* h += seen->normed, behind a look at what is added */
static void seen_add(crew *c, const ouro_lane *lanes, int n, ouro_point added, ouro_point sum, int layer)
{
    ouro_workspace *ws = c->ws;
    int begin, end, d = ws->model->config.d_model;
    size_t stride = ouro_y_stride(&ws->model->config);
    ouro_see(c, lanes, n, added, layer, rows_at(ws->seen->normed, stride, d));
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            const float *row = ws->seen->normed + (size_t)i * stride;
            for (int k = 0; k < d; k++) lanes[i].h[k] = lanes[i].h[k] + row[k];
        }
    see_h(c, lanes, n, sum, layer);
}

static void prepare_normed(crew *c, int n)
{
    const ouro_config *g = &c->ws->model->config;
    ouro_block_prepare(c, &c->ws->x_model, c->ws->seen->normed, ouro_y_stride(g), g->d_model, n);
}

static void seen_close(crew *c, const ouro_lane *lanes, int n, int layer)
{
    seen_norm(c, lanes, n, c->ws->y, c->ws->model->layers[layer].ln2_post, OURO_P_LN2_POST_SCALE, layer);
    seen_add(c, lanes, n, OURO_P_MLP_OUT, OURO_P_RESID_POST, layer);
}

void ouro_seen_open(crew *c, const ouro_sweep *sweep, const ouro_lane *lanes, int n)
{
    int begins = 0, embeds = 0, layers = c->ws->model->config.n_layers;
    while (begins < n && lanes[begins].first_layer == 0) begins++;
    for (int i = 0; i < begins; i++) embeds |= lanes[i].step == 0;
    if (sweep->embeds && embeds) see_h(c, lanes, begins, OURO_P_EMBED, layers);
    if (sweep->opens) see_h(c, lanes, begins, OURO_P_STEP_PRE, layers);
}

void ouro_seen_enter(crew *c, const ouro_lane *lanes, int n, ouro_place at)
{
    int older = 0;
    while (older < n && lanes[older].first_layer < at.slot) older++;
    if (older && at.before >= 0) seen_close(c, lanes, older, at.before);
    see_h(c, lanes, n, OURO_P_RESID_PRE, at.layer);
    seen_norm(c, lanes, n, NULL, c->ws->model->layers[at.layer].ln1, OURO_P_LN1_SCALE, at.layer);
    prepare_normed(c, n);
}

/* ---- attention --------------------------------------------------------------------------------------------------- */

static void see_heads(crew *c, const ouro_lane *lanes, int n, ouro_point point, int layer, int first, int heads)
{
    const ouro_config *g = &c->ws->model->config;
    size_t pad = (size_t)ouro_head_pad(g);
    ouro_see(c, lanes, n, point, layer, (ouro_rows){.data = c->ws->qkv + (size_t)first * pad, .stride = ouro_qkv_stride(g),
                                                    .head_stride = pad, .heads = heads, .cols = g->d_head});
}

void ouro_seen_qkv(crew *c, const ouro_lane *lanes, int n, ouro_place at)
{
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_matrix *qkv = &ws->model->layers[at.layer].qkv;
    int begin, end, q = g->n_heads, kv = g->n_kv_heads, tiles = ouro_head_tiles(g);
    for (ouro_work *w = crew_phase(c, q + 2 * kv); crew_take(c, w, 1, &begin, &end);)
        ouro_product(ws, c->thread, qkv, begin * tiles, (begin + 1) * tiles, &ws->x_model, n, ws->qkv, ouro_qkv_stride(g));
    see_heads(c, lanes, n, OURO_P_Q, at.layer, 0, q);
    see_heads(c, lanes, n, OURO_P_K, at.layer, q, kv);
    see_heads(c, lanes, n, OURO_P_V, at.layer, q + kv, kv);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);)
        for (int head = 0; head < q + kv; head++) ouro_block_rope(ws, begin, head);
    see_heads(c, lanes, n, OURO_P_ROT_Q, at.layer, 0, q);
    see_heads(c, lanes, n, OURO_P_ROT_K, at.layer, q, kv);
    for (ouro_work *w = crew_phase(c, kv); crew_take(c, w, 1, &begin, &end);)
        ouro_block_store(ws, lanes, n, at.slot, begin);
}

static ouro_rows square_rows(const ouro_workspace *ws, float *data)
{
    size_t sources = ws->seen->sources;
    return (ouro_rows){.data = data, .stride = (size_t)ws->model->config.n_heads * sources, .head_stride = sources,
                       .heads = ws->model->config.n_heads, .cols = 0};
}

void ouro_seen_attend(crew *c, const ouro_lane *lanes, int n, int n_spans, ouro_place at)
{
    ouro_workspace *ws = c->ws;
    int begin, end, heads = ws->model->config.n_kv_heads;
    bool pattern = ouro_wanted(ws, at.layer) & OURO_BIT(OURO_P_PATTERN), seen = false;
    for (ouro_work *w = crew_phase(c, n_spans * heads); crew_take(c, w, 1, &begin, &end);)
        ouro_attend_scores(ws, lanes, ws->spans[begin / heads], at.slot, begin % heads, c->thread);
    ouro_see(c, lanes, n, OURO_P_SCORES, at.layer, square_rows(ws, ws->seen->scores));
    if (pattern) {
        for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);) ouro_attend_pattern(ws, &lanes[begin], begin);
        seen = ouro_see(c, lanes, n, OURO_P_PATTERN, at.layer, square_rows(ws, ws->seen->pattern));
    }
    for (ouro_work *w = crew_phase(c, n_spans * heads); crew_take(c, w, 1, &begin, &end);)
        ouro_attend_values(ws, lanes, ws->spans[begin / heads], at.slot, begin % heads, c->thread, seen ? ws->seen->changed : NULL);
}

void ouro_seen_z(crew *c, const ouro_lane *lanes, int n, int layer)
{
    const ouro_config *g = &c->ws->model->config;
    size_t dh = (size_t)g->d_head;
    ouro_see(c, lanes, n, OURO_P_Z, layer, (ouro_rows){.data = c->ws->z, .stride = (size_t)g->n_heads * dh, .head_stride = dh,
                                                       .heads = g->n_heads, .cols = g->d_head});
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

void ouro_seen_result(crew *c, const ouro_lane *lanes, int n, int layer)
{
    ouro_workspace *ws = c->ws;
    ouro_seen *s = ws->seen;
    const ouro_config *g = &ws->model->config;
    int begin, end, d = g->d_model;
    size_t row = ouro_y_stride(g), stride = (size_t)g->n_heads * row;
    for (int h = 0; h < g->n_heads; h++) {
        for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
            for (int i = begin; i < end; i++) keep_columns(&ws->x_heads, &s->one_head, i, h * g->d_head, (h + 1) * g->d_head);
        ouro_block_product(c, &ws->model->layers[layer].o, &s->one_head, n, s->result + (size_t)h * row, stride);
    }
    ouro_see(c, lanes, n, OURO_P_RESULT, layer, (ouro_rows){.data = s->result, .stride = stride, .head_stride = row,
                                                            .heads = g->n_heads, .cols = d});
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);) {
        if (!s->changed[begin]) continue;
        float *y = ws->y + (size_t)begin * row;
        memset(y, 0, (size_t)d * sizeof *y);
        for (int h = 0; h < g->n_heads; h++)
            for (int k = 0; k < d; k++) y[k] += s->result[(size_t)begin * stride + (size_t)h * row + (size_t)k];
    }
}

void ouro_seen_middle(crew *c, const ouro_lane *lanes, int n, int layer)
{
    const ouro_layer *y = &c->ws->model->layers[layer];
    seen_norm(c, lanes, n, c->ws->y, y->ln1_post, OURO_P_LN1_POST_SCALE, layer);
    seen_add(c, lanes, n, OURO_P_ATTN_OUT, OURO_P_RESID_MID, layer);
    seen_norm(c, lanes, n, NULL, y->ln2, OURO_P_LN2_SCALE, layer);
    prepare_normed(c, n);
}

/* ---- feed-forward ------------------------------------------------------------------------------------------------ */

/* The product leaves tiles of gate and up in turns; here they part: row [both 2 half][gate half][up half]. */
static void part(float *row, size_t half)
{
    for (size_t at = 0; at < half; at += OURO_TILE) {
        memcpy(row + 2 * half + at, row + 2 * at, OURO_TILE * sizeof *row);
        memcpy(row + 3 * half + at, row + 2 * at + OURO_TILE, OURO_TILE * sizeof *row);
    }
}

void ouro_seen_mlp(crew *c, const ouro_lane *lanes, int n, int layer)
{
    ouro_workspace *ws = c->ws;
    const ouro_kernels *k = ws->model->kernels;
    int begin, end, f = ws->model->config.d_mlp;
    size_t half = ouro_mlp_stride(&ws->model->config), stride = 4 * half;
    float *both = ws->seen->gate_up, *gate = both + 2 * half, *up = both + 3 * half;
    ouro_block_product(c, &ws->model->layers[layer].gate_up, &ws->x_model, n, both, stride);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);) part(both + (size_t)begin * stride, half);
    ouro_see(c, lanes, n, OURO_P_MLP_PRE, layer, rows_at(gate, stride, f));
    ouro_see(c, lanes, n, OURO_P_MLP_PRE_LINEAR, layer, rows_at(up, stride, f));
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);)
        k->swiglu_rows(gate + (size_t)begin * stride, up + (size_t)begin * stride, f, both + (size_t)begin * stride);
    ouro_see(c, lanes, n, OURO_P_MLP_POST, layer, rows_at(both, stride, f));
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);) {
        const float *row = both + (size_t)begin * stride;
        if (ws->mlp) memcpy(ws->mlp + (size_t)begin * half, row, (size_t)f * sizeof *row);
        else ouro_prepare(k, &ws->x_mlp, begin, row, f);
    }
}

/* ---- the end of a step ------------------------------------------------------------------------------------------- */

void ouro_seen_boundary(crew *c, const ouro_sweep *sweep, ouro_lane *lanes, int n, int last)
{
    ouro_workspace *ws = c->ws;
    ouro_seen *s = ws->seen;
    const ouro_model *m = ws->model;
    int begin, end, d = m->config.d_model, step = m->config.n_layers;
    size_t stride = ouro_y_stride(&m->config);
    if (last >= 0) seen_close(c, lanes, n, last);
    if (!sweep->closes) return;
    see_h(c, lanes, n, OURO_P_STEP_POST, step);
    seen_norm(c, lanes, n, NULL, m->norm, OURO_P_LN_FINAL_SCALE, step);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            memcpy(lanes[i].h, s->normed + (size_t)i * stride, (size_t)d * sizeof(float));
            s->scalars[i] = m->kernels->dot(lanes[i].h, m->exit_w, d) + m->exit_b;
        }
    ouro_see(c, lanes, n, OURO_P_GATE, step, rows_at(s->scalars, 1, 1));
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) lanes[i].gate = s->scalars[i];
}
