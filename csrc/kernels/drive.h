/* drive.h - the products of the kernel table over the register blocks of blocks.h: which block, in which order.
 *
 * Tiles outside, lanes inside: a pair of tiles is read from memory once and then comes from the second-level cache
 * for every further group of lanes; lanes are taken in sets whose activations stay in that cache as well. Groups of
 * lanes are of nearly equal size (64 lanes are 6 groups of 10 or 11, not 5 of 12 and one of 4).
 */
#define V_CACHE ((size_t)512 << 10)     /* bytes of activations kept close while the tiles go by */

#define V_INSTANCE_float(kind, T, L) static void V_NAME_OF(kind, T, L)(const v_job *j) { block_float(kind, T, L, j); }
#define V_INSTANCE_int(kind, T, L) static void V_NAME_OF(kind, T, L)(const v_job *j) { block_int(kind, T, L, j); }
#define V_NAME_OF(kind, T, L) block_##kind##_##T##_##L
V_INSTANCES(V_INSTANCE_float, V_F32)
V_INSTANCES(V_INSTANCE_float, V_MIXED)
V_INSTANCES(V_INSTANCE_float, V_BF16)
V_INSTANCES(V_INSTANCE_int, V_INT8)
V_INSTANCES(V_INSTANCE_int, V_INT4)

#define V_ENTRY(kind, T, L) [kind][T][L] = V_NAME_OF(kind, T, L),
static const v_block_fn block_table[V_KINDS][V_MAX_TILES + 1][V_LANES + 1] = {
    V_INSTANCES(V_ENTRY, V_F32) V_INSTANCES(V_ENTRY, V_MIXED) V_INSTANCES(V_ENTRY, V_BF16)
    V_INSTANCES(V_ENTRY, V_INT8) V_INSTANCES(V_ENTRY, V_INT4)
};

static v_kind kind_of(const ouro_matrix *w, const ouro_acts *x)
{
    if (w->format == OURO_INT8) return V_INT8;
    if (w->format == OURO_INT4) return V_INT4;
    if (w->format == OURO_F32) return V_F32;
    return x->kind == OURO_ACT_BF16 ? V_BF16 : V_MIXED;
}

/* what does not change from block to block */
static v_job job_of(const ouro_matrix *w, const ouro_acts *x, v_kind kind)
{
    v_job j = {.tile_bytes = w->tile_bytes, .stride = x->stride, .xs_stride = (size_t)(x->kpad / OURO_GROUP)};
    int per_unit = kind == V_F32 ? 1 : kind == V_INT8 ? OURO_GROUP : kind == V_INT4 ? OURO_GROUP4 : 2;
    j.units = w->kpad / per_unit;
    if (kind == V_INT8 || kind == V_INT4) j.scale_bytes = ((size_t)j.units * 2 * OURO_TILE + 63) & ~(size_t)63;
    return j;
}

static void job_at(v_job *j, const ouro_matrix *w, int tile, const ouro_acts *x, int lane)
{
    j->w = w->data + (size_t)tile * w->tile_bytes;
    j->x = x->data + (size_t)lane * x->stride;
    j->xs = x->scale ? x->scale + (size_t)lane * j->xs_stride : NULL;
    j->sum = x->sum ? x->sum + (size_t)lane * 2 * j->xs_stride : NULL;
}

/* any number of tiles times lanes (1..V_LANES), by the blocks that exist */
static void run_blocks(v_job *j, v_kind kind, int tiles, int lanes)
{
    while (tiles > 0) {
        int n = tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
        while (!block_table[kind][n][lanes]) n /= 2;
        block_table[kind][n][lanes](j);
        j->w += (size_t)n * j->tile_bytes;
        j->out += n * OURO_TILE;
        tiles -= n;
    }
}

/* lanes of one set: its activations fit in V_CACHE */
static int lanes_of_set(const ouro_acts *x, int lanes)
{
    size_t fit = V_CACHE / x->stride / V_LANES * V_LANES;
    if (fit < V_LANES) fit = V_LANES;
    return (size_t)lanes < fit ? lanes : (int)fit;
}

/* end of the group of lanes that begins at `lane`: what is left of the set in nearly equal parts */
static int group_end(int lane, int end)
{
    int left = end - lane, groups = (left + V_LANES - 1) / V_LANES;
    return lane + (left + groups - 1) / groups;
}

static void matmul(const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x, int lane0, int lane1, float *out,
                   size_t out_stride, int accumulate)
{
    _Alignas(64) float scratch[V_MAX_TILES * V_LANES * OURO_TILE];
    v_kind kind = kind_of(w, x);
    v_job j = job_of(w, x, kind);
    j.scratch = scratch;
    j.out_stride = out_stride;
    j.accumulate = accumulate;
    int set = lanes_of_set(x, lane1 - lane0), step = V_TILES(lane1 - lane0);
    for (int begin = lane0; begin < lane1; begin += set) {
        int end = begin + set < lane1 ? begin + set : lane1;
        for (int tile = tile0; tile < tile1; tile += step)
            for (int lane = begin, next; lane < end; lane = next) {
                next = group_end(lane, end);
                job_at(&j, w, tile, x, lane);
                j.out = out + (size_t)lane * out_stride + (size_t)tile * OURO_TILE;
                run_blocks(&j, kind, tile + step < tile1 ? step : tile1 - tile, next - lane);
            }
    }
}

/* silu(gate) * up of one lane; pair [32] f32: 16 of gate, 16 of up */
static inline void store_swiglu(const float *pair, void *out, size_t at, int as_bf16)
{
    vf y = v_mul(v_silu(v_load(pair)), v_load(pair + OURO_TILE));
    if (as_bf16) v_store_bf16((uint16_t *)out + at, y);
    else v_store((float *)out + at, y);
}

static void swiglu(const ouro_matrix *w, int pair0, int pair1, const ouro_acts *x, int lane0, int lane1, void *out,
                   size_t out_stride)
{
    _Alignas(64) float scratch[V_MAX_TILES * V_LANES * OURO_TILE], both[V_LANES * 2 * OURO_TILE];
    v_kind kind = kind_of(w, x);
    v_job j = job_of(w, x, kind);
    j.scratch = scratch;
    j.out_stride = 2 * OURO_TILE;
    int set = lanes_of_set(x, lane1 - lane0);
    for (int begin = lane0; begin < lane1; begin += set) {
        int end = begin + set < lane1 ? begin + set : lane1;
        for (int pair = pair0; pair < pair1; pair++)
            for (int lane = begin, next; lane < end; lane = next) {
                next = group_end(lane, end);
                job_at(&j, w, 2 * pair, x, lane);
                j.out = both;
                run_blocks(&j, kind, 2, next - lane);
                for (int l = lane; l < next; l++)
                    store_swiglu(both + (size_t)(l - lane) * 2 * OURO_TILE, out,
                                 (size_t)l * out_stride + (size_t)pair * OURO_TILE, kind == V_BF16);
            }
    }
}

/* the table, named by the file that includes this */
#define V_TABLE(isa) { \
    .name = isa, \
    .matmul = {[OURO_F32] = {[OURO_ACT_F32] = matmul}, \
               [OURO_BF16] = {[OURO_ACT_F32] = matmul, [OURO_ACT_BF16] = matmul}, \
               [OURO_INT8] = {[OURO_ACT_S8] = matmul}, \
               [OURO_INT4] = {[OURO_ACT_S8] = matmul}}, \
    .swiglu = {[OURO_F32] = {[OURO_ACT_F32] = swiglu}, \
               [OURO_BF16] = {[OURO_ACT_F32] = swiglu, [OURO_ACT_BF16] = swiglu}, \
               [OURO_INT8] = {[OURO_ACT_S8] = swiglu}, \
               [OURO_INT4] = {[OURO_ACT_S8] = swiglu}}, \
    .swiglu_rows = swiglu_rows, .rmsnorm = rmsnorm, .add_rmsnorm = add_rmsnorm, .dot = dot, .to_bf16 = to_bf16, \
    .to_s8 = to_s8, .rope = rope, .softmax_f32 = softmax_f32, .softmax_bf16 = softmax_bf16, .scale_row = scale_row, \
    .softmax_stats = softmax_stats, .s8_to_bf16 = s8_to_bf16}
