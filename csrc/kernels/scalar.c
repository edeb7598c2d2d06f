/* scalar.c - the specification: each kernel of kernels.h in plain C, in the order every other file must follow.
 *
 * Kept for ever beside the fast versions, and never tuned: tests compare every vector file with this one by equality
 * of bits. It is also what runs where no vector file fits.
 */
#include "kernels/kernels.h"
#include "kernels/math.h"

/* ---- products ---------------------------------------------------------------------------------------------- */

/* unit u of a tile */
static const void *unit_of(const ouro_matrix *w, int tile, int u)
{
    return w->data + (size_t)tile * w->tile_bytes + (size_t)u * w->unit_bytes;
}

static const void *acts_row(const ouro_acts *x, int lane) { return x->data + (size_t)lane * x->stride; }

/* one element of a F32, BF16 or S8 tile */
static float element_of(const ouro_matrix *w, int tile, int row, int k)
{
    if (w->format == OURO_F32) return ((const float *)unit_of(w, tile, k))[row];
    if (w->format == OURO_S8) return ((const int8_t *)unit_of(w, tile, k))[row];
    return ouro_bf16_to_f32(((const uint16_t *)unit_of(w, tile, k / 2))[2 * row + k % 2]);
}

/* acc [16]: one tile times one f32 row, k ascending */
static void tile_times_f32(const ouro_matrix *w, int tile, const float *x, float *acc)
{
    for (int k = 0; k < w->kpad; k++)
        for (int r = 0; r < OURO_TILE; r++) acc[r] = fmaf(element_of(w, tile, r, k), x[k], acc[r]);
}

/* acc [16]: one bf16 or S8 tile times one bf16 row; the odd element of each pair first, as vdpbf16ps does */
static void tile_times_bf16(const ouro_matrix *w, int tile, const uint16_t *x, float *acc)
{
    for (int k = 0; k < w->kpad; k += 2) {
        float x0 = ouro_bf16_to_f32(x[k]), x1 = ouro_bf16_to_f32(x[k + 1]);
        for (int r = 0; r < OURO_TILE; r++) {
            acc[r] = fmaf(element_of(w, tile, r, k + 1), x1, acc[r]);
            acc[r] = fmaf(element_of(w, tile, r, k), x0, acc[r]);
        }
    }
}

/* acc [16]: one int8 tile times one s8 row with its scales */
static void tile_times_int8(const ouro_matrix *w, int tile, const int8_t *x, const float *xs, const int32_t *sum,
                            float *acc)
{
    int groups = w->kpad / OURO_GROUP;
    const uint8_t *base = w->data + (size_t)tile * w->tile_bytes;
    const uint16_t *ws = (const uint16_t *)(const void *)base;
    const uint8_t *q = base + (((size_t)groups * 2 * OURO_TILE + 63) & ~(size_t)63);
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < OURO_TILE; r++) {
            int32_t i = -128 * (sum[2 * g] + sum[2 * g + 1]);
            for (int v = 0; v < OURO_GROUP / 4; v++)
                for (int j = 0; j < 4; j++)
                    i += (int32_t)q[(((size_t)g * 32 + (size_t)v) * OURO_TILE + (size_t)r) * 4 + (size_t)j]
                         * x[g * OURO_GROUP + 4 * v + j];
            float scale = ouro_bf16_to_f32(ws[g * OURO_TILE + r]) * xs[g];
            acc[r] = fmaf((float)i, scale, acc[r]);
        }
}

/* acc [16]: one int4 tile times one s8 row with its scales */
static void tile_times_int4(const ouro_matrix *w, int tile, const int8_t *x, const float *xs, const int32_t *sum,
                            float *acc)
{
    int groups = w->kpad / OURO_GROUP4;
    const uint8_t *base = w->data + (size_t)tile * w->tile_bytes;
    const uint16_t *ws = (const uint16_t *)(const void *)base;
    const uint8_t *q = base + (((size_t)groups * 2 * OURO_TILE + 63) & ~(size_t)63);
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < OURO_TILE; r++) {
            int32_t i = -8 * sum[g];
            for (int v = 0; v < 8; v++)
                for (int j = 0; j < 4; j++) {
                    uint8_t b = q[(((size_t)g * 8 + (size_t)v) * OURO_TILE + (size_t)r) * 4 + (size_t)j];
                    i += (b & 15) * x[g * OURO_GROUP4 + 4 * v + j] + (b >> 4) * x[g * OURO_GROUP4 + 32 + 4 * v + j];
                }
            float scale = ouro_bf16_to_f32(ws[g * OURO_TILE + r]) * xs[g / 2];
            acc[r] = fmaf((float)i, scale, acc[r]);
        }
}

static void tile_times(const ouro_matrix *w, int tile, const ouro_acts *x, int lane, float *acc)
{
    const void *row = acts_row(x, lane);
    const float *xs = x->scale ? x->scale + (size_t)lane * (size_t)(x->kpad / OURO_GROUP) : NULL;
    const int32_t *sum = x->sum ? x->sum + (size_t)lane * (size_t)(x->kpad / OURO_GROUP4) : NULL;
    if (x->kind == OURO_ACT_F32) tile_times_f32(w, tile, row, acc);
    else if (x->kind == OURO_ACT_BF16) tile_times_bf16(w, tile, row, acc);
    else if (w->format == OURO_INT8) tile_times_int8(w, tile, row, xs, sum, acc);
    else tile_times_int4(w, tile, row, xs, sum, acc);
}

static void matmul(const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x, int lane0, int lane1, float *out,
                   size_t out_stride, const float *kept)
{
    for (int tile = tile0; tile < tile1; tile++)
        for (int lane = lane0; lane < lane1; lane++) {
            float *y = out + (size_t)lane * out_stride + (size_t)tile * OURO_TILE, acc[OURO_TILE];
            for (int r = 0; r < OURO_TILE; r++) acc[r] = kept ? y[r] * kept[lane] : 0.0f;
            tile_times(w, tile, x, lane, acc);
            memcpy(y, acc, sizeof acc);
        }
}

static void chain(const ouro_matrix *w, int n, const ouro_acts *x, size_t x_step, int lane0, int lane1, float *out,
                  size_t out_stride, const float *kept, size_t kept_step)
{
    ouro_acts part = *x;
    for (int i = 0; i < n; i++, part.data += x_step)
        matmul(&w[i], 0, w[i].tiles, &part, lane0, lane1, out, out_stride, kept + (size_t)i * kept_step);
}

static void swiglu(const ouro_matrix *w, int pair0, int pair1, const ouro_acts *x, int lane0, int lane1, void *out,
                   size_t out_stride)
{
    for (int pair = pair0; pair < pair1; pair++)
        for (int lane = lane0; lane < lane1; lane++) {
            size_t at = (size_t)lane * out_stride + (size_t)pair * OURO_TILE;
            float gate[OURO_TILE] = {0}, up[OURO_TILE] = {0};
            tile_times(w, 2 * pair, x, lane, gate);
            tile_times(w, 2 * pair + 1, x, lane, up);
            for (int r = 0; r < OURO_TILE; r++) {
                float y = ouro_siluf(gate[r]) * up[r];
                if (x->kind == OURO_ACT_BF16) ((uint16_t *)out)[at + (size_t)r] = ouro_f32_to_bf16(y);
                else ((float *)out)[at + (size_t)r] = y;
            }
        }
}

static void swiglu_rows(const float *g, const float *u, int n, float *y)
{
    for (int i = 0; i < n; i++) y[i] = ouro_siluf(g[i]) * u[i];
}

/* ---- rows ---------------------------------------------------------------------------------------------------- */

static float dot(const float *x, const float *w, int n)
{
    float p[16] = {0};
    for (int i = 0; i < n; i++) p[i & 15] = fmaf(x[i], w[i], p[i & 15]);
    return ouro_tree16(p);
}

static float inverse_rms(const float *x, float eps, int d) { return 1.0f / sqrtf(dot(x, x, d) / (float)d + eps); }

static float rmsnorm(const float *x, const float *w, float eps, int d, float *y)
{
    float r = inverse_rms(x, eps, d);
    for (int i = 0; i < d; i++) y[i] = (x[i] * r) * w[i];
    return r;
}

static void add_rmsnorm(float *h, const float *a, const float *w, float eps, int d)
{
    float r = inverse_rms(a, eps, d);
    for (int i = 0; i < d; i++) h[i] = h[i] + (a[i] * r) * w[i];
}

static void to_bf16(const float *x, int n, int npad, uint16_t *y)
{
    for (int i = 0; i < n; i++) y[i] = ouro_f32_to_bf16(x[i]);
    for (int i = n; i < npad; i++) y[i] = 0;
}

static void to_s8(const float *x, int n, int npad, int8_t *q, float *scale, int32_t *sum)
{
    for (int g = 0; g < npad / OURO_GROUP; g++) {
        int begin = g * OURO_GROUP, end = begin + OURO_GROUP < n ? begin + OURO_GROUP : n;
        float amax = 0.0f;
        for (int i = begin; i < end; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        float inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
        scale[g] = amax / 127.0f;
        sum[2 * g] = sum[2 * g + 1] = 0;
        for (int i = begin; i < begin + OURO_GROUP; i++) {
            /* an amax so small that its inverse overflows gives infinity * x: clamp, as the vector minimum does */
            float v = i < end ? x[i] * inverse : 0.0f;
            v = v < 127.0f ? v : 127.0f;
            v = v > -127.0f ? v : -127.0f;
            q[i] = (int8_t)(int32_t)rintf(v);
            sum[2 * g + (i - begin >= OURO_GROUP4)] += q[i];
        }
    }
}

static void rope(float *x, const float *c, const float *s, int dh)
{
    int half = dh / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fmaf(-b, s[i], a * c[i]);
        x[i + half] = fmaf(a, s[i], b * c[i]);
    }
}

/* the new maximum of one row; x [64] scaled scores; returns alpha */
static float softmax_open(const float *s, int n, float scale, float *m, float *x)
{
    float top = *m;
    for (int i = 0; i < n; i++) {
        x[i] = s[i] * scale;
        top = x[i] > top ? x[i] : top;
    }
    top += 0.0f;    /* -0 becomes +0: which zero the comparisons kept does not show */
    float alpha = ouro_expf(*m - top);
    *m = top;
    return alpha;
}

static void softmax_f32(const float *s, int n, const int *visible, float scale, float *m, float *l, float *alpha, void *p,
                        size_t stride)
{
    for (int r = 0; r < n; r++) {
        float x[OURO_BLOCK], sum[16] = {0}, *to = (float *)(void *)((uint8_t *)p + (size_t)r * stride);
        alpha[r] = softmax_open(s + (size_t)r * OURO_BLOCK, visible[r], scale, &m[r], x);
        for (int i = 0; i < OURO_BLOCK; i++) {
            to[i] = i < visible[r] ? ouro_expf(x[i] - m[r]) : 0.0f;
            sum[i & 15] += to[i];
        }
        l[r] = fmaf(l[r], alpha[r], ouro_tree16(sum));
    }
}

static void softmax_bf16(const float *s, int n, const int *visible, float scale, float *m, float *l, float *alpha, void *p,
                         size_t stride)
{
    for (int r = 0; r < n; r++) {
        float x[OURO_BLOCK], sum[16] = {0};
        uint16_t *to = (uint16_t *)(void *)((uint8_t *)p + (size_t)r * stride);
        alpha[r] = softmax_open(s + (size_t)r * OURO_BLOCK, visible[r], scale, &m[r], x);
        for (int i = 0; i < OURO_BLOCK; i++) {
            to[i] = i < visible[r] ? ouro_f32_to_bf16(ouro_expf(x[i] - m[r])) : 0;
            sum[i & 15] += ouro_bf16_to_f32(to[i]);
        }
        l[r] = fmaf(l[r], alpha[r], ouro_tree16(sum));
    }
}

static void scale_row(float *x, float a, int n)
{
    for (int i = 0; i < n; i++) x[i] *= a;
}

static void keep_row(const float *x, int n, float *y) { memcpy(y, x, (size_t)n * sizeof *x); }

static void keep_done(void) { }

static void scale_scores(float *s, const float *scale)
{
    for (int i = 0; i < OURO_BLOCK; i++) s[i] *= scale[i];
}

static void scale_weights(uint16_t *p, const float *scale)
{
    for (int i = 0; i < OURO_BLOCK; i++) p[i] = ouro_f32_to_bf16(ouro_bf16_to_f32(p[i]) * scale[i]);
}

static void softmax_stats(const float *z, int n, float *m, int *argmax, float *s, float *u)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (z[i] > z[best]) best = i;
    float ps[16] = {0}, pu[16] = {0};
    for (int i = 0; i < n; i++) {
        float x = z[i] - z[best], e = ouro_expf(x);
        ps[i & 15] += e;
        pu[i & 15] = fmaf(e, x, pu[i & 15]);
    }
    *m = z[best];
    *argmax = best;
    *s = ouro_tree16(ps);
    *u = ouro_tree16(pu);
}

static void s8_to_bf16(const int8_t *q, int k, int rows, uint16_t *y, const void *next)
{
    (void)next;
    for (int i = 0; i < k; i++)
        for (int r = 0; r < rows; r++) y[(i / 2 * rows + r) * 2 + i % 2] = ouro_f32_to_bf16((float)q[i * rows + r]);
}

const ouro_kernels ouro_kernels_scalar = {
    .name = "scalar",
    .matmul = {[OURO_F32] = {[OURO_ACT_F32] = matmul},
               [OURO_BF16] = {[OURO_ACT_F32] = matmul, [OURO_ACT_BF16] = matmul},
               [OURO_INT8] = {[OURO_ACT_S8] = matmul},
               [OURO_INT4] = {[OURO_ACT_S8] = matmul},
               [OURO_S8] = {[OURO_ACT_F32] = matmul, [OURO_ACT_BF16] = matmul}},
    .swiglu = {[OURO_F32] = {[OURO_ACT_F32] = swiglu},
               [OURO_BF16] = {[OURO_ACT_F32] = swiglu, [OURO_ACT_BF16] = swiglu},
               [OURO_INT8] = {[OURO_ACT_S8] = swiglu},
               [OURO_INT4] = {[OURO_ACT_S8] = swiglu}},
    .chain = chain,
    .swiglu_rows = swiglu_rows,
    .rmsnorm = rmsnorm,
    .add_rmsnorm = add_rmsnorm,
    .dot = dot,
    .to_bf16 = to_bf16,
    .to_s8 = to_s8,
    .rope = rope,
    .softmax = {[OURO_ACT_F32] = softmax_f32, [OURO_ACT_BF16] = softmax_bf16},
    .scale_row = scale_row, .keep_row = keep_row, .keep_done = keep_done,
    .scale_scores = scale_scores,
    .scale_weights = scale_weights,
    .softmax_stats = softmax_stats,
    .s8_to_bf16 = s8_to_bf16,
};
