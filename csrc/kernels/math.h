/* math.h - scalar arithmetic that has exactly one result: bf16 rounding, exp, log, the 16-partial tree.
 *
 * Vector files repeat these operation by operation; the constants live here so that they cannot drift apart.
 * exp: x = n ln2 + r, |r| <= ln2/2, degree-6 polynomial in r (relative error below 1.2e-7), times 2^n. Below
 * OURO_EXP_LO the result is 0, above OURO_EXP_HI it is exp(OURO_EXP_HI).
 */
#ifndef OURO_KERNELS_MATH_H
#define OURO_KERNELS_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define OURO_EXP_LO (-87.0f)
#define OURO_EXP_HI 88.0f
#define OURO_LOG2E 1.44269504088896341f
#define OURO_LN2_HI 0.693359375f
#define OURO_LN2_LO (-2.12194440e-4f)
#define OURO_EXP_C6 1.381454e-3f     /* least relative error over |r| <= ln2/2 with C0 = C1 = 1: 3e-9 before rounding; */
#define OURO_EXP_C5 8.368745e-3f     /* the Taylor terms 1/720, 1/120 ... would leave 1.2e-7 */
#define OURO_EXP_C4 4.166839e-2f
#define OURO_EXP_C3 1.6666521e-1f
#define OURO_EXP_C2 0.49999994f
#define OURO_EXP_C1 1.0f
#define OURO_EXP_C0 1.0f

static inline uint32_t ouro_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float ouro_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float ouro_bf16_to_f32(uint16_t b) { return ouro_from_bits((uint32_t)b << 16); }

/* Nearest even; denormals become signed zero, NaN stays a (quiet) NaN: the rules of vcvtneps2bf16. */
static inline uint16_t ouro_f32_to_bf16(float x)
{
    uint32_t u = ouro_bits(x);
    if ((u & 0x7f800000u) == 0) return (uint16_t)((u & 0x80000000u) >> 16);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float ouro_expf(float x)
{
    float lo = x < OURO_EXP_LO ? 0.0f : 1.0f;
    if (!(x > OURO_EXP_LO)) x = OURO_EXP_LO;
    if (!(x < OURO_EXP_HI)) x = OURO_EXP_HI;
    float n = rintf(x * OURO_LOG2E);
    float r = fmaf(n, -OURO_LN2_HI, x);
    r = fmaf(n, -OURO_LN2_LO, r);
    float p = fmaf(OURO_EXP_C6, r, OURO_EXP_C5);
    p = fmaf(p, r, OURO_EXP_C4);
    p = fmaf(p, r, OURO_EXP_C3);
    p = fmaf(p, r, OURO_EXP_C2);
    p = fmaf(p, r, OURO_EXP_C1);
    p = fmaf(p, r, OURO_EXP_C0);
    return p * ouro_from_bits((uint32_t)((int32_t)n + 127) << 23) * lo;
}

static inline float ouro_siluf(float g) { return g / (1.0f + ouro_expf(-g)); }
static inline float ouro_sigmoidf(float g) { return 1.0f / (1.0f + ouro_expf(-g)); }

/* log of a positive normal double, to about 1e-15: x = 2^e m, m in [sqrt(1/2), sqrt(2)), 2 atanh((m-1)/(m+1)). Plain
 * double arithmetic, so that no C library's choice shows in a sampled token. */
static inline double ouro_log(double x)
{
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752440) {
        m *= 2.0;
        e -= 1;
    }
    double z = (m - 1.0) / (m + 1.0), z2 = z * z, s = 0.0;
    for (int k = 21; k >= 1; k -= 2) s = s * z2 + 1.0 / (double)k;
    return 2.0 * z * s + (double)e * 0.69314718055994530942;
}

/* The fixed tree over 16 partial sums; destroys p. */
static inline float ouro_tree16(float *p)
{
    for (int half = 8; half > 0; half >>= 1)
        for (int j = 0; j < half; j++) p[j] = p[j] + p[j + half];
    return p[0];
}

#endif
