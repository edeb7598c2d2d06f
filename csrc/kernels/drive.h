/* drive.h - the products of the kernel table over the register blocks of blocks.h: which block, in which order.
 *
 * Tiles outside, lanes inside: a pair of tiles is read from memory once and then comes from the second-level cache
 * for every further group of lanes; lanes are taken in sets whose activations stay in the last-level cache's reach.
 * Groups of lanes are of nearly equal size (64 lanes are 6 groups of 10 or 11, not 5 of 12 and one of 4).
 */
#define V_CACHE ((size_t)2 << 20)       /* bytes of activations kept close while the tiles go by */
#define V_TOGETHER 48                   /* lanes of a fused product that wait for SwiGLU, at least V_LANES times the pairs at once */

/* Compilers take many minutes over sanitized blocks of the usual sizes. With this the same source makes small ones, which have the same
 * bits; csrc/tests run the usual ones under sanitizers. */
#ifdef OURO_SMALL_BLOCKS
#undef V_INSTANCES
#undef V_SIDE_INSTANCES
#undef V_S8_INSTANCES
#undef V_INT_INSTANCES
#undef V_FLOAT_LANES
#undef V_INT_LANES
#undef V_INT_ALONE
#undef V_S8_LANES
#define V_INSTANCES(X, kind) X(kind, 1, 1) X(kind, 1, 2) X(kind, 2, 1) X(kind, 2, 2)
#define V_SIDE_INSTANCES V_INSTANCES
#define V_S8_INSTANCES V_INSTANCES
#define V_INT_INSTANCES V_INSTANCES
#define V_FLOAT_LANES 2
#define V_INT_LANES 2
#define V_INT_ALONE 2
#define V_S8_LANES 2
#endif

#define V_INSTANCE_float(kind, T, L) static void V_NAME_OF(kind, T, L)(const v_job *j) { blocks_float(kind, T, L, j); }
#define V_INSTANCE_int(kind, T, L) static void V_NAME_OF(kind, T, L)(const v_job *j) { blocks_int(kind, T, L, j); }
#define V_INSTANCE_s8(kind, T, L) static void V_NAME_OF(kind, T, L)(const v_job *j) { blocks_s8(kind, T, L, j); }
#define V_NAME_OF(kind, T, L) block_##kind##_##T##_##L
V_INSTANCES(V_INSTANCE_float, V_F32)
V_INSTANCES(V_INSTANCE_float, V_MIXED)
V_INSTANCES(V_INSTANCE_float, V_BF16)
V_SIDE_INSTANCES(V_INSTANCE_float, V_SIDE_F32)
V_SIDE_INSTANCES(V_INSTANCE_float, V_SIDE_MIXED)
V_SIDE_INSTANCES(V_INSTANCE_float, V_SIDE_BF16)
V_S8_INSTANCES(V_INSTANCE_s8, V_S8_F32)
V_S8_INSTANCES(V_INSTANCE_s8, V_S8_BF16)
V_INT_INSTANCES(V_INSTANCE_int, V_INT8)
V_INT_INSTANCES(V_INSTANCE_int, V_INT4)

#define V_ENTRY(kind, T, L) [kind][T][L] = V_NAME_OF(kind, T, L),
static const v_block_fn block_table[V_KINDS][V_MAX_TILES + 1][V_LANES + 1] = {
    V_INSTANCES(V_ENTRY, V_F32) V_INSTANCES(V_ENTRY, V_MIXED) V_INSTANCES(V_ENTRY, V_BF16)
    V_SIDE_INSTANCES(V_ENTRY, V_SIDE_F32) V_SIDE_INSTANCES(V_ENTRY, V_SIDE_MIXED) V_SIDE_INSTANCES(V_ENTRY, V_SIDE_BF16)
    V_S8_INSTANCES(V_ENTRY, V_S8_F32) V_S8_INSTANCES(V_ENTRY, V_S8_BF16)
    V_INT_INSTANCES(V_ENTRY, V_INT8) V_INT_INSTANCES(V_ENTRY, V_INT4)
};

static v_kind kind_of(const ouro_matrix *w, const ouro_acts *x)
{
    if (w->format == OURO_INT8) return V_INT8;
    if (w->format == OURO_INT4) return V_INT4;
    if (w->format == OURO_S8) return x->kind == OURO_ACT_BF16 ? V_S8_BF16 : V_S8_F32;
    const int side = w->unit_bytes != 64;
    if (w->format == OURO_F32) return side ? V_SIDE_F32 : V_F32;
    if (x->kind == OURO_ACT_BF16) return side ? V_SIDE_BF16 : V_BF16;
    return side ? V_SIDE_MIXED : V_MIXED;
}

static int is_int(v_kind kind) { return kind == V_INT8 || kind == V_INT4; }
static int is_s8(v_kind kind) { return kind == V_S8_F32 || kind == V_S8_BF16; }

/* What does not change from block to block. In place: a job that is made and then copied waits for its stores. */
static void job_open(v_job *j, const ouro_matrix *w, const ouro_acts *x, v_kind kind, float *scratch)
{
    *j = (v_job){0};
    j->tile_bytes = w->tile_bytes;
    j->unit_bytes = w->unit_bytes;
    j->stride = x->stride;
    j->xs_stride = (size_t)(x->kpad / OURO_GROUP);
    j->scratch = scratch;
    int per_unit = kind == V_F32 || kind == V_SIDE_F32 || is_s8(kind) ? 1 : kind == V_INT8 ? OURO_GROUP : kind == V_INT4 ? OURO_GROUP4 : 2;
    j->units = w->kpad / per_unit;
    if (is_int(kind)) j->scale_bytes = ((size_t)j->units * 2 * OURO_TILE + 63) & ~(size_t)63;
}

static void job_at(v_job *j, const ouro_matrix *w, int tile, const ouro_acts *x, int lane)
{
    j->w = w->data + (size_t)tile * w->tile_bytes;
    j->x = x->data + (size_t)lane * x->stride;
    j->xs = x->scale ? x->scale + (size_t)lane * j->xs_stride : NULL;
    j->sum = x->sum ? x->sum + (size_t)lane * 2 * j->xs_stride : NULL;
}

/* any number of tiles times groups of lanes (1..V_LANES), by the blocks that exist, of at most `most` tiles */
static void run_blocks(v_job *j, v_kind kind, int tiles, int lanes, int most)
{
    while (tiles > 0) {
        int n = most < tiles ? most : tiles;
        n = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
        while (!block_table[kind][n][lanes]) n /= 2;
        block_table[kind][n][lanes](j);
        j->w += (size_t)n * j->tile_bytes;
        j->out += n * OURO_TILE;
        tiles -= n;
    }
}

/* lanes of a full group; how many groups there are */
static int group_lanes(v_kind kind) { return is_int(kind) ? V_INT_LANES : is_s8(kind) ? V_S8_LANES : V_FLOAT_LANES; }
static int groups_of(v_kind kind, int lanes)
{
    return lanes <= (is_int(kind) ? V_INT_ALONE : group_lanes(kind)) ? 1 : (lanes + group_lanes(kind) - 1) / group_lanes(kind);
}

/* End of the set of lanes that begins at `lane`: whole groups, as few sets as fit in V_CACHE, of nearly equal size. */
static int set_end(v_kind kind, const ouro_acts *x, int lane, int end)
{
    int groups = groups_of(kind, end - lane);
    if (groups == 1) return end;
    int fit = (int)(V_CACHE / x->stride) / group_lanes(kind);
    if (fit < 1) fit = 1;
    int sets = (groups + fit - 1) / fit;
    return sets == 1 ? end : lane + (groups + sets - 1) / sets * group_lanes(kind);
}

/* A set of lanes in groups of nearly equal size: the first `longer` have one lane more than the others. Worked out once a set:
 * a division between two blocks is long enough to be seen. */
typedef struct v_groups { int count, lanes, longer; } v_groups;

/* Successive groups of as many lanes each, for one call: where they are in the set, their first lane. */
typedef struct v_run { int at, lane, lanes, count; } v_run;

/* The run after r (the first after one of no groups), of at most `most` lanes or else of one group; 0 at the end. */
static int run_next(const v_groups *g, v_run *r, int most)
{
    r->at += r->count;
    r->lane += r->count * r->lanes;
    if (r->at == g->count) return 0;
    r->lanes = g->lanes + (r->at < g->longer);
    r->count = 1;
    if (r->at + 1 == g->count) return 1;
    int alike = (r->at < g->longer ? g->longer : g->count) - r->at, fit = most / r->lanes;
    r->count = fit < 1 ? 1 : fit < alike ? fit : alike;
    return 1;
}

static v_groups groups_in(v_kind kind, int lanes)
{
    int count = groups_of(kind, lanes);
    if (count == 1) return (v_groups){1, lanes, 0};
    return (v_groups){count, lanes / count, lanes % count};
}

/* Who asks memory for weights? A single group of lanes for its own, ahead of itself, when it is slower than memory. Of
 * several, each asks for a part of what comes next, and it is there when its turn comes: `tiles` more tiles or, where tiles
 * stand side by side and are soon read, the next matrix. */
static void job_asks(v_job *j, const ouro_matrix *w, v_kind kind, int tiles, int lanes)
{
    size_t groups = (size_t)groups_of(kind, lanes), steps = (size_t)(is_int(kind) ? j->units : j->units / 4);
    j->far = groups > 1 ? 0 : V_IS_SIDE(kind) ? V_SIDE_AHEAD : V_AHEAD(kind, lanes);
    j->soon_lines = 0;
    j->soon_part = 0;
    if (groups == 1) return;
    size_t lines = j->tile_bytes * (size_t)tiles / 64, parts = groups;
    if (V_IS_SIDE(kind)) {
        lines = w->next ? (size_t)j->units * w->unit_bytes / 64 : 0;
        parts = groups * (size_t)((w->tiles + tiles - 1) / tiles);
    }
    size_t part = (lines + parts - 1) / parts;
    j->soon_lines = (int)((part + steps - 1) / steps);
    j->soon_part = part * 64;
}

/* the part that group `at` of `groups` asks for while `tiles` tiles from `tile` on are worked on */
static void job_soon(v_job *j, const ouro_matrix *w, v_kind kind, int tile, int tiles, int at, int groups)
{
    if (!j->soon_part) return;
    if (V_IS_SIDE(kind)) {
        j->soon = (uintptr_t)w->next + (size_t)(tile / tiles * groups + at) * j->soon_part;
        j->soon_end = (uintptr_t)w->next + (w->next ? (size_t)j->units * w->unit_bytes : 0);
        return;
    }
    j->soon_end = (uintptr_t)j->w + 2 * (size_t)tiles * j->tile_bytes;
    j->soon = (uintptr_t)j->w + (size_t)tiles * j->tile_bytes + (size_t)at * j->soon_part;
}

/* tiles [tile0, tile1) for all groups of lanes; j is open */
static void run_job(v_job *j, const ouro_matrix *w, v_kind kind, int tile0, int tile1, const ouro_acts *x, int lane0, int lane1,
                    float *out, size_t out_stride, const float *kept)
{
    j->out_stride = out_stride;
    int step = V_IS_SIDE(kind) ? V_SIDE_TILES(kind, lane1 - lane0) : V_TILES(kind, lane1 - lane0);
    for (int begin = lane0, end; begin < lane1; begin = end) {
        end = set_end(kind, x, begin, lane1);
        job_asks(j, w, kind, step, end - begin);
        const v_groups groups = groups_in(kind, end - begin);
        for (int tile = tile0; tile < tile1; tile += step)
            for (v_run r = {.lane = begin}; run_next(&groups, &r, lane1 - lane0);) {
                job_at(j, w, tile, x, r.lane);
                job_soon(j, w, kind, tile, step, r.at, groups.count);
                j->groups = r.count;
                j->kept = kept ? kept + r.lane : NULL;
                j->out = out + (size_t)r.lane * out_stride + (size_t)tile * OURO_TILE;
                run_blocks(j, kind, tile + step < tile1 ? step : tile1 - tile, r.lanes, step);
            }
    }
}

static void matmul(const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x, int lane0, int lane1, float *out,
                   size_t out_stride, const float *kept)
{
    _Alignas(64) float scratch[V_INT_TILES * V_LANES * OURO_TILE];
    v_kind kind = kind_of(w, x);
    v_job j;
    job_open(&j, w, x, kind, scratch);
    run_job(&j, w, kind, tile0, tile1, x, lane0, lane1, out, out_stride, kept);
}

static void chain(const ouro_matrix *w, int n, const ouro_acts *x, size_t x_step, int lane0, int lane1, float *out,
                  size_t out_stride, const float *kept, size_t kept_step)
{
    v_kind kind = kind_of(w, x);
    v_job j;
    if (V_IS_SIDE(kind) && !is_s8(kind) && n > 1 && groups_of(kind, lane1 - lane0) > 1) {
        job_open(&j, w, x, kind, NULL);
        j.chain = w;
        j.chained = n;
        j.x_step = x_step;
        j.kept_step = kept_step;
        run_job(&j, w, kind, 0, w->tiles, x, lane0, lane1, out, out_stride, kept);
        return;
    }
    ouro_acts part = *x;
    for (int i = 0; i < n; i++, part.data += x_step)
        matmul(&w[i], 0, w[i].tiles, &part, lane0, lane1, out, out_stride, kept + (size_t)i * kept_step);
}

/* silu(gate) * up of one lane; pair [32] f32: 16 of gate, 16 of up */
static inline void store_swiglu(const float *pair, uint8_t *out, int as_bf16)
{
    vf y = v_mul(v_silu(v_load(pair)), v_load(pair + OURO_TILE));
    if (as_bf16) v_store_bf16((uint16_t *)(void *)out, y);
    else v_store((float *)(void *)out, y);
}

static void swiglu(const ouro_matrix *w, int pair0, int pair1, const ouro_acts *x, int lane0, int lane1, void *out,
                   size_t out_stride)
{
    _Alignas(64) float scratch[V_INT_TILES * V_LANES * OURO_TILE], both[V_TOGETHER * 2 * OURO_TILE];
    v_kind kind = kind_of(w, x);
    const size_t element = kind == V_BF16 ? sizeof(uint16_t) : sizeof(float), stride = out_stride * element;
    v_job j;
    job_open(&j, w, x, kind, scratch);
    const int most = V_TILES(kind, lane1 - lane0), step = most == 4 ? 2 : 1;        /* tiles of a block, pairs at once */
    j.out_stride = 2 * (size_t)step * OURO_TILE;
    for (int begin = lane0, end; begin < lane1; begin = end) {
        end = set_end(kind, x, begin, lane1);
        job_asks(&j, w, kind, 2 * step, end - begin);
        const v_groups groups = groups_in(kind, end - begin);
        for (int pair = pair0, pairs; pair < pair1; pair += pairs) {
            pairs = pair + step <= pair1 ? step : 1;
            for (v_run r = {.lane = begin}; run_next(&groups, &r, V_TOGETHER / step);) {
                const int n = r.lanes * r.count;
                job_at(&j, w, 2 * pair, x, r.lane);
                job_soon(&j, w, kind, 2 * pair, 2 * step, r.at, groups.count);
                j.groups = r.count;
                j.out = both;
                uint8_t *to = (uint8_t *)out + (size_t)r.lane * stride + (size_t)pair * OURO_TILE * element;
                for (int l = 0; l < n; l++) V_PREFETCH_OUT(to + (size_t)l * stride);
                run_blocks(&j, kind, 2 * pairs, r.lanes, most);
                for (int l = 0; l < n; l++)
                    for (int p = 0; p < pairs; p++)
                        store_swiglu(both + (size_t)l * j.out_stride + (size_t)p * 2 * OURO_TILE,
                                     to + (size_t)l * stride + (size_t)p * OURO_TILE * element, kind == V_BF16);
            }
        }
    }
}

/* the table, named by the file that includes this */
#define V_TABLE(isa) { \
    .name = isa, \
    .matmul = {[OURO_F32] = {[OURO_ACT_F32] = matmul}, \
               [OURO_BF16] = {[OURO_ACT_F32] = matmul, [OURO_ACT_BF16] = matmul}, \
               [OURO_INT8] = {[OURO_ACT_S8] = matmul}, \
               [OURO_INT4] = {[OURO_ACT_S8] = matmul}, \
               [OURO_S8] = {[OURO_ACT_F32] = matmul, [OURO_ACT_BF16] = matmul}}, \
    .swiglu = {[OURO_F32] = {[OURO_ACT_F32] = swiglu}, \
               [OURO_BF16] = {[OURO_ACT_F32] = swiglu, [OURO_ACT_BF16] = swiglu}, \
               [OURO_INT8] = {[OURO_ACT_S8] = swiglu}, \
               [OURO_INT4] = {[OURO_ACT_S8] = swiglu}}, \
    .chain = chain, .swiglu_rows = swiglu_rows, .rmsnorm = rmsnorm, .add_rmsnorm = add_rmsnorm, .dot = dot, .to_bf16 = to_bf16, \
    .to_s8 = to_s8, .rope = rope, .softmax = {[OURO_ACT_F32] = softmax_f32, [OURO_ACT_BF16] = softmax_bf16}, .scale_row = scale_row, \
    .keep_row = keep_row, .keep_done = keep_done, \
    .scale_scores = scale_scores, .scale_weights = scale_weights, \
    .softmax_stats = softmax_stats, .s8_to_bf16 = s8_to_bf16}
