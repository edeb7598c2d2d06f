/* rows_body.h - the kernels over one row (norms, rounding, rotary, softmax), written once over the sixteen lanes of
 * vec_*.h and included by each instruction-set file.
 *
 * The specification is scalar.c, function by function. Sixteen partial sums are one vector; a tail of fewer than
 * sixteen leaves the other partials as they are (adding zero would turn a flushed -0 into +0).
 */
#include "kernels/math.h"

#define V_WIDTH 16
#define V_STATS_CHUNK 512       /* elements of a row whose maximum is taken before it is compared */

static inline vf v_exp(vf x)
{
    vf given = x, lo = v_set1(OURO_EXP_LO);
    x = v_max(x, lo);
    x = v_min(x, v_set1(OURO_EXP_HI));
    vf n = v_rint(v_mul(x, v_set1(OURO_LOG2E)));
    vf r = v_fma(n, v_set1(-OURO_LN2_HI), x);
    r = v_fma(n, v_set1(-OURO_LN2_LO), r);
    vf p = v_fma(v_set1(OURO_EXP_C6), r, v_set1(OURO_EXP_C5));
    p = v_fma(p, r, v_set1(OURO_EXP_C4));
    p = v_fma(p, r, v_set1(OURO_EXP_C3));
    p = v_fma(p, r, v_set1(OURO_EXP_C2));
    p = v_fma(p, r, v_set1(OURO_EXP_C1));
    p = v_fma(p, r, v_set1(OURO_EXP_C0));
    return v_zero_below(given, lo, v_mul(p, v_pow2(n)));
}

static inline vf v_silu(vf g) { return v_div(g, v_add(v_set1(1.0f), v_exp(v_neg(g)))); }

static void swiglu_rows(const float *g, const float *u, int n, float *y)
{
    int i = 0;
    for (; i + V_WIDTH <= n; i += V_WIDTH) v_store(y + i, v_mul(v_silu(v_load(g + i)), v_load(u + i)));
    if (i < n) v_store_n(y + i, v_mul(v_silu(v_load_n(g + i, n - i)), v_load_n(u + i, n - i)), n - i);
}

static float dot(const float *x, const float *w, int n)
{
    vf p = v_zero();
    int i = 0;
    for (; i + V_WIDTH <= n; i += V_WIDTH) p = v_fma(v_load(x + i), v_load(w + i), p);
    if (i < n) p = v_first_of(v_fma(v_load_n(x + i, n - i), v_load_n(w + i, n - i), p), p, n - i);
    return v_tree(p);
}

static float inverse_rms(const float *x, float eps, int d) { return 1.0f / sqrtf(dot(x, x, d) / (float)d + eps); }

static float rmsnorm(const float *x, const float *w, float eps, int d, float *y)
{
    float r = inverse_rms(x, eps, d);
    vf vr = v_set1(r);
    int i = 0;
    for (; i + V_WIDTH <= d; i += V_WIDTH) v_store(y + i, v_mul(v_mul(v_load(x + i), vr), v_load(w + i)));
    if (i < d) v_store_n(y + i, v_mul(v_mul(v_load_n(x + i, d - i), vr), v_load_n(w + i, d - i)), d - i);
    return r;
}

static void add_rmsnorm(float *h, const float *a, const float *w, float eps, int d)
{
    vf vr = v_set1(inverse_rms(a, eps, d));
    int i = 0;
    for (; i + V_WIDTH <= d; i += V_WIDTH)
        v_store(h + i, v_add(v_load(h + i), v_mul(v_mul(v_load(a + i), vr), v_load(w + i))));
    for (; i < d; i += V_WIDTH) {
        vf y = v_mul(v_mul(v_load_n(a + i, d - i), vr), v_load_n(w + i, d - i));
        v_store_n(h + i, v_add(v_load_n(h + i, d - i), y), d - i);
    }
}

static void to_bf16(const float *x, int n, int npad, uint16_t *y)
{
    int i = 0;
    for (; i + V_WIDTH <= n; i += V_WIDTH) v_store_bf16(y + i, v_load(x + i));
    for (; i < n; i++) y[i] = ouro_f32_to_bf16(x[i]);
    if (i < npad) memset(y + i, 0, (size_t)(npad - i) * sizeof *y);
}

/* elements [begin, begin + 16) of a row that ends at n, zeros after it */
static inline vf v_load_to(const float *x, int begin, int n)
{
    if (begin + V_WIDTH <= n) return v_load(x + begin);
    return begin < n ? v_load_n(x + begin, n - begin) : v_zero();
}

static void to_s8(const float *x, int n, int npad, int8_t *q, float *scale, int32_t *sum)
{
    for (int g = 0; g < npad / OURO_GROUP; g++) {
        int begin = g * OURO_GROUP;
        vf top = v_zero();
        for (int i = begin; i < begin + OURO_GROUP; i += V_WIDTH) top = v_max(v_abs(v_load_to(x, i, n)), top);
        float amax = v_reduce_max(top);
        vf inverse = v_set1(amax > 0.0f ? 127.0f / amax : 0.0f);
        scale[g] = amax / 127.0f;
        for (int half = 0; half < 2; half++) {
            vi total = vi_zero();
            for (int i = begin + half * OURO_GROUP4; i < begin + (half + 1) * OURO_GROUP4; i += V_WIDTH) {
                vf v = v_mul(v_load_to(x, i, n), inverse);
                if (i + V_WIDTH > n) v = v_first_of(v, v_zero(), i < n ? n - i : 0);
                vi r = vi_rint(v_max(v_min(v, v_set1(127.0f)), v_set1(-127.0f)));
                total = vi_add(total, r);
                vi_store_s8(q + i, r);
            }
            sum[2 * g + half] = vi_sum(total);
        }
    }
}

static void rope(float *x, const float *c, const float *s, int dh)
{
    int half = dh / 2, i = 0;
    for (; i + V_WIDTH <= half; i += V_WIDTH) {
        vf a = v_load(x + i), b = v_load(x + i + half), vc = v_load(c + i), vs = v_load(s + i);
        v_store(x + i, v_fnma(b, vs, v_mul(a, vc)));
        v_store(x + i + half, v_fma(a, vs, v_mul(b, vc)));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fmaf(-b, s[i], a * c[i]);
        x[i + half] = fmaf(a, s[i], b * c[i]);
    }
}

/* what the two softmax forms share: x [4] vectors of scaled scores, the new maximum, alpha */
static inline float softmax_open(const float *s, int n, float scale, float *m, vf *x)
{
    vf old = v_set1(*m), top = old;
    for (int i = 0; i < OURO_BLOCK / V_WIDTH; i++) {
        int left = n - i * V_WIDTH;
        x[i] = v_mul(v_load(s + i * V_WIDTH), v_set1(scale));
        if (left >= V_WIDTH) top = v_max(x[i], top);
        else top = v_max(v_first_of(x[i], old, left > 0 ? left : 0), top);
    }
    float now = v_reduce_max(top) + 0.0f, alpha = ouro_expf(*m - now);
    *m = now;
    return alpha;
}

/* exp(x - m) for the first `left` of sixteen, 0 for the others */
static inline vf softmax_part(vf x, float m, int left)
{
    vf p = v_exp(v_sub(x, v_set1(m)));
    return left >= V_WIDTH ? p : v_first_of(p, v_zero(), left > 0 ? left : 0);
}

static float softmax_f32(const float *s, int n, float scale, float *m, float *l, float *p)
{
    vf x[OURO_BLOCK / V_WIDTH], sum = v_zero();
    float alpha = softmax_open(s, n, scale, m, x);
    for (int i = 0; i < OURO_BLOCK / V_WIDTH; i++) {
        vf e = softmax_part(x[i], *m, n - i * V_WIDTH);
        v_store(p + i * V_WIDTH, e);
        sum = v_add(sum, e);
    }
    *l = fmaf(*l, alpha, v_tree(sum));
    return alpha;
}

static float softmax_bf16(const float *s, int n, float scale, float *m, float *l, uint16_t *p)
{
    vf x[OURO_BLOCK / V_WIDTH], sum = v_zero();
    float alpha = softmax_open(s, n, scale, m, x);
    for (int i = 0; i < OURO_BLOCK / V_WIDTH; i++) {
        v_store_bf16(p + i * V_WIDTH, softmax_part(x[i], *m, n - i * V_WIDTH));
        sum = v_add(sum, v_widen_bf16(p + i * V_WIDTH));
    }
    *l = fmaf(*l, alpha, v_tree(sum));
    return alpha;
}

static void scale_row(float *x, float a, int n)
{
    vf va = v_set1(a);
    int i = 0;
    for (; i + V_WIDTH <= n; i += V_WIDTH) v_store(x + i, v_mul(v_load(x + i), va));
    for (; i < n; i++) x[i] *= a;
}

static void keep_row(const float *x, int n, float *y)
{
    if ((uintptr_t)y % 64 || n % V_WIDTH) {         /* a line written in two ways is slower than either */
        memcpy(y, x, (size_t)n * sizeof *x);
        return;
    }
    for (int i = 0; i < n; i += V_WIDTH) v_stream(y + i, v_load(x + i));
}

static void keep_done(void) { v_stream_end(); }

static void scale_scores(float *s, const float *scale)
{
    for (int i = 0; i < OURO_BLOCK; i += V_WIDTH) v_store(s + i, v_mul(v_load(s + i), v_load(scale + i)));
}

static void scale_weights(uint16_t *p, const float *scale)
{
    for (int i = 0; i < OURO_BLOCK; i += V_WIDTH) v_store_bf16(p + i, v_mul(v_widen_bf16(p + i), v_load(scale + i)));
}

/* Index of the first maximum. Chunk maxima first; only the chunk that raised the maximum last is searched. A NaN is
 * never a maximum, unless it stands first (then nothing exceeds it): as the scalar comparisons have it. */
static int first_maximum(const float *z, int n)
{
    float top = z[0];
    int chunk = 0;
    for (int begin = 0; begin < n; begin += V_STATS_CHUNK) {
        int end = begin + V_STATS_CHUNK < n ? begin + V_STATS_CHUNK : n, i = begin;
        vf v = v_set1(top);
        for (; i + V_WIDTH <= end; i += V_WIDTH) v = v_max(v_load(z + i), v);
        float here = v_reduce_max(v);
        for (; i < end; i++) here = z[i] > here ? z[i] : here;
        if (here > top) top = here, chunk = begin;
    }
    for (int i = chunk; i < n; i++)
        if (z[i] == top) return i;
    return 0;
}

static void softmax_stats(const float *z, int n, float *m, int *argmax, float *s, float *u)
{
    int best = first_maximum(z, n), i = 0;
    vf top = v_set1(z[best]), ps = v_zero(), pu = v_zero();
    for (; i + V_WIDTH <= n; i += V_WIDTH) {
        vf x = v_sub(v_load(z + i), top), e = v_exp(x);
        ps = v_add(ps, e);
        pu = v_fma(e, x, pu);
    }
    if (i < n) {
        vf x = v_sub(v_load_n(z + i, n - i), top), e = v_exp(x);
        ps = v_first_of(v_add(ps, e), ps, n - i);
        pu = v_first_of(v_fma(e, x, pu), pu, n - i);
    }
    *m = z[best];
    *argmax = best;
    *s = v_tree(ps);
    *u = v_tree(pu);
}

static void s8_to_bf16(const int8_t *q, int n, uint16_t *y, const void *next)
{
    for (int i = 0; i < n; i += 64) {
        if (next) V_PREFETCH((uintptr_t)next + (uintptr_t)i);
        v_expand_s8(q + i, y + i);
        v_expand_s8(q + i + 32, y + i + 32);
    }
}
