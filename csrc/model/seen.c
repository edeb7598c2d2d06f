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
    ws->want = NULL;
    for (int i = 0; i < n; i++) {
        watched |= lanes[i].observer != NULL;
        if (lanes[i].pos > last) last = lanes[i].pos;
    }
    if (!watched) return OURO_OK;
    if (!ws->seen) ws->seen = calloc(1, sizeof *ws->seen);
    if (ws->seen && !ws->seen->want) ws->seen->want = calloc((size_t)layers + 1, sizeof *ws->seen->want);
    if (!ws->seen || !ws->seen->want) return ouro_fail(OURO_ERR_MEMORY, "no memory for an observed pass");
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

bool ouro_see(crew *c, const ouro_lane *lanes, int n, ouro_point point, int layer, ouro_rows rows)
{
    ouro_workspace *ws = c->ws;
    int begin, end, of_layer = layer == ws->model->config.n_layers ? -1 : layer;
    if (!(ouro_wanted(ws, layer) & OURO_BIT(point))) return false;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);)
        for (int i = begin; i < end; i++) {
            ws->seen->changed[i] = 0;
            if (!wanted_by(&lanes[i], point, of_layer)) continue;
            ouro_rows row = ouro_row_of(&rows, lanes, i);
            ws->seen->changed[i] = (uint8_t)lanes[i].observer->visit(lanes[i].observer, &lanes[i], point, of_layer, &row);
        }
    ouro_pool_barrier(ws->pool, c->thread);
    if (c->thread == 0 && !atomic_load(&ws->cancelled)) meet(ws, lanes, n, point, of_layer, &rows);
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
