/* seen.c - memory of observed passes, and the phase that shows rows; see seen.h and observe.h. */
#include "model/seen.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "ouro_status.h"

void ouro_seen_free(ouro_seen *s)
{
    if (!s) return;
    float *floats[] = {s->scalars, s->normed, s->gate_up, s->scores, s->pattern, s->result, s->one_head.scale};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) ouro_free(floats[i]);
    ouro_free(s->changed);
    ouro_free(s->one_head.data);
    ouro_free(s->one_head.sum);
    free(s->want);
    free(s);
}

static int no_room(size_t bytes) { return ouro_fail(OURO_ERR_MEMORY, "no memory for %zu bytes of observed rows", bytes); }

/* Makes *at hold n floats; what it held is lost when it grows. */
static int make_room(float **at, size_t *have, size_t n)
{
    if (n <= *have) return OURO_OK;
    ouro_free(*at);
    *at = ouro_alloc(n * sizeof **at);
    *have = *at ? n : 0;
    return *at ? OURO_OK : no_room(n * sizeof **at);
}

/* The copy of x_heads in which one head stands alone, and the flags: sized with the workspace. */
static int follow_workspace(ouro_workspace *ws, ouro_seen *s)
{
    size_t lanes = (size_t)ws->lanes, groups = (size_t)ws->x_heads.kpad / OURO_GROUP4;
    if (s->lanes == ws->lanes) return OURO_OK;
    ouro_free(s->changed);
    ouro_free(s->one_head.data);
    ouro_free(s->one_head.scale);
    ouro_free(s->one_head.sum);
    s->lanes = 0;
    s->one_head = ws->x_heads;
    s->changed = ouro_alloc(lanes);
    s->one_head.data = ouro_alloc(lanes * ws->x_heads.stride);
    s->one_head.scale = ws->x_heads.scale ? ouro_alloc(lanes * groups / 2 * sizeof(float)) : NULL;
    s->one_head.sum = ws->x_heads.sum ? ouro_alloc(lanes * groups * sizeof(int32_t)) : NULL;
    if (!s->changed || !s->one_head.data || (ws->x_heads.scale && (!s->one_head.scale || !s->one_head.sum)))
        return no_room(lanes * ws->x_heads.stride);
    s->lanes = ws->lanes;
    return OURO_OK;
}

static int room_for(ouro_workspace *ws, ouro_seen *s, uint64_t all, int last_pos)
{
    const ouro_config *c = &ws->model->config;
    const uint64_t mlp = OURO_BIT(OURO_P_MLP_PRE) | OURO_BIT(OURO_P_MLP_PRE_LINEAR) | OURO_BIT(OURO_P_MLP_POST);
    s->sources = ((size_t)last_pos / OURO_BLOCK + 1) * OURO_BLOCK;
    size_t lanes = (size_t)ws->lanes, *have = s->sizes, heads = lanes * (size_t)c->n_heads, square = heads * s->sources;
    int status = follow_workspace(ws, s);
    if (status == OURO_OK) status = make_room(&s->scalars, &have[0], lanes);
    if (status == OURO_OK) status = make_room(&s->normed, &have[1], lanes * ouro_y_stride(c));
    if (status == OURO_OK && (all & mlp)) status = make_room(&s->gate_up, &have[2], lanes * 4 * ouro_mlp_stride(c));
    if (status == OURO_OK && (all & OURO_ATTENTION_POINTS)) status = make_room(&s->scores, &have[3], square);
    if (status == OURO_OK && (all & OURO_BIT(OURO_P_PATTERN))) status = make_room(&s->pattern, &have[4], square);
    if (status == OURO_OK && (all & OURO_BIT(OURO_P_RESULT)))
        status = make_room(&s->result, &have[5], heads * ouro_y_stride(c));
    return status;
}

/* Points of every layer, over the distinct (observer, step) of the lanes. */
static void ask_observers(uint64_t *want, int n_layers, const ouro_lane *lanes, int n)
{
    const ouro_observer *last = NULL;
    int step = -1;
    memset(want, 0, ((size_t)n_layers + 1) * sizeof *want);
    for (int i = 0; i < n; i++) {
        const ouro_observer *o = lanes[i].observer;
        if (!o || (o == last && lanes[i].step == step)) continue;
        for (int l = 0; l < n_layers; l++) want[l] |= o->wants(o, lanes[i].step, l);
        want[n_layers] |= o->wants(o, lanes[i].step, -1);
        last = o, step = lanes[i].step;
    }
}

int ouro_seen_begin(ouro_workspace *ws, const ouro_lane *lanes, int n)
{
    int layers = ws->model->config.n_layers, last = 0, watched = 0;
    uint64_t all = 0;
    bool meets = false;
    ws->want = NULL;
    for (int i = 0; i < n; i++) {
        watched |= lanes[i].observer != NULL;
        meets |= lanes[i].observer && lanes[i].observer->meet;
        if (lanes[i].pos > last) last = lanes[i].pos;
    }
    if (!watched) return OURO_OK;
    if (!ws->seen) ws->seen = calloc(1, sizeof *ws->seen);
    if (ws->seen && !ws->seen->want) ws->seen->want = calloc((size_t)layers + 1, sizeof *ws->seen->want);
    if (!ws->seen || !ws->seen->want) return ouro_fail(OURO_ERR_MEMORY, "no memory for an observed pass");
    ws->seen->meets = meets;
    ask_observers(ws->seen->want, layers, lanes, n);
    for (int l = 0; l <= layers; l++) all |= ws->seen->want[l];
    int status = room_for(ws, ws->seen, all, last);
    if (status == OURO_OK && all) ws->want = ws->seen->want;
    return status;
}

static int wanted_by(const ouro_lane *lane, ouro_point point, int layer)
{
    const ouro_observer *o = lane->observer;
    return o && (o->wants(o, lane->step, layer) & OURO_BIT(point));
}

/* Runs of lanes with one observer meet together. */
static void meet(ouro_workspace *ws, const ouro_lane *lanes, int n, ouro_point point, int layer, const ouro_rows *rows)
{
    for (int begin = 0, end; begin < n; begin = end) {
        const ouro_observer *o = lanes[begin].observer;
        for (end = begin + 1; end < n && lanes[end].observer == o && lanes[end].step == lanes[begin].step;) end++;
        if (!o || !o->meet || !wanted_by(&lanes[begin], point, layer)) continue;
        ouro_rows part = *rows;
        if (part.data) part.data += (size_t)begin * part.stride;
        if (o->meet(o, lanes + begin, end - begin, point, layer, &part, ws->seen->changed + begin)) {
            atomic_store(&ws->cancelled, 1);
            return;
        }
    }
}

static ouro_rows rows_at(float *data, size_t stride, int cols)
{
    return (ouro_rows){.data = data, .stride = stride, .heads = 1, .cols = cols};
}

static ouro_rows head_rows(float *data, size_t stride, size_t head_stride, int heads, int cols)
{
    return (ouro_rows){.data = data, .stride = stride, .head_stride = head_stride, .heads = heads, .cols = cols};
}

static ouro_rows qkv_rows(const ouro_workspace *ws, int first, int heads)
{
    const ouro_config *g = &ws->model->config;
    size_t pad = (size_t)ouro_head_pad(g);
    return head_rows(ws->qkv + (size_t)first * pad, ouro_qkv_stride(g), pad, heads, g->d_head);
}

/* Where the rows of a point are in memory when it is shown. */
static ouro_rows rows_of(const ouro_workspace *ws, ouro_point point)
{
    const ouro_seen *s = ws->seen;
    const ouro_config *g = &ws->model->config;
    int q = g->n_heads, kv = g->n_kv_heads;
    size_t y = ouro_y_stride(g), f = ouro_mlp_stride(g), dh = (size_t)g->d_head, heads = (size_t)q;
    switch (point) {
    case OURO_P_LN1_SCALE: case OURO_P_LN1_POST_SCALE: case OURO_P_LN2_SCALE: case OURO_P_LN2_POST_SCALE:
    case OURO_P_LN_FINAL_SCALE: case OURO_P_GATE: return rows_at(s->scalars, 1, 1);
    case OURO_P_LN1: case OURO_P_LN1_POST: case OURO_P_LN2: case OURO_P_LN2_POST: case OURO_P_LN_FINAL:
    case OURO_P_ATTN_OUT: case OURO_P_MLP_OUT: return rows_at(s->normed, y, g->d_model);
    case OURO_P_Q: case OURO_P_ROT_Q: return qkv_rows(ws, 0, q);
    case OURO_P_K: case OURO_P_ROT_K: return qkv_rows(ws, q, kv);
    case OURO_P_V: return qkv_rows(ws, q + kv, kv);
    case OURO_P_SCORES: return head_rows(s->scores, heads * s->sources, s->sources, q, 0);
    case OURO_P_PATTERN: return head_rows(s->pattern, heads * s->sources, s->sources, q, 0);
    case OURO_P_Z: return head_rows(ws->z, heads * dh, dh, q, g->d_head);
    case OURO_P_RESULT: return head_rows(s->result, heads * y, y, q, g->d_model);
    case OURO_P_MLP_PRE: return rows_at(s->gate_up + 2 * f, 4 * f, g->d_mlp);
    case OURO_P_MLP_PRE_LINEAR: return rows_at(s->gate_up + 3 * f, 4 * f, g->d_mlp);
    case OURO_P_MLP_POST: return rows_at(s->gate_up, 4 * f, g->d_mlp);
    default: return rows_at(NULL, 0, g->d_model);       /* the lanes' h */
    }
}

/* what a stage is, apart from the lanes */
typedef struct showing {
    const ouro_stage *stage;
    ouro_rows rows;
    int layer, of_layer;             /* of_layer: as observers count, -1 for points of a step */
    bool wanted;
} showing;

static showing showing_of(const ouro_workspace *ws, const ouro_stage *stage, int layer)
{
    showing y = {.stage = stage, .layer = layer, .of_layer = layer == ws->model->config.n_layers ? -1 : layer};
    y.wanted = stage->point != OURO_N_POINTS && (ouro_wanted(ws, layer) & OURO_BIT(stage->point));
    if (y.wanted) y.rows = rows_of(ws, stage->point);
    return y;
}

static void stage_lane(ouro_workspace *ws, const ouro_lane *lanes, int i, const showing *y)
{
    const ouro_lane *lane = &lanes[i];
    if (y->stage->work) y->stage->work(ws, lane, i, y->stage->point, y->layer);
    ws->seen->changed[i] = 0;
    if (!y->wanted || !wanted_by(lane, y->stage->point, y->of_layer)) return;
    ouro_rows row = ouro_row_of(&y->rows, lanes, i);
    ws->seen->changed[i] = (uint8_t)lane->observer->visit(lane->observer, lane, y->stage->point, y->of_layer, &row);
}

/* each stage a phase of its own, with a meeting behind it */
static void stages_apart(crew *c, const ouro_lane *lanes, int n, const showing *y, int n_stages)
{
    ouro_workspace *ws = c->ws;
    int begin, end;
    for (int k = 0; k < n_stages; k++) {
        if (!y[k].wanted && !y[k].stage->work) continue;
        for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
            for (int i = begin; i < end; i++) stage_lane(ws, lanes, i, &y[k]);
        ws->model->kernels->keep_done();
        if (!y[k].wanted) continue;
        ouro_pool_barrier(ws->pool, c->thread);
        if (c->thread == 0 && !atomic_load(&ws->cancelled)) meet(ws, lanes, n, y[k].stage->point, y[k].of_layer, &y[k].rows);
    }
}

void ouro_stages(crew *c, const ouro_lane *lanes, int n, int layer, const ouro_stage *stages, int n_stages)
{
    showing y[OURO_MAX_STAGES];
    int begin, end;
    for (int k = 0; k < n_stages; k++) y[k] = showing_of(c->ws, &stages[k], layer);
    if (c->ws->seen->meets) {
        stages_apart(c, lanes, n, y, n_stages);
        return;
    }
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++)
            for (int k = 0; k < n_stages; k++) stage_lane(c->ws, lanes, i, &y[k]);
    c->ws->model->kernels->keep_done();
}

bool ouro_see(crew *c, const ouro_lane *lanes, int n, ouro_point point, int layer)
{
    const ouro_stage stage = {NULL, point};
    if (!(ouro_wanted(c->ws, layer) & OURO_BIT(point))) return false;
    ouro_stages(c, lanes, n, layer, &stage, 1);
    return true;
}

int ouro_show(const ouro_lane *lanes, int n, ouro_point point, ouro_rows rows, uint8_t *changed)
{
    for (int begin = 0, end; begin < n; begin = end) {
        const ouro_observer *o = lanes[begin].observer;
        for (end = begin + 1; end < n && lanes[end].observer == o && lanes[end].step == lanes[begin].step;) end++;
        if (!wanted_by(&lanes[begin], point, -1)) continue;
        for (int i = begin; i < end; i++) {
            ouro_rows row = ouro_row_of(&rows, lanes, i);
            changed[i] = (uint8_t)o->visit(o, &lanes[i], point, -1, &row);
        }
        ouro_rows part = rows;
        if (part.data) part.data += (size_t)begin * part.stride;
        if (o->meet && o->meet(o, lanes + begin, end - begin, point, -1, &part, changed + begin))
            return ouro_fail(OURO_ERR_CANCELLED, "an observer asked to stop");
    }
    return OURO_OK;
}
