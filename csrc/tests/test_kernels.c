/* test_kernels.c - every kernel table of this machine against the specification, by equality of bits.
 *
 * Shapes and values are random from fixed seeds: columns from 1 up, lanes and tiles from 1 up, sub-ranges, zeros of
 * both signs, denormals, values over forty powers of two. Two NaN are equal whatever their bits, nothing else is.
 */
#include "kernels_testing.h"

#include <stdlib.h>

/* the formats and activations that go together */
static const int kinds[][2] = {{OURO_F32, OURO_ACT_F32}, {OURO_BF16, OURO_ACT_F32}, {OURO_BF16, OURO_ACT_BF16},
                               {OURO_INT8, OURO_ACT_S8}, {OURO_INT4, OURO_ACT_S8}};

/* factors for what is in the output: often 1 or 0, as in attention */
static float *factors(uint64_t *seed, int n)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int i = 0; i < n; i++) x[i] = below(seed, 3) ? awkward(seed) : (float)below(seed, 2);
    return x;
}

/* matmul of a random sub-range into a poisoned output: equal inside, untouched outside */
static void compare_matmul(const ouro_kernels *k, const product *p, uint64_t *seed, int chained)
{
    int tile0 = below(seed, p->w.tiles), tile1 = tile0 + 1 + below(seed, p->w.tiles - tile0);
    int lane0 = below(seed, p->lanes), lane1 = lane0 + 1 + below(seed, p->lanes - lane0);
    if (below(seed, 2)) tile0 = 0, tile1 = p->w.tiles, lane0 = 0, lane1 = p->lanes;
    size_t stride = (size_t)p->w.tiles * OURO_TILE + 3, n = stride * (size_t)p->lanes;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got), *kept = chained ? factors(seed, p->lanes) : NULL;
    for (size_t i = 0; i < n; i++) want[i] = got[i] = awkward(seed);
    ouro_kernels_scalar.matmul[p->w.format][p->x.kind](&p->w, tile0, tile1, &p->x, lane0, lane1, want, stride, kept);
    k->matmul[p->w.format][p->x.kind](&p->w, tile0, tile1, &p->x, lane0, lane1, got, stride, kept);
    CHECK_SAME(want, got, n, "%s matmul format %d acts %d cols %d tiles %d..%d lanes %d..%d chained %d", k->name, p->w.format,
               p->x.kind, p->w.cols, tile0, tile1, lane0, lane1, chained);
    free(want);
    free(got);
    free(kept);
}

static void compare_swiglu(const ouro_kernels *k, const product *p, uint64_t *seed)
{
    int pairs = p->w.tiles / 2, pair0 = below(seed, pairs), pair1 = pair0 + 1 + below(seed, pairs - pair0);
    int lane0 = below(seed, p->lanes), lane1 = lane0 + 1 + below(seed, p->lanes - lane0);
    size_t stride = (size_t)pairs * OURO_TILE + 8, n = stride * (size_t)p->lanes;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
    ouro_kernels_scalar.swiglu[p->w.format][p->x.kind](&p->w, pair0, pair1, &p->x, lane0, lane1, want, stride);
    k->swiglu[p->w.format][p->x.kind](&p->w, pair0, pair1, &p->x, lane0, lane1, got, stride);
    if (p->x.kind == OURO_ACT_BF16)
        EXPECT(!memcmp(want, got, n * 2), "%s swiglu bf16 cols %d", k->name, p->w.cols);
    else
        CHECK_SAME(want, got, n, "%s swiglu format %d acts %d cols %d", k->name, p->w.format, p->x.kind, p->w.cols);
    free(want);
    free(got);
}

/* a chain of two matrices, the second with the activations of other lanes, against two products */
static void compare_chain(const ouro_kernels *k, const product *a, const product *like, uint64_t *seed)
{
    size_t stride = (size_t)a->w.tiles * OURO_TILE, n = stride * (size_t)a->lanes, bytes = ouro_matrix_bytes(&like->w);
    int lanes = a->lanes / 2;
    if (!lanes) return;
    ouro_matrix w[2] = {a->w, a->w};
    w[1].data = ouro_alloc(bytes);
    for (size_t at = 0; at < bytes; at += 64) memcpy(w[1].data + at, a->w.data + (bytes - 64 - at), 64);
    if (below(seed, 2)) w[1].next = a->w.data;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got), *kept = factors(seed, 2 * lanes);
    for (size_t i = 0; i < n; i++) want[i] = got[i] = awkward(seed);
    size_t step = a->x.stride * (size_t)lanes;
    ouro_kernels_scalar.chain(w, 2, &a->x, step, 0, lanes, want, stride, kept, (size_t)lanes);
    k->chain(w, 2, &a->x, step, 0, lanes, got, stride, kept, (size_t)lanes);
    CHECK_SAME(want, got, n, "%s chain, format %d acts %d cols %d tiles %d lanes %d", k->name, a->w.format, a->x.kind, a->w.cols,
               a->w.tiles, lanes);
    ouro_free(w[1].data);
    free(want);
    free(got);
    free(kept);
}

/* F32 or BF16 weights with their tiles side by side: the results of contiguous ones, with and without a hint of what is next */
static void compare_side(const ouro_kernels *k, const product *p, uint64_t *seed)
{
    product side = *p;
    size_t stride = (size_t)p->w.tiles * OURO_TILE, n = stride * (size_t)p->lanes;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got);
    ouro_matrix_layout_side(&side.w, (ouro_format)p->w.format, p->w.rows, p->w.cols, p->w.tiles);
    side.w.data = ouro_alloc(ouro_matrix_bytes(&p->w));
    for (size_t t = 0; t < (size_t)p->w.tiles; t++)
        for (size_t u = 0; u < p->w.tile_bytes / 64; u++)
            memcpy(side.w.data + t * side.w.tile_bytes + u * side.w.unit_bytes, p->w.data + t * p->w.tile_bytes + u * 64, 64);
    for (size_t i = 0; i < n; i++) want[i] = got[i] = awkward(seed);
    float *kept = below(seed, 2) ? factors(seed, p->lanes) : NULL;
    if (below(seed, 2)) side.w.next = p->w.data;
    ouro_kernels_scalar.matmul[p->w.format][p->x.kind](&p->w, 0, p->w.tiles, &p->x, 0, p->lanes, want, stride, kept);
    k->matmul[p->w.format][p->x.kind](&side.w, 0, p->w.tiles, &p->x, 0, p->lanes, got, stride, kept);
    CHECK_SAME(want, got, n, "%s side by side, format %d acts %d cols %d tiles %d lanes %d", k->name, p->w.format, p->x.kind,
               p->w.cols, p->w.tiles, p->lanes);
    compare_matmul(k, &side, seed, kept != NULL);
    compare_chain(k, &side, p, seed);
    ouro_free(side.w.data);
    free(kept);
    free(want);
    free(got);
}

/* S8 against the specification, which gives what the same numbers in BF16 give */
static void compare_s8(const ouro_kernels *k, uint64_t *seed, int kind)
{
    product p = product_new(OURO_BF16, kind, 1 + below(seed, 200), 1 + below(seed, 10), 1 + below(seed, 6), seed);
    product wide = p;
    size_t stride = (size_t)p.w.tiles * OURO_TILE, n = stride * (size_t)p.lanes, size = stride * (size_t)p.w.kpad;
    float *want = calloc(n, sizeof *want), *got = calloc(n, sizeof *got), *kept = below(seed, 2) ? factors(seed, p.lanes) : NULL;
    int8_t *q = ouro_alloc(size);
    for (size_t i = 0; i < size; i++) q[i] = (int8_t)(below(seed, 255) - 127);
    ouro_matrix_layout_side(&wide.w, OURO_BF16, p.w.rows, p.w.cols, p.w.tiles);
    wide.w.data = ouro_alloc(size * sizeof(uint16_t));
    ouro_kernels_scalar.s8_to_bf16(q, p.w.kpad, (int)stride, (uint16_t *)(void *)wide.w.data, NULL);
    ouro_free(p.w.data);
    ouro_matrix_layout_side(&p.w, OURO_S8, p.w.rows, p.w.cols, p.w.tiles);
    p.w.data = (uint8_t *)q;
    for (size_t i = 0; i < n; i++) want[i] = got[i] = awkward(seed);
    ouro_kernels_scalar.matmul[OURO_BF16][kind](&wide.w, 0, p.w.tiles, &p.x, 0, p.lanes, want, stride, kept);
    k->matmul[OURO_S8][kind](&p.w, 0, p.w.tiles, &p.x, 0, p.lanes, got, stride, kept);
    CHECK_SAME(want, got, n, "%s S8, acts %d cols %d tiles %d lanes %d", k->name, kind, p.w.cols, p.w.tiles, p.lanes);
    compare_matmul(k, &p, seed, kept != NULL);
    ouro_free(wide.w.data);
    product_free(&p);
    free(want);
    free(got);
    free(kept);
}

static void test_products(const ouro_kernels *k)
{
    uint64_t seed = 1;
    for (int round = 0; round < 400; round++) {
        const int *kind = kinds[round % 5];
        int cols = 1 + below(&seed, round % 50 == 7 ? 1200 : 300);
        int lanes = 1 + below(&seed, round % 40 == 3 ? 200 : round % 3 ? 30 : 3), tiles = 1 + below(&seed, round % 3 ? 7 : 10);
        product p = product_new(kind[0], kind[1], cols, tiles, lanes, &seed);
        compare_matmul(k, &p, &seed, 0);
        if (p.x.kind != OURO_ACT_S8) compare_matmul(k, &p, &seed, 1), compare_side(k, &p, &seed);
        if (p.w.tiles > 1) compare_swiglu(k, &p, &seed);
        product_free(&p);
        compare_s8(k, &seed, round % 2 ? OURO_ACT_BF16 : OURO_ACT_F32);
    }
}

/* a lane alone gives what it gives in company */
static void test_alone(const ouro_kernels *k)
{
    uint64_t seed = 2;
    for (int i = 0; i < 5; i++) {
        enum { LANES = 37, TILES = 5, OUT = TILES * OURO_TILE };
        product p = product_new(kinds[i][0], kinds[i][1], 264, TILES, LANES, &seed);
        float *all = calloc((size_t)LANES * OUT, sizeof *all), *one = calloc((size_t)LANES * OUT, sizeof *one);
        k->matmul[kinds[i][0]][kinds[i][1]](&p.w, 0, TILES, &p.x, 0, LANES, all, OUT, NULL);
        for (int l = 0; l < LANES; l++)
            for (int t = 0; t < TILES; t++) k->matmul[kinds[i][0]][kinds[i][1]](&p.w, t, t + 1, &p.x, l, l + 1, one, OUT, NULL);
        CHECK_SAME(all, one, (size_t)LANES * OUT, "%s alone, format %d", k->name, kinds[i][0]);
        product_free(&p);
        free(all);
        free(one);
    }
}

/* an attention block of values: head sizes that are odd multiples of 8, chains that go on over blocks */
static void test_chain(const ouro_kernels *k)
{
    uint64_t seed = 3;
    product a = product_new(OURO_BF16, OURO_ACT_BF16, 64, 2, 9, &seed), b = product_new(OURO_BF16, OURO_ACT_BF16, 24, 2, 9, &seed);
    float want[9 * 32], got[9 * 32], kept[9];
    for (int l = 0; l < 9; l++) kept[l] = 1.0f;
    ouro_kernels_scalar.matmul[OURO_BF16][OURO_ACT_BF16](&a.w, 0, 2, &a.x, 0, 9, want, 32, NULL);
    ouro_kernels_scalar.matmul[OURO_BF16][OURO_ACT_BF16](&b.w, 0, 2, &b.x, 0, 9, want, 32, kept);
    k->matmul[OURO_BF16][OURO_ACT_BF16](&a.w, 0, 2, &a.x, 0, 9, got, 32, NULL);
    k->matmul[OURO_BF16][OURO_ACT_BF16](&b.w, 0, 2, &b.x, 0, 9, got, 32, kept);
    CHECK_SAME(want, got, 9 * 32, "%s chain over two blocks", k->name);
    product_free(&a);
    product_free(&b);
}

/* one case: values that are huge, or that cancel, or that end denormal, in every position of a pair */
static void test_extremes(const ouro_kernels *k)
{
    static const float values[] = {0.0f, -0.0f, 1e-38f, -1e-39f, 1e-20f, -1e-20f, 3e38f, -3e38f, 1.0f, -1.0f, 1e30f, -1e19f,
                                   1.00390625f, -0.99609375f, 6.5e-20f, 1.1754944e-38f};
    uint64_t seed = 4;
    for (int round = 0; round < 200; round++) {
        const int *kind = kinds[round % 3];
        product p = product_new(kind[0], kind[1], 16, 2, 3, &seed);
        float row[16];
        for (int r = 0; r < 32; r++) {
            for (int i = 0; i < 16; i++) row[i] = values[below(&seed, 16)];
            ouro_matrix_put_row(&p.w, r, OURO_DT_F32, row);
        }
        for (int l = 0; l < 3; l++) {
            for (int i = 0; i < 16; i++) row[i] = values[below(&seed, 16)];
            product_set_lane(&p, l, row);
        }
        compare_matmul(k, &p, &seed, round & 1);
        compare_swiglu(k, &p, &seed);
        product_free(&p);
    }
}

/* integers as large as they get, all of one sign, so that sums of fewer bits than 32 are as large as they get too */
static void test_full_scale(const ouro_kernels *k)
{
    enum { COLS = 256, LANES = 13 };
    uint64_t seed = 5;
    for (int format = OURO_INT8; format <= OURO_INT4; format++) {
        product p = product_new(format, OURO_ACT_S8, COLS, 2, LANES, &seed);
        for (int r = 0; r < 32; r++) {
            float row[COLS];
            int8_t q[COLS];
            uint16_t scales[COLS / OURO_GROUP4];
            for (int i = 0; i < COLS; i++) row[i] = r % 2 ? 1.0f : -1.0f, q[i] = r % 2 ? 7 : -8;
            for (int g = 0; g < COLS / OURO_GROUP4; g++) scales[g] = 0x3f80u;
            if (format == OURO_INT4) ouro_matrix_put_int4(&p.w, r, scales, q);
            else ouro_matrix_put_row(&p.w, r, OURO_DT_F32, row);
        }
        for (int l = 0; l < LANES; l++) {
            float row[COLS];
            for (int i = 0; i < COLS; i++) row[i] = l % 3 == 2 && i % 2 ? 0.0f : l % 2 ? 1.0f : -1.0f;
            product_set_lane(&p, l, row);
        }
        for (int i = 0; i < 8; i++) compare_matmul(k, &p, &seed, 0);
        product_free(&p);
    }
}

static void test_table(const ouro_kernels *k)
{
    test_products(k);
    test_alone(k);
    test_chain(k);
    test_extremes(k);
    test_full_scale(k);
}

/* names, the environment variable, and what an unknown name says */
static void test_selection(void)
{
    EXPECT(ouro_kernels_select("scalar") == &ouro_kernels_scalar, "scalar is not chosen by name");
    EXPECT(!ouro_kernels_select("sse9") && strstr(ouro_last_error(), "sse9") && strstr(ouro_last_error(), "scalar"),
          "an unknown name gives '%s'", ouro_last_error());
    const char *before = getenv("OURO_ISA");
    char kept[32] = "";
    if (before) snprintf(kept, sizeof kept, "%s", before);
    setenv("OURO_ISA", "scalar", 1);
    EXPECT(ouro_kernels_select(NULL) == &ouro_kernels_scalar, "OURO_ISA=scalar is not followed");
    setenv("OURO_ISA", "sse9", 1);
    EXPECT(!ouro_kernels_select(NULL), "OURO_ISA=sse9 is accepted");
    if (before) setenv("OURO_ISA", kept, 1);
    else unsetenv("OURO_ISA");
    EXPECT(before || ouro_kernels_select(NULL), "no table without a wish");
}

int main(void)
{
    return kernels_test_main("test_kernels", test_table, test_selection);
}
