/* block.c - one shared transformer layer over all lanes of a pass, by all threads of a crew.
 *
 *   a = Attn(RMS(h; ln1)),           h += RMS(a; ln1_post)
 *   m = Wd(silu(Wg u) * Wu u),       h += RMS(m; ln2_post),     u = RMS(h; ln2)
 *
 * A layer is a row of phases; a phase is split by lanes (norms), by heads (q/k/v, attention) or by output tiles
 * (products), never along a sum, so the threads leave no trace in the bits.
 */
#include "model/block.h"

#include <math.h>
#include <string.h>

#include "model/attention.h"
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

static void phase_enter(crew *c, const ouro_lane *lanes, int n, int layer)
{
    int begin, end;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            if (layer > 0) ouro_block_close(c->ws, &lanes[i], i, layer - 1);
            norm_to_acts(c->ws, &lanes[i], i, c->ws->model->layers[layer].ln1);
        }
}

/* rope and store the key and value that a lane just made on one kv head */
static void store_kv(ouro_workspace *ws, const ouro_lane *lane, int i, int layer, int head)
{
    const ouro_config *g = &ws->model->config;
    const ouro_kv_layout *y = &ws->kv;
    size_t pad = (size_t)ouro_head_pad(g);
    float *k = ws->qkv + (size_t)i * ouro_qkv_stride(g) + (size_t)(g->n_heads + head) * pad;
    float *v = k + (size_t)g->n_kv_heads * pad;
    const float *angle = ws->rope + (size_t)i * (size_t)g->d_head;
    ws->model->kernels->rope(k, angle, angle + g->d_head / 2, g->d_head);
    if (lane->side)
        ouro_side_store(y, ouro_side_row(y, lane->side->rows, layer, head, 0),
                        ouro_side_row(y, lane->side->rows, layer, head, 1), k, v);
    else
        ouro_kv_store(y, ouro_kv_block(y, lane->pages[lane->pos / OURO_BLOCK], layer, head),
                      lane->pos % OURO_BLOCK, k, v);
}

/* One unit is a query head, or a key head with its value head. */
static void phase_qkv(crew *c, const ouro_lane *lanes, int n, int layer)
{
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_matrix *qkv = &ws->model->layers[layer].qkv;
    int begin, end, tiles = ouro_head_tiles(g);
    size_t stride = ouro_qkv_stride(g);
    for (ouro_work *w = crew_phase(c, g->n_heads + g->n_kv_heads); crew_take(c, w, 1, &begin, &end);) {
        ouro_product(ws, c->thread, qkv, begin * tiles, (begin + 1) * tiles, &ws->x_model, n, ws->qkv, stride);
        if (begin < g->n_heads) {
            for (int i = 0; i < n; i++) {
                const float *angle = ws->rope + (size_t)i * (size_t)g->d_head;
                ws->model->kernels->rope(ws->qkv + (size_t)i * stride + (size_t)begin * (size_t)ouro_head_pad(g),
                                         angle, angle + g->d_head / 2, g->d_head);
            }
            continue;
        }
        int value = begin + g->n_kv_heads;
        ouro_product(ws, c->thread, qkv, value * tiles, (value + 1) * tiles, &ws->x_model, n, ws->qkv, stride);
        for (int i = 0; i < n; i++) store_kv(ws, &lanes[i], i, layer, begin - g->n_heads);
    }
}

static void phase_attend(crew *c, const ouro_lane *lanes, int n_spans, int layer)
{
    int begin, end, heads = c->ws->model->config.n_kv_heads;
    for (ouro_work *w = crew_phase(c, n_spans * heads); crew_take(c, w, 1, &begin, &end);)
        ouro_attend(c->ws, lanes, c->ws->spans[begin / heads], layer, begin % heads, c->thread);
}

static void phase_prepare(crew *c, ouro_acts *x, const float *rows, size_t stride, int cols, int n)
{
    int begin, end;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++)
            ouro_prepare(c->ws->model->kernels, x, i, rows + (size_t)i * stride, cols);
}

/* tiles dealt out at once: few lanes want fine balance, many want reuse of what is in cache */
static int tile_chunk(int n) { return n < 16 ? 4 : 8; }

static void phase_product(crew *c, const ouro_matrix *m, const ouro_acts *x, int n)
{
    int begin, end;
    for (ouro_work *w = crew_phase(c, m->tiles); crew_take(c, w, tile_chunk(n), &begin, &end);)
        ouro_product(c->ws, c->thread, m, begin, end, x, n, c->ws->y, ouro_y_stride(&c->ws->model->config));
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
    for (ouro_work *w = crew_phase(c, y->gate_up.tiles / 2); crew_take(c, w, tile_chunk(n) / 2, &begin, &end);)
        ouro_product_swiglu(ws, c->thread, &y->gate_up, begin, end, n);
}

void ouro_block(crew *c, const ouro_lane *lanes, int n, int n_spans, int layer)
{
    ouro_workspace *ws = c->ws;
    const ouro_config *g = &ws->model->config;
    const ouro_layer *y = &ws->model->layers[layer];
    size_t z = (size_t)g->n_heads * (size_t)g->d_head;
    phase_enter(c, lanes, n, layer);
    phase_qkv(c, lanes, n, layer);
    phase_attend(c, lanes, n_spans, layer);
    phase_prepare(c, &ws->x_heads, ws->z, z, (int)z, n);
    phase_product(c, &y->o, &ws->x_heads, n);
    phase_middle(c, lanes, n, y);
    phase_swiglu(c, y, n);
    if (ws->mlp) phase_prepare(c, &ws->x_mlp, ws->mlp, ouro_mlp_stride(g), g->d_mlp, n);
    phase_product(c, &y->down, &ws->x_mlp, n);
}
