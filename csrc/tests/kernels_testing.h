/* kernels_testing.h - what the kernel tests share: random numbers, checks, and a random product (matrix and lanes).
 *
 * A test program gives kernels_test_main a function to run for each vector table of this machine and one to run once.
 * It prints the number of checks that held, and returns 1 when one failed.
 */
#ifndef OURO_TESTS_KERNELS_TESTING_H
#define OURO_TESTS_KERNELS_TESTING_H

#include "base/cpu.h"
#include "base/memory.h"
#include "harness.h"
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "ouro_status.h"

#include <stdio.h>

/* number of positions that differ, two NaN being equal; the first such position */
static inline size_t differing(const float *a, const float *b, size_t n, size_t *where)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u = ouro_bits(a[i]), v = ouro_bits(b[i]);
        int both_nan = (u & 0x7fffffffu) > 0x7f800000u && (v & 0x7fffffffu) > 0x7f800000u;
        if (u != v && !both_nan && !count++) *where = i;
    }
    return count;
}

#define CHECK_SAME(want, got, n, ...) do { \
    size_t where_ = 0, bad_ = differing(want, got, n, &where_); \
    EXPECT(!bad_, __VA_ARGS__); \
    if (bad_ && harness_failed <= 50) \
        printf("    %zu of %zu differ, first at %zu: want %a, got %a\n", bad_, (size_t)(n), where_, \
               (double)(want)[where_], (double)(got)[where_]); \
    } while (0)

static inline uint64_t next_random(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* 0 .. n - 1 */
static inline int below(uint64_t *seed, int n) { return (int)(next_random(seed) % (uint64_t)n); }

/* both signs, forty powers of two around 1, now and then a zero or a denormal */
static inline float awkward(uint64_t *seed)
{
    uint64_t u = next_random(seed);
    uint32_t sign = (uint32_t)(u >> 63) << 31;
    if (u % 61 == 0) return ouro_from_bits(sign);
    if (u % 67 == 0) return ouro_from_bits(sign | (uint32_t)(u >> 20 & 0x7fffffu));
    return ouro_from_bits(sign | (uint32_t)(107 + u % 40) << 23 | (uint32_t)(u >> 20 & 0x7fffffu));
}

/* about normal, standard deviation 1 */
static inline float normal(uint64_t *seed)
{
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) sum += (float)(next_random(seed) >> 40) * 0x1p-24f;
    return sum - 6.0f;
}

/* a packed matrix and rows of activations for it */
typedef struct product {
    ouro_matrix w;
    ouro_acts x;
    int lanes;
} product;

/* float row [cols] into lane l, in the form of p->x.kind */
static inline void product_set_lane(product *p, int l, const float *row)
{
    uint8_t *to = p->x.data + (size_t)l * p->x.stride;
    if (p->x.kind == OURO_ACT_F32) {
        memset(to, 0, (size_t)p->x.kpad * 4);
        memcpy(to, row, (size_t)p->w.cols * 4);
    } else if (p->x.kind == OURO_ACT_BF16)
        ouro_kernels_scalar.to_bf16(row, p->w.cols, p->x.kpad, (uint16_t *)(void *)to);
    else
        ouro_kernels_scalar.to_s8(row, p->w.cols, p->x.kpad, (int8_t *)to, p->x.scale + l * (p->x.kpad / OURO_GROUP),
                                  p->x.sum + l * (p->x.kpad / OURO_GROUP4));
}

static inline product product_new(int format, int kind, int cols, int tiles, int lanes, uint64_t *seed)
{
    product p = {.lanes = lanes};
    ouro_matrix_layout(&p.w, (ouro_format)format, tiles * OURO_TILE, cols, tiles);
    p.w.data = ouro_alloc(ouro_matrix_bytes(&p.w));
    memset(p.w.data, 0, ouro_matrix_bytes(&p.w));
    size_t size = kind == OURO_ACT_F32 ? 4 : kind == OURO_ACT_BF16 ? 2 : 1;
    p.x.kind = kind;
    p.x.kpad = p.w.kpad;
    p.x.stride = (((size_t)p.x.kpad * size + 63) / 64 | 1) * 64;
    p.x.data = ouro_alloc(p.x.stride * (size_t)lanes);
    p.x.scale = ouro_alloc(sizeof(float) * (size_t)lanes * (size_t)(p.x.kpad / OURO_GROUP + 1));
    p.x.sum = ouro_alloc(sizeof(int32_t) * (size_t)lanes * (size_t)(p.x.kpad / OURO_GROUP4 + 1));
    float *row = ouro_alloc((size_t)cols * sizeof *row);
    for (int r = 0; r < tiles * OURO_TILE; r++) {
        for (int i = 0; i < cols; i++) row[i] = awkward(seed);
        if (r % 7 != 6) ouro_matrix_put_row(&p.w, r, OURO_DT_F32, row);     /* some rows stay unnamed */
    }
    for (int l = 0; l < lanes; l++) {
        for (int i = 0; i < cols; i++) row[i] = awkward(seed);
        product_set_lane(&p, l, row);
    }
    ouro_free(row);
    return p;
}

static inline void product_free(product *p)
{
    ouro_free(p->w.data);
    ouro_free(p->x.data);
    ouro_free(p->x.scale);
    ouro_free(p->x.sum);
}

static inline int kernels_test_main(const char *name, void (*each)(const ouro_kernels *), void (*once)(void))
{
    static const char *const tables[] = {"avx2", "avx_vnni", "avx_vnni_vl", "avx512", "neon", "neon_dot", "neon_i8mm"};
    long passed = harness_passed, failed = harness_failed;
    int ran = 0;
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        const ouro_kernels *k = ouro_kernels_select(tables[i]);
        if (!k) {
            printf("%s: skipped %s: %s\n", name, tables[i], ouro_last_error());
            continue;
        }
        unsigned mode = ouro_ftz_enter();
        each(k);
        ouro_ftz_leave(mode);
        ran++;
    }
    if (once) once();
    printf("%s: %ld checks held on %d vector tables\n", name, harness_passed - passed, ran);
    return harness_failed != failed;
}

#endif
