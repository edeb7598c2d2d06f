/* test_kernels_rows.c - the row kernels (norms, rounding, rotary, softmax) against the specification, bit for bit, and
 * the specification itself against plain definitions: exp in double, bf16 rounding for every float of a sample.
 */
#include "kernels_testing.h"

#define MAX_ROW 1100

static void random_row(uint64_t *seed, float *x, int n)
{
    for (int i = 0; i < n; i++) x[i] = below(seed, 2) ? awkward(seed) : normal(seed);
}

static void compare_norms(const ouro_kernels *k, uint64_t *seed, int n)
{
    const ouro_kernels *s = &ouro_kernels_scalar;
    float x[MAX_ROW], w[MAX_ROW], want[MAX_ROW], got[MAX_ROW];
    random_row(seed, x, n);
    random_row(seed, w, n);
    float a = s->dot(x, w, n), b = k->dot(x, w, n);
    CHECK_SAME(&a, &b, 1, "%s dot n %d", k->name, n);
    a = s->rmsnorm(x, w, 1e-6f, n, want);
    b = k->rmsnorm(x, w, 1e-6f, n, got);
    CHECK_SAME(&a, &b, 1, "%s rmsnorm returns, n %d", k->name, n);
    CHECK_SAME(want, got, (size_t)n, "%s rmsnorm n %d", k->name, n);
    random_row(seed, want, n);
    memcpy(got, want, sizeof got);
    s->add_rmsnorm(want, x, w, 1e-6f, n);
    k->add_rmsnorm(got, x, w, 1e-6f, n);
    CHECK_SAME(want, got, (size_t)n, "%s add_rmsnorm n %d", k->name, n);
    s->swiglu_rows(x, w, n, want);
    k->swiglu_rows(x, w, n, got);
    CHECK_SAME(want, got, (size_t)n, "%s swiglu_rows n %d", k->name, n);
    memcpy(want, x, sizeof want);
    memcpy(got, x, sizeof got);
    s->scale_row(want, w[0], n);
    k->scale_row(got, w[0], n);
    CHECK_SAME(want, got, (size_t)n, "%s scale_row n %d", k->name, n);
    _Alignas(64) float kept[MAX_ROW + 1];
    for (int shift = 0; shift < 2; shift++) {
        kept[n + shift] = 7.0f;
        k->keep_row(x, n, kept + shift);
        k->keep_done();
        CHECK_SAME(x, kept + shift, (size_t)n, "%s keep_row n %d", k->name, n);
        EXPECT(kept[n + shift] == 7.0f, "%s keep_row n %d wrote behind the row", k->name, n);
    }
}

static void compare_rope(const ouro_kernels *k, uint64_t *seed, int dh)
{
    float want[512], got[512], c[256], s[256];
    random_row(seed, want, dh);
    random_row(seed, c, dh / 2);
    random_row(seed, s, dh / 2);
    memcpy(got, want, sizeof got);
    ouro_kernels_scalar.rope(want, c, s, dh);
    k->rope(got, c, s, dh);
    CHECK_SAME(want, got, (size_t)dh, "%s rope dh %d", k->name, dh);
}

static void compare_rounding(const ouro_kernels *k, uint64_t *seed, int n)
{
    const ouro_kernels *s = &ouro_kernels_scalar;
    float x[MAX_ROW];
    uint16_t want[MAX_ROW + 128], got[MAX_ROW + 128];
    int npad = (n + 7) / 8 * 8;
    for (int i = 0; i < n; i++) x[i] = ouro_from_bits((uint32_t)next_random(seed));    /* any pattern, NaN too */
    memset(got, 0x5a, sizeof got);
    memset(want, 0x5a, sizeof want);
    s->to_bf16(x, n, npad, want);
    k->to_bf16(x, n, npad, got);
    EXPECT(!memcmp(want, got, sizeof want), "%s to_bf16 n %d", k->name, n);

    enum { PAD = (MAX_ROW + 127) / 128 * 128 };
    int8_t q[2][PAD] = {{0}};
    float scale[2][PAD / OURO_GROUP] = {{0}};
    int32_t sum[2][PAD / OURO_GROUP4] = {{0}};
    random_row(seed, x, n);
    if (below(seed, 4) == 0) memset(x, 0, (size_t)(n < 130 ? n : 130) * sizeof *x);
    if (below(seed, 4) == 0) for (int i = 0; i < n; i++) x[i] *= 1e-30f;
    if (below(seed, 8) == 0) x[below(seed, n)] = INFINITY;
    npad = (n + 127) / 128 * 128;
    s->to_s8(x, n, npad, q[0], scale[0], sum[0]);
    k->to_s8(x, n, npad, q[1], scale[1], sum[1]);
    EXPECT(!memcmp(q[0], q[1], sizeof q[0]), "%s to_s8 n %d", k->name, n);
    CHECK_SAME(scale[0], scale[1], PAD / OURO_GROUP, "%s to_s8 scale n %d", k->name, n);
    EXPECT(!memcmp(sum[0], sum[1], sizeof sum[0]), "%s to_s8 sum n %d", k->name, n);

    int rows = 16 * (1 + below(seed, 5)), ks = 2 * (1 + below(seed, PAD / rows / 2));
    s->s8_to_bf16(q[0], ks, rows, want, NULL);
    k->s8_to_bf16(q[0], ks, rows, got, want);
    EXPECT(!memcmp(want, got, (size_t)(ks * rows) * sizeof *got), "%s s8_to_bf16", k->name);
}

#define MAX_SOFTMAX 21
typedef struct softmax_case {
    float m[MAX_SOFTMAX], l[MAX_SOFTMAX], alpha[MAX_SOFTMAX];
    _Alignas(64) uint8_t p[MAX_SOFTMAX * 320];
} softmax_case;

/* One block of n rows by the specification, one row at a time, and by the table, all at once. */
static void compare_block(const ouro_kernels *k, int kind, const float *s, const int *visible, int n, softmax_case *want,
                          softmax_case *got)
{
    for (int r = 0; r < n; r++)
        ouro_kernels_scalar.softmax[kind](s + r * OURO_BLOCK, 1, visible + r, 0.125f, want->m + r, want->l + r, want->alpha + r,
                                          want->p + (size_t)r * 320, 0);
    k->softmax[kind](s, n, visible, 0.125f, got->m, got->l, got->alpha, got->p, 320);
    CHECK_SAME(want->alpha, got->alpha, (size_t)n, "%s softmax %d alpha, %d rows", k->name, kind, n);
    CHECK_SAME(want->m, got->m, (size_t)n, "%s softmax %d m, %d rows", k->name, kind, n);
    CHECK_SAME(want->l, got->l, (size_t)n, "%s softmax %d l, %d rows", k->name, kind, n);
    EXPECT(!memcmp(want->p, got->p, sizeof want->p), "%s softmax %d p, %d rows", k->name, kind, n);
}

/* three blocks of a few rows, so that the running maxima and sums go through every branch */
static void compare_softmax(const ouro_kernels *k, uint64_t *seed)
{
    softmax_case want[2], got[2];
    float s[MAX_SOFTMAX * OURO_BLOCK], factor[OURO_BLOCK];
    int visible[MAX_SOFTMAX], n = 1 + below(seed, below(seed, 2) ? MAX_SOFTMAX : 5);
    memset(want, 0, sizeof want);
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < n; r++) want[i].m[r] = -INFINITY;
    memcpy(got, want, sizeof want);
    for (int block = 0; block < 3; block++) {
        for (int r = 0; r < n; r++) {
            float *row = s + r * OURO_BLOCK;
            visible[r] = below(seed, 2) ? OURO_BLOCK : 1 + below(seed, OURO_BLOCK);
            for (int i = 0; i < OURO_BLOCK; i++) row[i] = i < visible[r] ? 20.0f * normal(seed) : below(seed, 2) ? NAN : 1e30f;
            if (below(seed, 5) == 0) for (int i = 0; i < visible[r]; i++) row[i] = below(seed, 2) ? -0.0f : 0.0f;
            if (below(seed, 9) == 0) row[below(seed, visible[r])] = below(seed, 2) ? 3e38f : -3e38f;
        }
        compare_block(k, OURO_ACT_F32, s, visible, n, &want[0], &got[0]);
        compare_block(k, OURO_ACT_BF16, s, visible, n, &want[1], &got[1]);
    }
    for (int i = 0; i < OURO_BLOCK; i++) factor[i] = below(seed, 9) ? 0.01f * normal(seed) : 0.0f;
    ouro_kernels_scalar.scale_scores((float *)(void *)want[0].p, factor);
    k->scale_scores((float *)(void *)got[0].p, factor);
    EXPECT(!memcmp(want[0].p, got[0].p, sizeof want[0].p), "%s scale_scores", k->name);
    ouro_kernels_scalar.scale_weights((uint16_t *)(void *)want[1].p, factor);
    k->scale_weights((uint16_t *)(void *)got[1].p, factor);
    EXPECT(!memcmp(want[1].p, got[1].p, sizeof want[1].p), "%s scale_weights", k->name);
}

static void compare_stats(const ouro_kernels *k, uint64_t *seed, int n)
{
    float z[MAX_ROW], m[2], s[2], u[2];
    int at[2];
    for (int i = 0; i < n; i++) z[i] = below(seed, 3) ? 5.0f * normal(seed) : (float)below(seed, 20);
    if (below(seed, 3) == 0) z[below(seed, n)] = z[below(seed, n)] = 40.0f;              /* ties */
    if (below(seed, 8) == 0) z[below(seed, n)] = -INFINITY;
    if (below(seed, 8) == 0) z[below(seed, n)] = NAN;
    const ouro_kernels *both[2] = {&ouro_kernels_scalar, k};
    for (int i = 0; i < 2; i++) both[i]->softmax_stats(z, n, &m[i], &at[i], &s[i], &u[i]);
    EXPECT(at[0] == at[1], "%s softmax_stats argmax n %d: %d, %d", k->name, n, at[0], at[1]);
    CHECK_SAME(&m[0], &m[1], 1, "%s softmax_stats m n %d", k->name, n);
    CHECK_SAME(&s[0], &s[1], 1, "%s softmax_stats s n %d", k->name, n);
    CHECK_SAME(&u[0], &u[1], 1, "%s softmax_stats u n %d", k->name, n);
}

/* exp of every kind of argument, through swiglu_rows with u = 1 + e so that the denominator shows */
static void compare_exp(const ouro_kernels *k)
{
    float g[1024], u[1024], want[1024], got[1024];
    for (int i = 0; i < 1024; i++) u[i] = 1.0f;
    for (int block = 0; block < 200; block++) {
        for (int i = 0; i < 1024; i++) g[i] = ((float)(block * 1024 + i) - 102400.0f) * 0.00098f;
        if (block == 0) g[0] = INFINITY, g[1] = -INFINITY, g[2] = NAN, g[3] = 1e30f, g[4] = -1e30f, g[5] = -0.0f;
        ouro_kernels_scalar.swiglu_rows(g, u, 1024, want);
        k->swiglu_rows(g, u, 1024, got);
        CHECK_SAME(want, got, 1024, "%s exp block %d", k->name, block);
    }
}

static void test_rows(const ouro_kernels *k)
{
    uint64_t seed = 5;
    for (int round = 0; round < 600; round++) {
        int n = 1 + below(&seed, round % 10 ? 80 : MAX_ROW - 1);
        compare_norms(k, &seed, n);
        compare_rounding(k, &seed, n);
        compare_softmax(k, &seed);
        compare_stats(k, &seed, n);
        compare_rope(k, &seed, 2 * (1 + below(&seed, 80)));
    }
    compare_exp(k);
}

/* ---- the specification itself ------------------------------------------------------------------------------------ */

static void test_exp(void)
{
    double worst = 0.0;
    for (int i = -870000; i <= 880000; i++) {
        float x = (float)i * 1e-4f;
        if (x < OURO_EXP_LO || x > OURO_EXP_HI) continue;
        double true_value = exp((double)x), error = fabs((double)ouro_expf(x) - true_value) / true_value;
        if (error > worst) worst = error;
    }
    EXPECT(worst < 1.2e-7, "exp: relative error %g, expected below 1.2e-7", worst);
    EXPECT(ouro_expf(-87.5f) == 0.0f && ouro_expf(-INFINITY) == 0.0f, "exp below its range is not 0");
    EXPECT(ouro_expf(0.0f) == 1.0f && ouro_expf(-0.0f) == 1.0f, "exp(0) is not 1");
    EXPECT(ouro_expf(1000.0f) == ouro_expf(OURO_EXP_HI), "exp above its range is not exp(88)");
}

/* nearest of the two neighbours by distance in double, ties to the even one */
static uint16_t plain_bf16(float x)
{
    uint32_t u = ouro_bits(x);
    uint16_t down = (uint16_t)(u >> 16), up = (uint16_t)(down + 1);
    if (fabsf(x) < 0x1p-126f) return down & 0x8000u;
    double here = fabs((double)x), low = fabs((double)ouro_bf16_to_f32(down));
    double high = (up & 0x7fffu) == 0x7f80u ? 0x1p128 : fabs((double)ouro_bf16_to_f32(up));
    if (here - low != high - here) return here - low < high - here ? down : up;
    return down & 1u ? up : down;
}

static void test_bf16(void)
{
    long wrong = 0;
    for (uint64_t u = 0; u < (1ull << 32); u += 251) {              /* 251 is prime to 2^16: all fractions are met */
        float x = ouro_from_bits((uint32_t)u);
        if (!isnan(x) && !isinf(x)) wrong += ouro_f32_to_bf16(x) != plain_bf16(x);
    }
    for (uint32_t top = 0; top < 0x10000u; top++)                   /* every bf16, its ties and their neighbours */
        for (uint32_t low = 0x7fffu; low <= 0x8001u; low++) {
            float x = ouro_from_bits(top << 16 | low);
            if (!isnan(x) && !isinf(x)) wrong += ouro_f32_to_bf16(x) != plain_bf16(x);
        }
    EXPECT(!wrong, "bf16 rounding: %ld wrong", wrong);
    EXPECT(isnan(ouro_bf16_to_f32(ouro_f32_to_bf16(NAN))) && ouro_f32_to_bf16(INFINITY) == 0x7f80u, "bf16 of NaN, infinity");
    uint32_t signalling = 0x7f800001u;
    EXPECT(isnan(ouro_bf16_to_f32(ouro_f32_to_bf16(ouro_from_bits(signalling)))), "bf16 of a NaN with low bits only");
}

static void test_log(void)
{
    uint64_t seed = 6;
    double worst = 0.0;
    for (int i = 0; i < 200000; i++) {
        double x = (double)(next_random(&seed) >> 11) * 0x1p-53 + 0x1p-60, y = x < 0.5 ? x : 2.0 * x;
        double error = fabs(ouro_log(y) - log(y)) / fmax(1.0, fabs(log(y)));
        if (error > worst) worst = error;
    }
    EXPECT(worst < 4e-15, "log: error %g", worst);
}

static void test_specification(void)
{
    test_exp();
    test_bf16();
    test_log();
}

int main(void)
{
    return kernels_test_main("test_kernels_rows", test_rows, test_specification);
}
