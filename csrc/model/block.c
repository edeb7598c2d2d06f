/* block.c - one shared transformer layer over all lanes of a pass, by all threads of a crew.
 *
 *   a = Attn(RMS(h; ln1)),           h += RMS(a; ln1_post)
 *   m = Wd(silu(Wg u) * Wu u),       h += RMS(m; ln2_post),     u = RMS(h; ln2)
 *
 * A layer is a row of phases; a phase is split by lanes (norms), by heads (q/k/v, attention) or by output tiles
 * (products), never along a sum, so the threads leave no trace in the bits. Phases of which an observer wants to see
 * the inside are replaced by those of block_seen.c.
 */
#include "model/block.h"

#include <math.h>
#include <string.h>

#include "model/attention.h"
#include "model/block_seen.h"
#include "model/product.h"

void ouro_prepare(const ouro_kernels *k, ouro_acts *x, int lane, const float *row, int n)
{
    uint8_t *to = x->data + (size_t)lane * x->stride;
    if (x->kind == OURO_ACT_F32) memcpy(to, row, (size_t)n * sizeof *row);
    else if (x->kind == OURO_ACT_BF16) k->to_bf16(row, n, x->kpad, (uint16_t *)(void *)to);
    else k->to_s8(row, n, x->kpad, (int8_t *)to, x->scale + (size_t)lane * (size_t)(x->kpad / OURO_GROUP),
                  x->sum + (size_t)lane * (size_t)(x->kpad / OURO_GROUP4));
}

/* RoPE angles in f32 (MODEL section 2): pos * base^(-2i/dh), then cos and sin */
static void angles_of(const ouro_model *m, int pos, float *cosine, float *sine)
{
    for (int i = 0; i < m->config.d_head / 2; i++) {
        float angle = (float)pos * m->rope_inv_freq[i];
        cosine[i] = (float)cos((double)angle);
        sine[i] = (float)sin((double)angle);
    }
}

void ouro_block_angles(crew *c, const ouro_lane *lanes, int n)
{
    int begin, end, dh = c->ws->model->config.d_head;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 4, &begin, &end);)
        for (int i = begin; i < end; i++) {
            float *row = c->ws->rope + (size_t)i * (size_t)dh;
            angles_of(c->ws->model, lanes[i].pos, row, row + dh / 2);
        }
}

void ouro_block_close(ouro_workspace *ws, const ouro_lane *lane, int i, int layer)
{
    const ouro_config *g = &ws->model->config;
    ws->model->kernels->add_rmsnorm(lane->h, ws->y + (size_t)i * ouro_y_stride(g),
                                    ws->model->layers[layer].ln2_post, g->eps, g->d_model);
}

/* x_model = RMS(h; weight), prepared; ws->y's row serves as scratch (its content is already added) */
static void norm_to_acts(ouro_workspace *ws, const ouro_lane *lane, int i, const float *weight)
{
    const ouro_config *g = &ws->model->config;
    float *row = ws->y + (size_t)i * ouro_y_stride(g);
    ws->model->kernels->rmsnorm(lane->h, weight, g->eps, g->d_model, row);
    ouro_prepare(ws->model->kernels, &ws->x_model, i, row, g->d_model);
}

static void phase_enter(crew *c, const ouro_lane *lanes, int n, ouro_place at)
{
    int begin, end;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            if (at.slot > lanes[i].first_layer) ouro_block_close(c->ws, &lanes[i], i, at.before);
            norm_to_acts(c->ws, &lanes[i], i, c->ws->model->layers[at.layer].ln1);
        }
}

void ouro_block_rope(ouro_workspace *ws, int i, int head)
{
    const ouro_config *g = &ws->model->config;
    const float *angle = ws->rope + (size_t)i * (size_t)g->d_head;
    float *x = ws->qkv + (size_t)i * ouro_qkv_stride(g) + (size_t)head * (size_t)ouro_head_pad(g);
    ws->model->kernels->rope(x, angle, angle + g->d_head / 2, g->d_head);
}

/* lanes from i on whose keys stand side by side in one tile of a page */
static int run_of(const ouro_lane *lanes, int i, int n)
{
    int end = i + 1;
    while (end < n && !lanes[i].side && !lanes[end].side && lanes[end].pages == lanes[i].pages
           && lanes[end].pos == lanes[i].pos + end - i && lanes[end].pos % OURO_TILE) end++;
    return end - i;
}

void ouro_block_store(ouro_workspace *ws, const ouro_lane *lanes, int n, int slot, int head)
{
    const ouro_config *g = &ws->model->config;
    const ouro_kv_layout *y = &ws->kv;
    size_t pad = (size_t)ouro_head_pad(g), stride = ouro_qkv_stride(g);
    for (int i = 0, run; i < n; i += run) {
        const ouro_lane *lane = &lanes[i];
        float *k = ws->qkv + (size_t)i * stride + (size_t)(g->n_heads + head) * pad;
        float *v = k + (size_t)g->n_kv_heads * pad;
        run = run_of(lanes, i, n);
        if (lane->side)
            ouro_side_store(y, ouro_side_row(y, lane->side->rows, slot, head, 0),
                            ouro_side_row(y, lane->side->rows, slot, head, 1), k, v);
        else
            ouro_kv_store_run(y, ws->model->kernels, ouro_kv_block(y, lane->pages[lane->pos / OURO_BLOCK], slot, head),
                              lane->pos % OURO_BLOCK, run, k, v, stride);
    }
}

/* One unit is a head of queries, keys or values. Whoever does the second of a key head and its value head stores both: a
 * mark per pair is set by the first and cleared by the second. Lanes from n_states on need no queries. */
static void phase_qkv(crew *c, const ouro_lane *lanes, int n, int n_states, ouro_place at)
{
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_matrix *qkv = &ws->model->layers[at.layer].qkv;
    int begin, end, tiles = ouro_head_tiles(g), rotated = g->n_heads + g->n_kv_heads;
    size_t stride = ouro_qkv_stride(g);
    for (ouro_work *w = crew_phase(c, rotated + g->n_kv_heads); crew_take(c, w, 1, &begin, &end);) {
        int rows = begin < g->n_heads ? n_states : n, pair = begin < rotated ? begin - g->n_heads : begin - rotated;
        ouro_product(ws, c->thread, qkv, begin * tiles, (begin + 1) * tiles, &ws->x_model, rows, ws->qkv, stride);
        for (int i = 0; begin < rotated && i < rows; i++) ouro_block_rope(ws, i, begin);
        if (pair >= 0 && atomic_fetch_xor(&ws->half_done[pair], 1)) ouro_block_store(ws, lanes, n, at.slot, pair);
    }
}

static void phase_attend(crew *c, const ouro_lane *lanes, int n, int n_spans, int slot)
{
    int begin, end, most = ouro_attend_at_once(n, n_spans);
    for (ouro_work *w = crew_phase(c, n_spans * c->ws->model->config.n_kv_heads); crew_take(c, w, most, &begin, &end);)
        ouro_attend(c->ws, lanes, begin, end, slot, c->thread);
}

void ouro_block_prepare(crew *c, ouro_acts *x, const float *rows, size_t stride, int cols, int n)
{
    int begin, end;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++)
            ouro_prepare(c->ws->model->kernels, x, i, rows + (size_t)i * stride, cols);
}

/* Tiles are dealt out in units that the kernels multiply at once, so that none is left over at the end of what a thread
 * took: two, or four for few lanes, where a thread has enough of them. Many lanes take several units at a time. */
#define FEW_LANES 16
static int unit_of(const crew *c, int n, int tiles)
{
    if (n >= FEW_LANES) return 2;
    return tiles >= 32 * c->n_threads ? 4 : tiles >= 16 * c->n_threads ? 2 : 1;
}
static int units_at_once(int n) { return n < FEW_LANES ? 1 : 4; }

void ouro_block_product(crew *c, const ouro_matrix *m, const ouro_acts *x, int n, float *out, size_t stride)
{
    int begin, end, unit = unit_of(c, n, m->tiles), units = (m->tiles + unit - 1) / unit;
    for (ouro_work *w = crew_phase(c, units); crew_take(c, w, units_at_once(n), &begin, &end);)
        ouro_product(c->ws, c->thread, m, begin * unit, end < units ? end * unit : m->tiles, x, n, out, stride);
}

static void phase_middle(crew *c, const ouro_lane *lanes, int n, const ouro_layer *y)
{
    int begin, end;
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            ws->model->kernels->add_rmsnorm(lanes[i].h, ws->y + (size_t)i * ouro_y_stride(g), y->ln1_post, g->eps,
                                            g->d_model);
            norm_to_acts(ws, &lanes[i], i, y->ln2);
        }
}

static void phase_swiglu(crew *c, const ouro_layer *y, int n)
{
    int begin, end;
    ouro_workspace *ws = c->ws;
    int pairs = y->gate_up.tiles / 2, unit = (unit_of(c, n, y->gate_up.tiles) + 1) / 2, units = (pairs + unit - 1) / unit;
    for (ouro_work *w = crew_phase(c, units); crew_take(c, w, units_at_once(n), &begin, &end);)
        ouro_product_swiglu(ws, c->thread, &y->gate_up, begin * unit, end < units ? end * unit : pairs, n);
}

void ouro_block(crew *c, const ouro_lane *lanes, int n, int n_states, int n_spans, ouro_place at)
{
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_layer *y = &ws->model->layers[at.layer];
    size_t z = (size_t)g->n_heads * (size_t)g->d_head, y_stride = ouro_y_stride(g);
    uint64_t want = ouro_wanted(ws, at.layer), before = at.before >= 0 ? ouro_wanted(ws, at.before) : 0;
    if ((want & OURO_SEES_ENTER) || (before & OURO_SEES_CLOSE)) ouro_seen_enter(c, lanes, n, at);
    else phase_enter(c, lanes, n, at);
    if (want & OURO_SEES_QKV) ouro_seen_qkv(c, lanes, n, at);
    else phase_qkv(c, lanes, n, n_states, at);
    if ((n = n_states) == 0) return;
    if (want & OURO_ATTENTION_POINTS) ouro_seen_attend(c, lanes, n, n_spans, at);
    else phase_attend(c, lanes, n, n_spans, at.slot);
    if (want & OURO_BIT(OURO_P_Z)) ouro_seen_z(c, lanes, n, at.layer);
    else ouro_block_prepare(c, &ws->x_heads, ws->z, z, (int)z, n);
    ouro_block_product(c, &y->o, &ws->x_heads, n, ws->y, y_stride);
    if (want & OURO_BIT(OURO_P_RESULT)) ouro_seen_result(c, lanes, n, at.layer);
    if (want & OURO_SEES_MIDDLE) ouro_seen_middle(c, lanes, n, at.layer);
    else phase_middle(c, lanes, n, y);
    if (want & OURO_SEES_MLP) ouro_seen_mlp(c, lanes, n, at.layer);
    else phase_swiglu(c, y, n);
    if (ws->mlp) ouro_block_prepare(c, &ws->x_mlp, ws->mlp, ouro_mlp_stride(g), g->d_mlp, n);
    ouro_block_product(c, &y->down, &ws->x_mlp, n, ws->y, y_stride);
}
