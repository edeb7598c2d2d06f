/* rows_body.h - the kernels over one row (norms, rounding, rotary, softmax), written once over the sixteen lanes of
 * vec_*.h and included by each instruction-set file.
 *
 * The specification is scalar.c, function by function. Sixteen partial sums are one vector; a tail of fewer than
 * sixteen leaves the other partials as they are (adding zero would turn a flushed -0 into +0).
 */
#include "kernels/math.h"

#define V_WIDTH 16
#define V_SOFTMAX_ROWS 16       /* rows of attention whose maxima, factors and sums are one vector */
#define V_STATS_CHUNK 512       /* elements of a row whose maximum is taken before it is compared */

/* exp of `given`, of which x is the part in the range of exp */
static inline vf v_exp_of(vf given, vf x)
{
    vf n = v_rint(v_mul(x, v_set1(OURO_LOG2E)));
    vf r = v_fma(n, v_set1(-OURO_LN2_HI), x);
    r = v_fma(n, v_set1(-OURO_LN2_LO), r);
    vf p = v_fma(v_set1(OURO_EXP_C6), r, v_set1(OURO_EXP_C5));
    p = v_fma(p, r, v_set1(OURO_EXP_C4));
    p = v_fma(p, r, v_set1(OURO_EXP_C3));
    p = v_fma(p, r, v_set1(OURO_EXP_C2));
    p = v_fma(p, r, v_set1(OURO_EXP_C1));
    p = v_fma(p, r, v_set1(OURO_EXP_C0));
    return v_zero_below(given, v_set1(OURO_EXP_LO), v_scale2(p, n));
}

static inline vf v_exp(vf x) { return v_exp_of(x, v_min(v_max(x, v_set1(OURO_EXP_LO)), v_set1(OURO_EXP_HI))); }
/* the same of an x that is at most OURO_EXP_HI, or NaN */
static inline vf v_exp_low(vf x) { return v_exp_of(x, v_max(x, v_set1(OURO_EXP_LO))); }

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

/* the largest of a group of 128, without its sign */
static inline float group_top(const float *x, int begin, int n)
{
    vf top = v_zero();
    for (int i = begin; i < begin + OURO_GROUP; i += V_WIDTH) top = v_max(v_abs(v_load_to(x, i, n)), top);
    return v_reduce_max(top);
}

static inline void group_to_s8(const float *x, int begin, int n, float top, int8_t *q, float *scale, int32_t *sum)
{
    vf inverse = v_set1(top > 0.0f ? 127.0f / top : 0.0f);
    *scale = top / 127.0f;
    for (int half = 0; half < 2; half++) {
        vi total = vi_zero();
        for (int i = begin + half * OURO_GROUP4; i < begin + (half + 1) * OURO_GROUP4; i += V_WIDTH) {
            vf v = v_mul(v_load_to(x, i, n), inverse);
            if (i + V_WIDTH > n) v = v_first_of(v, v_zero(), i < n ? n - i : 0);
            vi r = vi_rint(v_max(v_min(v, v_set1(127.0f)), v_set1(-127.0f)));
            total = vi_add(total, r);
            vi_store_s8(q + i, r);
        }
        sum[half] = vi_sum(total);
    }
}

/* Some groups at a time, first the largest of each: rounding a group does not wait for its own maximum and a division. */
static void to_s8(const float *x, int n, int npad, int8_t *q, float *scale, int32_t *sum)
{
    float top[16];
    int groups = npad / OURO_GROUP;
    for (int g = 0, count; g < groups; g += count) {
        count = groups - g < 16 ? groups - g : 16;
        for (int i = 0; i < count; i++) top[i] = group_top(x, (g + i) * OURO_GROUP, n);
        for (int i = 0; i < count; i++)
            group_to_s8(x, (g + i) * OURO_GROUP, n, top[i], q, scale + g + i, sum + 2 * (size_t)(g + i));
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

#ifndef V_FOLD_FOUR
static inline void v_tree_four(const vf *a, float *y)
{
    for (int i = 0; i < 4; i++) y[i] = v_tree(a[i]);
}
static inline void v_max_four(const vf *a, float *y)
{
    for (int i = 0; i < 4; i++) y[i] = v_reduce_max(a[i]);
}
#endif

/* the largest of the first n of 64, sixteen at a time: a vector whose largest element it is */
static inline vf softmax_top(const float *s, int n)
{
    vf none = v_set1(-INFINITY), top = none;
    if (n == OURO_BLOCK) {
        V_UNROLL for (int i = 0; i < OURO_BLOCK; i += V_WIDTH) top = v_max(v_load(s + i), top);
        return top;
    }
    for (int i = 0; i < n; i += V_WIDTH) top = v_max(v_first_of(v_load(s + i), none, n < i + V_WIDTH ? n - i : V_WIDTH), top);
    return top;
}

/* p of sixteen scores, of which the first n are seen, and its part of the sum */
static inline vf softmax_part(const int as_bf16, const float *s, int n, vf scale, vf m, void *p, int at, vf sum)
{
    vf e = v_exp_low(v_sub(v_mul(v_load(s + at), scale), m));
    if (n < V_WIDTH) e = v_first_of(e, v_zero(), n > 0 ? n : 0);
    if (as_bf16) {
        v_store_bf16((uint16_t *)p + at, e);
        e = v_widen_bf16((uint16_t *)p + at);
    } else {
        v_store((float *)p + at, e);
    }
    return v_add(sum, e);
}

/* p of one row; returns its sixteen partial sums */
static inline vf softmax_row(const int as_bf16, const float *s, int n, vf scale, vf m, void *p)
{
    vf sum = v_zero();
    if (n == OURO_BLOCK) {
        V_UNROLL for (int i = 0; i < OURO_BLOCK; i += V_WIDTH) sum = softmax_part(as_bf16, s, V_WIDTH, scale, m, p, i, sum);
        return sum;
    }
    for (int i = 0; i < OURO_BLOCK; i += V_WIDTH) sum = softmax_part(as_bf16, s, n - i, scale, m, p, i, sum);
    return sum;
}

/* At most V_SOFTMAX_ROWS rows. The largest scaled score is the largest score, scaled: rounding keeps the order. */
static inline void softmax_some(const int as_bf16, const float *s, int n, const int *visible, float scale, float *m, float *l,
                                float *alpha, uint8_t *p, size_t stride)
{
    float top[V_SOFTMAX_ROWS], sum[V_SOFTMAX_ROWS];
    vf four[4];
    int r = 0;
    for (; r + 4 <= n; r += 4) {
        V_UNROLL for (int i = 0; i < 4; i++) four[i] = softmax_top(s + (size_t)(r + i) * OURO_BLOCK, visible[r + i]);
        v_max_four(four, top + r);
    }
    for (; r < n; r++) top[r] = v_reduce_max(softmax_top(s + (size_t)r * OURO_BLOCK, visible[r]));
    vf old = v_load_n(m, n), factor = v_set1(scale);
    vf now = v_add(v_max(v_mul(v_load_n(top, n), factor), old), v_zero());
    v_store(top, now);
    for (r = 0; r + 4 <= n; r += 4) {
        V_UNROLL for (int i = 0; i < 4; i++)
            four[i] = softmax_row(as_bf16, s + (size_t)(r + i) * OURO_BLOCK, visible[r + i], factor, v_set1(top[r + i]),
                                  p + (size_t)(r + i) * stride);
        v_tree_four(four, sum + r);
    }
    for (; r < n; r++)
        sum[r] = v_tree(softmax_row(as_bf16, s + (size_t)r * OURO_BLOCK, visible[r], factor, v_set1(top[r]), p + (size_t)r * stride));
    vf a = v_exp(v_sub(old, now));
    v_store_n(m, now, n);
    v_store_n(alpha, a, n);
    v_store_n(l, v_fma(v_load_n(l, n), a, v_load_n(sum, n)), n);
}

static inline void softmax_rows(const int as_bf16, const float *s, int n, const int *visible, float scale, float *m, float *l,
                                float *alpha, void *p, size_t stride)
{
    for (int r = 0; r < n; r += V_SOFTMAX_ROWS)
        softmax_some(as_bf16, s + (size_t)r * OURO_BLOCK, n - r < V_SOFTMAX_ROWS ? n - r : V_SOFTMAX_ROWS, visible + r, scale,
                     m + r, l + r, alpha + r, (uint8_t *)p + (size_t)r * stride, stride);
}

static void softmax_f32(const float *s, int n, const int *visible, float scale, float *m, float *l, float *alpha, void *p,
                        size_t stride)
{
    softmax_rows(0, s, n, visible, scale, m, l, alpha, p, stride);
}

static void softmax_bf16(const float *s, int n, const int *visible, float scale, float *m, float *l, float *alpha, void *p,
                         size_t stride)
{
    softmax_rows(1, s, n, visible, scale, m, l, alpha, p, stride);
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

static void s8_to_bf16(const int8_t *q, int k, int rows, uint16_t *y, const void *next)
{
    for (int i = 0; i < k; i += 2, q += 2 * (size_t)rows) {
        const size_t from = (size_t)i * (size_t)rows, to = from + 2 * (size_t)rows;
        for (size_t at = from; next && at < to; at += 64) V_PREFETCH((uintptr_t)next + at);
        for (int r = 0; r < rows; r += V_WIDTH, y += 2 * V_WIDTH) v_expand_pairs(q + r, q + rows + r, y);
    }
}
