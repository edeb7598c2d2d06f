/* test_kernels_pack.c - packing and unpacking: exact for bf16 and f32, within half a step for int8 and int4, every
 * source type, every column count; the int4 search of scales is no worse than the plain choice.
 */
#include "kernels_testing.h"

#include <stdlib.h>

static ouro_matrix packed(ouro_format format, int rows, int cols)
{
    ouro_matrix m;
    ouro_matrix_layout(&m, format, rows, cols, (rows + OURO_TILE - 1) / OURO_TILE);
    m.data = ouro_alloc(ouro_matrix_bytes(&m));
    memset(m.data, 0, ouro_matrix_bytes(&m));
    return m;
}

/* one row of a source type, and the same values as f32 */
static void source_row(uint64_t *seed, ouro_dtype dtype, int cols, void *src, float *values)
{
    for (int i = 0; i < cols; i++) {
        if (dtype == OURO_DT_F32) ((float *)src)[i] = awkward(seed);
        else if (dtype == OURO_DT_BF16) ((uint16_t *)src)[i] = ouro_f32_to_bf16(awkward(seed));
        else ((uint16_t *)src)[i] = (uint16_t)((next_random(seed) & 0x83ffu) | (uint64_t)below(seed, 31) << 10);
    }
    ouro_widen(dtype, src, (size_t)cols, values);
}

static void test_exact(void)
{
    static const ouro_dtype dtypes[] = {OURO_DT_BF16, OURO_DT_F16, OURO_DT_F32};
    uint64_t seed = 7;
    for (int cols = 1; cols < 40; cols++)
        for (int d = 0; d < 3; d++) {
            ouro_matrix f = packed(OURO_F32, 20, cols), b = packed(OURO_BF16, 20, cols);
            float src[40], values[40], back[40];
            for (int slot = 0; slot < 20; slot++) {
                source_row(&seed, dtypes[d], cols, src, values);
                ouro_matrix_put_row(&f, slot, dtypes[d], src);
                ouro_matrix_get_row(&f, slot, back);
                EXPECT(!memcmp(values, back, (size_t)cols * 4), "f32 round trip, dtype %d cols %d", d, cols);
                ouro_matrix_put_row(&b, slot, dtypes[d], src);
                ouro_matrix_get_row(&b, slot, back);
                int same = 1;
                for (int i = 0; i < cols; i++) {
                    /* bf16 sources are copied bit for bit, others are rounded */
                    float want = dtypes[d] == OURO_DT_BF16 ? values[i] : ouro_bf16_to_f32(ouro_f32_to_bf16(values[i]));
                    same = same && ouro_bits(back[i]) == ouro_bits(want);
                }
                EXPECT(same, "bf16 round trip, dtype %d cols %d", d, cols);
            }
            ouro_free(f.data);
            ouro_free(b.data);
        }
}

static void test_f16(void)
{
    int wrong = 0;
    for (uint32_t h = 0; h < 0x10000u; h++) {
        uint16_t half = (uint16_t)h;
        float x;
        ouro_widen(OURO_DT_F16, &half, 1, &x);
        int e = (int)(h >> 10 & 31u);
        double fraction = (double)(h & 0x3ffu), sign = h & 0x8000u ? -1.0 : 1.0;
        if (e == 31) wrong += fraction > 0 ? !isnan(x) : x != (float)(sign * INFINITY);
        else wrong += (double)x != sign * (e ? ldexp(1024.0 + fraction, e - 25) : ldexp(fraction, -24));
    }
    EXPECT(!wrong, "%d of 65536 f16 values are widened wrongly", wrong);
}

/* largest error of one group, in units of what the format promises */
static void test_quantised(ouro_format format)
{
    uint64_t seed = 8;
    int group = format == OURO_INT8 ? OURO_GROUP : OURO_GROUP4;
    for (int round = 0; round < 200; round++) {
        int cols = 1 + below(&seed, 400);
        ouro_matrix m = packed(format, 3, cols);
        float *w = calloc((size_t)cols, sizeof *w), *back = calloc((size_t)cols, sizeof *back);
        float size = ouro_from_bits((uint32_t)(100 + below(&seed, 50)) << 23);
        for (int i = 0; i < cols; i++) w[i] = size * normal(&seed);
        if (round % 5 == 0) memset(w, 0, (size_t)(cols < group ? cols : group) * sizeof *w);
        ouro_matrix_put_row(&m, 2, OURO_DT_F32, w);
        ouro_matrix_get_row(&m, 2, back);
        for (int g = 0; g < cols; g += group) {
            float amax = 0.0f, worst = 0.0f;
            for (int i = g; i < g + group && i < cols; i++) {
                amax = fmaxf(amax, fabsf(w[i]));
                worst = fmaxf(worst, fabsf(w[i] - back[i]));
            }
            /* int8: half a step, plus the clamped end when the bf16 scale rounded down (1/256 of amax at most).
             * int4: the least error over scales; one value may clamp at 7 of 8 */
            float bound = format == OURO_INT8 ? amax * (0.5f / 127.0f + 0.0045f) : amax * 0.26f;
            EXPECT(worst <= bound, "format %d: error %g of a group with maximum %g", format, (double)worst, (double)amax);
        }
        ouro_free(m.data);
        free(w);
        free(back);
    }
}

/* one value that is not finite: the whole group shows it, the others are not touched */
static void test_not_finite(void)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const ouro_format formats[] = {OURO_INT8, OURO_INT4};
    for (int f = 0; f < 2; f++)
        for (int b = 0; b < 3; b++) {
            ouro_matrix m = packed(formats[f], 1, 2 * OURO_GROUP);
            float w[2 * OURO_GROUP], back[2 * OURO_GROUP];
            for (int i = 0; i < 2 * OURO_GROUP; i++) w[i] = (float)(i % 7) - 3.0f;
            w[130] = bad[b];
            ouro_matrix_put_row(&m, 0, OURO_DT_F32, w);
            ouro_matrix_get_row(&m, 0, back);
            EXPECT(isnan(back[130]) && isnan(back[190]), "format %d: %g is hidden", formats[f], (double)bad[b]);
            EXPECT(fabsf(back[0] - w[0]) < 0.3f && fabsf(back[127] - w[127]) < 0.3f, "format %d: a neighbour is touched", formats[f]);
            ouro_free(m.data);
        }
}

/* quantised values go in as they are, for any number of columns, and others are clamped */
static void test_given_int4(void)
{
    uint64_t seed = 10;
    for (int cols = 1; cols < 300; cols += 13) {
        ouro_matrix m = packed(OURO_INT4, 3, cols);
        int groups = (cols + OURO_GROUP4 - 1) / OURO_GROUP4, wrong = 0;
        uint16_t scales[8];
        int8_t q[300];
        float back[300];
        for (int g = 0; g < groups; g++) scales[g] = ouro_f32_to_bf16(normal(&seed));
        for (int i = 0; i < cols; i++) q[i] = (int8_t)(below(&seed, 20) - 10);
        ouro_matrix_put_int4(&m, 1, scales, q);
        ouro_matrix_get_row(&m, 1, back);
        for (int i = 0; i < cols; i++) {
            float v = (float)(q[i] < -8 ? -8 : q[i] > 7 ? 7 : q[i]);
            wrong += back[i] != v * ouro_bf16_to_f32(scales[i / OURO_GROUP4]);
        }
        EXPECT(!wrong, "%d of %d given int4 values come back otherwise", wrong, cols);
        ouro_free(m.data);
    }
}

/* squared error of int4 as packed, and of the plain choice -extreme / 8 */
static void test_search(void)
{
    uint64_t seed = 9;
    double searched = 0.0, plain = 0.0;
    int worse = 0;
    for (int round = 0; round < 500; round++) {
        ouro_matrix m = packed(OURO_INT4, 1, OURO_GROUP4);
        float w[OURO_GROUP4], back[OURO_GROUP4], extreme = 0.0f;
        for (int i = 0; i < OURO_GROUP4; i++) {
            w[i] = normal(&seed);
            if (fabsf(w[i]) > fabsf(extreme)) extreme = w[i];
        }
        ouro_matrix_put_row(&m, 0, OURO_DT_F32, w);
        ouro_matrix_get_row(&m, 0, back);
        double a = 0.0, b = 0.0;
        float s = ouro_bf16_to_f32(ouro_f32_to_bf16(extreme / -8.0f));
        for (int i = 0; i < OURO_GROUP4; i++) {
            float q = fminf(7.0f, fmaxf(-8.0f, rintf(w[i] / s)));
            a += (double)(w[i] - back[i]) * (double)(w[i] - back[i]);
            b += (double)(w[i] - q * s) * (double)(w[i] - q * s);
        }
        worse += a > b * 1.0001;
        searched += a;
        plain += b;
        ouro_free(m.data);
    }
    EXPECT(!worse, "int4: the search is worse than the plain scale in %d of 500 groups", worse);
    EXPECT(searched < 0.97 * plain, "int4: the search gains too little: %g against %g", searched, plain);
}

static void test_packing(void)
{
    test_exact();
    test_f16();
    test_quantised(OURO_INT8);
    test_quantised(OURO_INT4);
    test_search();
    test_not_finite();
    test_given_int4();
}

static void nothing(const ouro_kernels *k) { (void)k; }

int main(void)
{
    return kernels_test_main("test_kernels_pack", nothing, test_packing);
}
