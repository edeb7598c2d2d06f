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

/* Blocks of which the values are one chain of products, where a unit has many rows: their sums stay in registers meanwhile. */
#define CHAIN 4
#define CHAIN_ROWS 13            /* fewer rows are worked on all at once as it is */

_Static_assert(OURO_ATTEND_ROWS >= OURO_MAX_GROUP, "the query heads of a kv head of one lane are a unit");

/* Per-thread scratch, each part 64-byte aligned. */
typedef struct scratch {
    ouro_acts q;                 /* [ROWS] queries, f32: scores are where rounding would show most */
    ouro_acts p;                 /* [CHAIN][ROWS] probabilities (cols 64), f32 or bf16 */
    float *s;                    /* [ROWS][64] f32 */
    float *o;                    /* [ROWS][head_pad] f32 */
    float *m, *l;                /* [ROWS] running maximum and sum */
    float *alpha;                /* [CHAIN][ROWS] what a block makes of the outputs before */
    int *visible;                /* [ROWS] positions of the block that a row sees */
    uint16_t *expanded;          /* [CHAIN] the keys, then the values, of an int8 block as bf16 */
    size_t expanded_elements;    /* of each */
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

static void acts_at(ouro_acts *x, cutter *at, ouro_act_kind kind, int cols, size_t rows)
{
    memset(x, 0, sizeof *x);
    x->kind = (int)kind;
    x->kpad = cols;
    x->stride = ((((size_t)cols * (kind == OURO_ACT_F32 ? 4 : 2) + 63) / 64) | 1) * 64;
    x->data = take(at, x->stride * rows);
}

/* Cuts scratch from `base`; returns the bytes it takes. */
static size_t cut_scratch(const ouro_workspace *ws, uint8_t *base, scratch *t)
{
    const ouro_kv_layout *y = &ws->kv;
    ouro_act_kind kind = y->dtype == OURO_KV_F32 ? OURO_ACT_F32 : OURO_ACT_BF16;
    cutter at = {base, 0};
    acts_at(&t->q, &at, OURO_ACT_F32, y->k_pad, OURO_ATTEND_ROWS);
    acts_at(&t->p, &at, kind, OURO_BLOCK, CHAIN * OURO_ATTEND_ROWS);
    t->s = take(&at, OURO_ATTEND_ROWS * OURO_BLOCK * sizeof(float));
    t->o = take(&at, OURO_ATTEND_ROWS * (size_t)ouro_head_pad(&ws->model->config) * sizeof(float));
    t->m = take(&at, OURO_ATTEND_ROWS * sizeof(float));
    t->l = take(&at, OURO_ATTEND_ROWS * sizeof(float));
    t->alpha = take(&at, CHAIN * OURO_ATTEND_ROWS * sizeof(float));
    t->visible = take(&at, OURO_ATTEND_ROWS * sizeof(int));
    t->expanded_elements = y->k_elements > y->v_elements ? y->k_elements : y->v_elements;
    t->expanded = take(&at, CHAIN * t->expanded_elements * sizeof(uint16_t));
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

/* What one thread works on at once: the rows of a span at `heads` kv heads from `head` on. Row r of the h-th of them is row
 * h * rows + r of the scratch. */
typedef struct unit {
    ouro_workspace *ws;
    const ouro_lane *lanes;
    ouro_span span;
    int slot, head, heads;
    int per_kv, rows;            /* query heads of a kv head; rows of one head: lanes times per_kv */
    int chained;                 /* blocks worked on at once */
    scratch t;
} unit;

static unit unit_of(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread)
{
    const ouro_config *c = &ws->model->config;
    unit u = {.ws = ws, .lanes = lanes, .span = span, .slot = slot, .head = head, .heads = 1, .chained = 1};
    u.per_kv = c->n_heads / c->n_kv_heads;
    u.rows = (span.end - span.begin) * u.per_kv;
    cut_scratch(ws, ws->scratch[thread], &u.t);
    return u;
}

static const ouro_lane *last_lane(const unit *u) { return &u->lanes[u->span.end - 1]; }
static int last_block(const unit *u) { return last_lane(u)->pos / OURO_BLOCK; }

/* the query of row r of the h-th head, or what comes of it: its place in rows of [lanes][stride] that hold query heads of
 * `width` each */
static size_t query_at(const unit *u, int h, int r, size_t stride, int width)
{
    return (size_t)(u->span.begin + r / u->per_kv) * stride + (size_t)((u->head + h) * u->per_kv + r % u->per_kv) * (size_t)width;
}

static void load_queries(unit *u)
{
    const ouro_config *c = &u->ws->model->config;
    scratch *t = &u->t;
    int pad = ouro_head_pad(c);
    for (int h = 0, row = 0; h < u->heads; h++)
        for (int r = 0; r < u->rows; r++, row++) {
            uint8_t *to = t->q.data + (size_t)row * t->q.stride;
            memset(to, 0, (size_t)t->q.kpad * sizeof(float));
            memcpy(to, u->ws->qkv + query_at(u, h, r, ouro_qkv_stride(c), pad), (size_t)c->d_head * sizeof(float));
            t->m[row] = -INFINITY;
            t->l[row] = 0.0f;
        }
    memset(t->o, 0, (size_t)(u->heads * u->rows) * (size_t)pad * sizeof(float));
}

static float score_scale(const ouro_config *c) { return 1.0f / sqrtf((float)c->d_head); }

/* Block b of the span's pages at the h-th head, what is read after it, and the rows of the scratch that see any of it. */
typedef struct block_view {
    const uint8_t *block, *next;
    int b, first, end;
    int at;                      /* in the chain */
    int lane;                    /* of the first of these rows */
    int k_tiles;                 /* of the keys that any row sees */
} block_view;

static block_view view_block(unit *u, int b, int h, int at)
{
    const ouro_lane *last = last_lane(u);
    const ouro_kv_layout *y = &u->ws->kv;
    int head = u->head + h;
    block_view v = {.block = visible_block(u->ws, last, b, u->slot, head, u->t.overlaid), .b = b, .at = at, .first = h * u->rows,
                    .end = (h + 1) * u->rows, .lane = u->span.begin};
    v.k_tiles = ouro_round_up(visible_in(last, b), OURO_TILE) / OURO_TILE;
    int page = b, then = head + 1;
    if (h + 1 == u->heads) {
        page += u->chained;
        if (page > last_block(u)) page -= last_block(u) + 1;
        else then = u->head;
    }
    if (then < y->n_kv_heads && last->pages[page]) v.next = ouro_kv_block(y, last->pages[page], u->slot, then);
    for (; u->lanes[v.lane].pos < b * OURO_BLOCK; v.lane++) v.first += u->per_kv;
    for (int row = v.first, i = v.lane; row < v.end; i++)
        for (int j = 0; j < u->per_kv; j++) u->t.visible[row++] = visible_in(&u->lanes[i], b);
    return v;
}

static uint16_t *expanded_at(const unit *u, int at) { return u->t.expanded + (size_t)at * u->t.expanded_elements; }

static void block_scores(unit *u, const block_view *y)
{
    const ouro_kernels *kernels = u->ws->model->kernels;
    const float *k_scale = ouro_kv_k_scales(&u->ws->kv, y->block);
    ouro_matrix k;
    ouro_kv_view_k(&u->ws->kv, kernels, y->block, y->end - y->first, expanded_at(u, y->at), &k);
    kernels->matmul[k.format][u->t.q.kind](&k, 0, y->k_tiles, &u->t.q, y->first, y->end, u->t.s, OURO_BLOCK, NULL);
    int seen = y->k_tiles * OURO_TILE;
    for (int row = y->first; row < y->end; row++) {
        float *s = u->t.s + (size_t)row * OURO_BLOCK;
        memset(s + seen, 0, (size_t)(OURO_BLOCK - seen) * sizeof *s);
        if (k_scale) kernels->scale_scores(s, k_scale);
    }
}

/* scores of rows [first, end) to probabilities and alpha */
static void soften(unit *u, const block_view *y, int first, int end, float scale)
{
    const ouro_kernels *kernels = u->ws->model->kernels;
    const float *v_scale = ouro_kv_v_scales(&u->ws->kv, y->block);
    scratch *t = &u->t;
    size_t row_at = (size_t)y->at * OURO_ATTEND_ROWS + (size_t)first;
    uint8_t *p = t->p.data + row_at * t->p.stride;
    kernels->softmax[t->p.kind](t->s + (size_t)first * OURO_BLOCK, end - first, t->visible + first, scale, t->m + first,
                                t->l + first, t->alpha + row_at, p, t->p.stride);
    for (int row = first; v_scale && row < end; row++, p += t->p.stride) kernels->scale_weights((uint16_t *)(void *)p, v_scale);
}

static void view_values(unit *u, const block_view *y, ouro_matrix *v)
{
    ouro_kv_view_v(&u->ws->kv, u->ws->model->kernels, y->block, y->next, y->end - y->first, expanded_at(u, y->at), v);
}

/* o = o alpha + V p for the n blocks of a chain, y the last of them */
static void chain_values(unit *u, const block_view *y, const ouro_matrix *v, int n)
{
    scratch *t = &u->t;
    u->ws->model->kernels->chain(v, n, &t->p, OURO_ATTEND_ROWS * t->p.stride, y->first, y->end, t->o,
                                 (size_t)ouro_head_pad(&u->ws->model->config), t->alpha, OURO_ATTEND_ROWS);
}

static void block_values(unit *u, const block_view *y)
{
    ouro_matrix v;
    view_values(u, y, &v);
    chain_values(u, y, &v, 1);
}

/* z = o / l for every row */
static void store_z(unit *u)
{
    const ouro_config *c = &u->ws->model->config;
    size_t stride = (size_t)c->n_heads * (size_t)c->d_head;
    for (int h = 0, row = 0; h < u->heads; h++)
        for (int r = 0; r < u->rows; r++, row++) {
            float *z = u->ws->z + query_at(u, h, r, stride, c->d_head);
            memcpy(z, u->t.o + (size_t)row * (size_t)ouro_head_pad(c), (size_t)c->d_head * sizeof(float));
            u->ws->model->kernels->scale_row(z, 1.0f / u->t.l[row], c->d_head);
        }
}

/* how many blocks from b on are one chain: of those that all rows see */
static int chain_from(const unit *u, int b)
{
    int whole = u->lanes[u->span.begin].pos / OURO_BLOCK - b + 1;
    if (u->heads > 1 || u->rows < CHAIN_ROWS || last_lane(u)->side || whole < 1) return 1;
    return whole < CHAIN ? whole : CHAIN;
}

/* Block by block, heads inside: what a page holds of them is read in one go. */
static void attend(unit *u)
{
    float scale = score_scale(&u->ws->model->config);
    load_queries(u);
    for (int b = 0; b <= last_block(u); b += u->chained) {
        u->chained = chain_from(u, b);
        for (int h = 0; h < u->heads; h++) {
            ouro_matrix v[CHAIN];
            block_view y = {0};
            for (int i = 0; i < u->chained; i++) {
                y = view_block(u, b + i, h, i);
                block_scores(u, &y);
                soften(u, &y, y.first, y.end, scale);
                view_values(u, &y, &v[i]);
            }
            chain_values(u, &y, v, u->chained);
        }
    }
    store_z(u);
}

/* Eight heads (256 KiB of a page) one behind the other are read faster than four; a thread takes a quarter of this at the least. */
#define UNITS_AT_ONCE 32

int ouro_attend_at_once(int n, int n_spans) { return n == n_spans ? UNITS_AT_ONCE : 1; }

void ouro_attend(ouro_workspace *ws, const ouro_lane *lanes, int begin, int end, int slot, int thread)
{
    for (int heads = ws->model->config.n_kv_heads; begin < end;) {
        unit u = unit_of(ws, lanes, ws->spans[begin / heads], slot, begin % heads, thread);
        int fit = OURO_ATTEND_ROWS / u.rows, left = end - begin < heads - u.head ? end - begin : heads - u.head;
        u.heads = fit < left ? fit : left;
        attend(&u);
        begin += u.heads;
    }
}

/* ---- the same in pieces, for passes whose scores or patterns are looked at ------------------------------------- */

/* a row of the scratch in the [lanes][H][sources] buffers, from block b on */
static float *seen_row(const unit *u, float *base, int row, int b)
{
    size_t sources = u->ws->seen->sources, lane = (size_t)u->ws->model->config.n_heads * sources;
    return base + query_at(u, row / u->rows, row % u->rows, lane, (int)sources) + (size_t)b * OURO_BLOCK;
}

void ouro_attend_scores(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread)
{
    unit u = unit_of(ws, lanes, span, slot, head, thread);
    float scale = score_scale(&ws->model->config);
    load_queries(&u);
    for (int b = 0; b <= last_block(&u); b++) {
        block_view y = view_block(&u, b, 0, 0);
        block_scores(&u, &y);
        for (int row = y.first; row < y.end; row++) {
            float *to = seen_row(&u, ws->seen->scores, row, b);
            for (int i = 0; i < OURO_BLOCK; i++) to[i] = u.t.s[(size_t)row * OURO_BLOCK + (size_t)i] * scale;
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
        float same = m, alpha;
        int visible = n - at < OURO_BLOCK ? n - at : OURO_BLOCK;
        kernels->softmax[OURO_ACT_F32](x + at, 1, &visible, 1.0f, &same, &l, &alpha, p + at, 0);
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
    t->l[row] = t->alpha[row] = 1.0f;
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
    unit u = unit_of(ws, lanes, span, slot, head, thread);
    load_queries(&u);
    for (int b = 0; b <= last_block(&u); b++) {
        block_view y = view_block(&u, b, 0, 0);
        const float *v_scale = ouro_kv_v_scales(&ws->kv, y.block);
        for (int row = y.first; row < y.end; row++) {
            int taken = changed && changed[y.lane + (row - y.first) / u.per_kv];
            const float *from = seen_row(&u, taken ? ws->seen->pattern : ws->seen->scores, row, b);
            if (taken) {
                take_pattern(ws, &u.t, row, from, u.t.visible[row], v_scale);
            } else {
                memcpy(u.t.s + (size_t)row * OURO_BLOCK, from, OURO_BLOCK * sizeof(float));
                soften(&u, &y, row, row + 1, 1.0f);
            }
        }
        block_values(&u, &y);
    }
    store_z(&u);
}
