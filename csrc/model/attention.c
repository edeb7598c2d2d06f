/* attention.c - causal attention over blocks of 64 positions, online softmax, blocks merged in ascending order.
 *
 *   s = K q,  x = s / sqrt(d_head),  m' = max(m, x),  l = l exp(m - m') + sum exp(x - m'),
 *   o = o exp(m - m') + V exp(x - m'),  z = o / l
 *
 * A row's blocks and their order depend on its position alone, and rows never meet, so the result has the same bits
 * whether a lane is attended alone or with others. Rows of a span are lanes (ascending position) times the query heads
 * that share the kv head; products over them are the packed-tile kernels. A speculative lane's own key and those of
 * its guessed ancestors are laid over a copy of the block they belong to.
 */
#include "model/attention.h"

#include <math.h>
#include <string.h>

#include "kernels/math.h"
#include "model/seen.h"

/* Per-thread scratch, each part 64-byte aligned. */
typedef struct scratch {
    ouro_acts q;                 /* [ROWS] queries, f32: scores are where rounding would show most */
    ouro_acts p;                 /* [ROWS] probabilities (cols 64), f32 or bf16 */
    float *s;                    /* [ROWS][64] f32 */
    float *o;                    /* [ROWS][head_pad] f32 */
    float *m, *l;                /* [ROWS] running maximum and sum */
    uint16_t *expanded;          /* the keys, then the values, of an int8 block as bf16 */
    uint8_t *overlaid;           /* a block with side rows laid over it */
} scratch;

/* Hands out aligned parts of base; with base NULL it only counts. */
typedef struct cutter { uint8_t *base; size_t used; } cutter;

static void *take(cutter *c, size_t bytes)
{
    size_t at = c->used;
    c->used += (bytes + 63) & ~(size_t)63;
    return c->base ? c->base + at : NULL;
}

static void acts_at(ouro_acts *x, cutter *at, ouro_act_kind kind, int cols)
{
    memset(x, 0, sizeof *x);
    x->kind = (int)kind;
    x->kpad = cols;
    x->stride = ((((size_t)cols * (kind == OURO_ACT_F32 ? 4 : 2) + 63) / 64) | 1) * 64;
    x->data = take(at, x->stride * OURO_ATTEND_ROWS);
}

/* Cuts scratch from `base`; returns the bytes it takes. */
static size_t cut_scratch(const ouro_workspace *ws, uint8_t *base, scratch *t)
{
    const ouro_kv_layout *y = &ws->kv;
    ouro_act_kind kind = y->dtype == OURO_KV_F32 ? OURO_ACT_F32 : OURO_ACT_BF16;
    cutter at = {base, 0};
    acts_at(&t->q, &at, OURO_ACT_F32, y->k_pad);
    acts_at(&t->p, &at, kind, OURO_BLOCK);
    t->s = take(&at, OURO_ATTEND_ROWS * OURO_BLOCK * sizeof(float));
    t->o = take(&at, OURO_ATTEND_ROWS * (size_t)ouro_head_pad(&ws->model->config) * sizeof(float));
    t->m = take(&at, OURO_ATTEND_ROWS * sizeof(float));
    t->l = take(&at, OURO_ATTEND_ROWS * sizeof(float));
    t->expanded = take(&at, (y->k_elements > y->v_elements ? y->k_elements : y->v_elements) * sizeof(uint16_t));
    t->overlaid = take(&at, y->block_bytes);
    return at.used;
}

size_t ouro_attention_scratch_bytes(const ouro_workspace *ws)
{
    scratch t;
    return cut_scratch(ws, NULL, &t);
}

int ouro_attention_spans(const ouro_lane *lanes, int n, int heads_per_kv, ouro_span *spans)
{
    int most = OURO_ATTEND_ROWS / heads_per_kv, count = 0;
    for (int i = 0; i < n; i++) {
        const ouro_span *last = count ? &spans[count - 1] : NULL;
        int joins = last && i - last->begin < most && !lanes[i].side && !lanes[i - 1].side
                    && lanes[i].pages == lanes[i - 1].pages && lanes[i].pos == lanes[i - 1].pos + 1
                    && lanes[i].first_layer == lanes[i - 1].first_layer && lanes[i].keys_only == lanes[i - 1].keys_only;
        if (joins) spans[count - 1].end = i + 1;
        else spans[count++] = (ouro_span){i, i + 1};
    }
    return count;
}

/* positions of block b that the lane sees */
static int visible_in(const ouro_lane *lane, int b)
{
    int visible = lane->pos - b * OURO_BLOCK + 1;
    return visible < OURO_BLOCK ? visible : OURO_BLOCK;
}

/* The block with the side rows of the lane's chain that fall into it, or the page's own block when none do. */
static const uint8_t *visible_block(const ouro_workspace *ws, const ouro_lane *lane, int b, int layer, int head,
                                    uint8_t *copy)
{
    const ouro_kv_layout *y = &ws->kv;
    const uint8_t *block = lane->pages[b] ? ouro_kv_block(y, lane->pages[b], layer, head) : NULL;
    int copied = 0;
    for (const ouro_side *s = lane->side; s; s = s->parent) {
        if (s->pos / OURO_BLOCK != b) continue;
        if (!copied) ouro_kv_copy_first(y, copy, block, visible_in(lane, b));
        copied = 1;
        ouro_side_to_block(y, copy, s->pos % OURO_BLOCK, ouro_side_row(y, s->rows, layer, head, 0),
                           ouro_side_row(y, s->rows, layer, head, 1));
    }
    return copied ? copy : block;
}

static void load_queries(const ouro_workspace *ws, ouro_span span, int head, int per_kv, scratch *t)
{
    const ouro_config *c = &ws->model->config;
    int row = 0, pad = ouro_head_pad(c);
    for (int i = span.begin; i < span.end; i++)
        for (int j = 0; j < per_kv; j++, row++) {
            const float *q = ws->qkv + (size_t)i * ouro_qkv_stride(c) + (size_t)(head * per_kv + j) * (size_t)pad;
            uint8_t *to = t->q.data + (size_t)row * t->q.stride;
            memset(to, 0, (size_t)t->q.kpad * sizeof(float));
            memcpy(to, q, (size_t)c->d_head * sizeof(float));
            t->m[row] = -INFINITY;
            t->l[row] = 0.0f;
        }
    memset(t->o, 0, (size_t)row * (size_t)pad * sizeof(float));
}

static float score_scale(const ouro_config *c) { return 1.0f / sqrtf((float)c->d_head); }

/* scores of one row to probabilities; the old output is scaled to the new maximum */
static void soften(const ouro_workspace *ws, scratch *t, int row, int visible, float scale, const float *v_scale)
{
    const ouro_kernels *kernels = ws->model->kernels;
    const ouro_config *c = &ws->model->config;
    float *s = t->s + (size_t)row * OURO_BLOCK, alpha;
    uint8_t *p = t->p.data + (size_t)row * t->p.stride;
    if (t->p.kind == OURO_ACT_F32)
        alpha = kernels->softmax_f32(s, visible, scale, &t->m[row], &t->l[row], (float *)(void *)p);
    else
        alpha = kernels->softmax_bf16(s, visible, scale, &t->m[row], &t->l[row], (uint16_t *)(void *)p);
    if (v_scale) kernels->scale_weights((uint16_t *)(void *)p, v_scale);
    if (alpha != 1.0f) kernels->scale_row(t->o + (size_t)row * (size_t)ouro_head_pad(c), alpha, ouro_head_pad(c));
}

/* Block b of the span's pages at one head, the block that is read after it, and the first row that sees any of it. */
typedef struct block_view {
    const uint8_t *block, *next;
    int b, first, rows;
    int k_tiles;                 /* of the keys that any row sees */
} block_view;

static block_view view_block(const ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int b, int slot, int head,
                             int per_kv, scratch *t)
{
    const ouro_lane *last = &lanes[span.end - 1];
    block_view y = {.block = visible_block(ws, last, b, slot, head, t->overlaid), .b = b, .rows = (span.end - span.begin) * per_kv};
    y.k_tiles = ouro_round_up(visible_in(last, b), OURO_TILE) / OURO_TILE;
    if (b < last->pos / OURO_BLOCK) {
        if (last->pages[b + 1]) y.next = ouro_kv_block(&ws->kv, last->pages[b + 1], slot, head);
    } else if (last->pages[0] && head + 1 < ws->kv.n_kv_heads) {
        y.next = ouro_kv_block(&ws->kv, last->pages[0], slot, head + 1);     /* what this thread is likely to read then */
    }
    while (lanes[span.begin + y.first / per_kv].pos < b * OURO_BLOCK) y.first += per_kv;
    return y;
}

static void block_scores(const ouro_workspace *ws, const block_view *y, scratch *t)
{
    const ouro_kernels *kernels = ws->model->kernels;
    const float *k_scale = ouro_kv_k_scales(&ws->kv, y->block);
    ouro_matrix k;
    ouro_kv_view_k(&ws->kv, kernels, y->block, t->expanded, &k);
    kernels->matmul[k.format][t->q.kind](&k, 0, y->k_tiles, &t->q, y->first, y->rows, t->s, OURO_BLOCK, 0);
    int seen = y->k_tiles * OURO_TILE;
    for (int row = y->first; row < y->rows; row++) {
        float *s = t->s + (size_t)row * OURO_BLOCK;
        memset(s + seen, 0, (size_t)(OURO_BLOCK - seen) * sizeof *s);
        if (k_scale) kernels->scale_scores(s, k_scale);
    }
}

static void block_values(const ouro_workspace *ws, const block_view *y, scratch *t)
{
    const ouro_kernels *kernels = ws->model->kernels;
    ouro_matrix v;
    ouro_kv_view_v(&ws->kv, kernels, y->block, y->next, t->expanded, &v);
    kernels->matmul[v.format][t->p.kind](&v, 0, v.tiles, &t->p, y->first, y->rows, t->o, (size_t)ouro_head_pad(&ws->model->config), 1);
}

static void merge_block(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int b, int slot, int head,
                        int per_kv, scratch *t)
{
    block_view y = view_block(ws, lanes, span, b, slot, head, per_kv, t);
    block_scores(ws, &y, t);
    for (int row = y.first; row < y.rows; row++)
        soften(ws, t, row, visible_in(&lanes[span.begin + row / per_kv], b), score_scale(&ws->model->config),
               ouro_kv_v_scales(&ws->kv, y.block));
    block_values(ws, &y, t);
}

/* z = o / l for every row of the span */
static void store_z(ouro_workspace *ws, ouro_span span, int head, int per_kv, const scratch *t)
{
    const ouro_config *c = &ws->model->config;
    int row = 0, pad = ouro_head_pad(c);
    for (int i = span.begin; i < span.end; i++)
        for (int j = 0; j < per_kv; j++, row++) {
            float *z = ws->z + (size_t)i * (size_t)(c->n_heads * c->d_head) + (size_t)((head * per_kv + j) * c->d_head);
            memcpy(z, t->o + (size_t)row * (size_t)pad, (size_t)c->d_head * sizeof(float));
            ws->model->kernels->scale_row(z, 1.0f / t->l[row], c->d_head);
        }
}

void ouro_attend(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread)
{
    const ouro_config *c = &ws->model->config;
    int per_kv = c->n_heads / c->n_kv_heads;
    scratch t;
    cut_scratch(ws, ws->scratch[thread], &t);
    load_queries(ws, span, head, per_kv, &t);
    for (int b = 0; b <= lanes[span.end - 1].pos / OURO_BLOCK; b++)
        merge_block(ws, lanes, span, b, slot, head, per_kv, &t);
    store_z(ws, span, head, per_kv, &t);
}

/* ---- the same in pieces, for passes whose scores or patterns are looked at ------------------------------------- */

/* row `row` of a span in the [lanes][H][sources] buffers */
static float *seen_row(const ouro_workspace *ws, float *base, ouro_span span, int head, int per_kv, int row)
{
    size_t lane = (size_t)(span.begin + row / per_kv), h = (size_t)(head * per_kv + row % per_kv);
    return base + (lane * (size_t)ws->model->config.n_heads + h) * ws->seen->sources;
}

void ouro_attend_scores(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread)
{
    const ouro_config *c = &ws->model->config;
    int per_kv = c->n_heads / c->n_kv_heads;
    float scale = score_scale(c);
    scratch t;
    cut_scratch(ws, ws->scratch[thread], &t);
    load_queries(ws, span, head, per_kv, &t);
    for (int b = 0; b <= lanes[span.end - 1].pos / OURO_BLOCK; b++) {
        block_view y = view_block(ws, lanes, span, b, slot, head, per_kv, &t);
        block_scores(ws, &y, &t);
        for (int row = y.first; row < y.rows; row++) {
            float *to = seen_row(ws, ws->seen->scores, span, head, per_kv, row) + b * OURO_BLOCK;
            for (int i = 0; i < OURO_BLOCK; i++) to[i] = t.s[(size_t)row * OURO_BLOCK + (size_t)i] * scale;
        }
    }
}

/* the largest of x [n]; sixteen at a time, which may come in any order */
static float largest(const float *x, int n)
{
    float m[16];
    for (int j = 0; j < 16; j++) m[j] = -INFINITY;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (; i < n; i++) m[0] = x[i] > m[0] ? x[i] : m[0];
    for (int j = 1; j < 16; j++) m[0] = m[j] > m[0] ? m[j] : m[0];
    return m[0];
}

/* p = exp(x - m) / l over one row of n scores, m its maximum, l the sum; p has room for whole blocks */
static void pattern_of(const ouro_kernels *kernels, const float *x, int n, float *p)
{
    float m = largest(x, n), l = 0.0f;
    for (int at = 0; at < n; at += OURO_BLOCK) {
        float same = m;
        kernels->softmax_f32(x + at, n - at < OURO_BLOCK ? n - at : OURO_BLOCK, 1.0f, &same, &l, p + at);
    }
    kernels->scale_row(p, 1.0f / l, n);
}

void ouro_attend_pattern(ouro_workspace *ws, const ouro_lane *lane, int i)
{
    size_t heads = (size_t)ws->model->config.n_heads, sources = ws->seen->sources;
    for (size_t h = 0; h < heads; h++) {
        size_t at = ((size_t)i * heads + h) * sources;
        pattern_of(ws->model->kernels, ws->seen->scores + at, lane->pos + 1, ws->seen->pattern + at);
    }
}

/* the first `visible` of a block of a given pattern, instead of a softmax */
static void take_pattern(const ouro_workspace *ws, scratch *t, int row, const float *p, int visible, const float *v_scale)
{
    float block[OURO_BLOCK] = {0};
    uint8_t *to = t->p.data + (size_t)row * t->p.stride;
    memcpy(block, p, (size_t)visible * sizeof *p);
    t->l[row] = 1.0f;
    if (t->p.kind == OURO_ACT_F32) {
        memcpy(to, block, sizeof block);
        return;
    }
    ws->model->kernels->to_bf16(block, OURO_BLOCK, OURO_BLOCK, (uint16_t *)(void *)to);
    if (v_scale) ws->model->kernels->scale_weights((uint16_t *)(void *)to, v_scale);
}

void ouro_attend_values(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread,
                        const uint8_t *changed)
{
    const ouro_config *c = &ws->model->config;
    int per_kv = c->n_heads / c->n_kv_heads;
    scratch t;
    cut_scratch(ws, ws->scratch[thread], &t);
    load_queries(ws, span, head, per_kv, &t);
    for (int b = 0; b <= lanes[span.end - 1].pos / OURO_BLOCK; b++) {
        block_view y = view_block(ws, lanes, span, b, slot, head, per_kv, &t);
        for (int row = y.first; row < y.rows; row++) {
            int i = span.begin + row / per_kv, visible = visible_in(&lanes[i], b), taken = changed && changed[i];
            const float *from = seen_row(ws, taken ? ws->seen->pattern : ws->seen->scores, span, head, per_kv, row) + b * OURO_BLOCK;
            const float *v_scale = ouro_kv_v_scales(&ws->kv, y.block);
            if (taken) {
                take_pattern(ws, &t, row, from, visible, v_scale);
            } else {
                memcpy(t.s + (size_t)row * OURO_BLOCK, from, OURO_BLOCK * sizeof(float));
                soften(ws, &t, row, visible, 1.0f, v_scale);
            }
        }
        block_values(ws, &y, &t);
    }
    store_z(ws, span, head, per_kv, &t);
}
