/* vec_neon.h - sixteen lanes for AArch64: four registers of four. The primitives are those of vec_avx512.h.
 *
 * The bf16 pair product is two fused multiply-adds, odd element first; the instruction BFDOT rounds differently and is
 * not used. int8 weights lose their offset of 128 and are multiplied as s8, by SDOT where the file is built for it
 * (-march=armv8.2-a+dotprod) and by widening products elsewhere; built for i8mm, USDOT takes them as they are. The integer
 * is the same.
 */
#ifndef OURO_KERNELS_VEC_NEON_H
#define OURO_KERNELS_VEC_NEON_H

#include <arm_neon.h>
#include <string.h>

#define V_LANES 4                               /* lanes of the largest register block */
#define V_FLOAT_LANES 4
#define V_INT_LANES 4
#define V_INT_ALONE 4
#define V_TILES(kind, lanes) ((lanes) <= 1 ? 2 : 1)     /* tiles worked on at once */
#define V_KEEP 2                                /* int kinds: float accumulators that fit beside the sums */
/* bytes ahead that weights are asked for, and once more; see vec_avx512.h */
#define V_AHEAD(kind, lanes) ((kind) == V_INT4 || (lanes) >= 2 ? 8192 : 0)
#define V_AGAIN(kind, lanes) 0
/* the instances X(kind, tiles, lanes) of a register block */
#define V_INT_INSTANCES V_INSTANCES
#define V_INSTANCES(X, kind) X(kind, 1, 1) X(kind, 1, 2) X(kind, 1, 3) X(kind, 1, 4) X(kind, 2, 1)
#define V_SIDE_INSTANCES(X, kind) V_INSTANCES(X, kind) X(kind, 4, 1)
#define V_S8_LANES 1
#define V_S8_INSTANCES(X, kind) X(kind, 1, 1) X(kind, 2, 1) X(kind, 4, 1)
#define V_SIDE_TILES(kind, lanes) ((lanes) <= 1 ? 4 : 1)

typedef struct vf { float32x4_t v[4]; } vf;
typedef struct vi { int32x4_t v[4]; } vi;

#define V_EACH(type, expression) \
    type y; \
    for (int i = 0; i < 4; i++) y.v[i] = (expression); \
    return y

static inline vf v_set1(float a) { V_EACH(vf, vdupq_n_f32(a)); }
static inline vf v_zero(void) { return v_set1(0.0f); }
static inline vf v_load(const float *p) { V_EACH(vf, vld1q_f32(p + 4 * i)); }
static inline void v_store(float *p, vf a)
{
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
static inline void v_stream(float *p, vf a) { v_store(p, a); }
static inline void v_stream_end(void) { }
static inline vf v_load_n(const float *p, int n)
{
    float part[16] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load(part);
}
static inline void v_store_n(float *p, vf a, int n)
{
    float part[16];
    v_store(part, a);
    memcpy(p, part, (size_t)n * sizeof *p);
}
/* the first n elements of a, the others of b; n in 0..16 */
static inline vf v_first_of(vf a, vf b, int n)
{
    static const int32_t at[4] = {0, 1, 2, 3};
    int32x4_t index = vld1q_s32(at);
    V_EACH(vf, vbslq_f32(vcltq_s32(index, vdupq_n_s32(n - 4 * i)), a.v[i], b.v[i]));
}

static inline vf v_add(vf a, vf b) { V_EACH(vf, vaddq_f32(a.v[i], b.v[i])); }
static inline vf v_sub(vf a, vf b) { V_EACH(vf, vsubq_f32(a.v[i], b.v[i])); }
static inline vf v_mul(vf a, vf b) { V_EACH(vf, vmulq_f32(a.v[i], b.v[i])); }
static inline vf v_div(vf a, vf b) { V_EACH(vf, vdivq_f32(a.v[i], b.v[i])); }
static inline vf v_fma(vf a, vf b, vf c) { V_EACH(vf, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
static inline vf v_fnma(vf a, vf b, vf c) { V_EACH(vf, vfmsq_f32(c.v[i], a.v[i], b.v[i])); }
/* by comparison: FMIN and FMAX treat NaN and zeros differently */
static inline vf v_min(vf a, vf b) { V_EACH(vf, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
static inline vf v_max(vf a, vf b) { V_EACH(vf, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
static inline uint32x4_t v_u32(float32x4_t a) { return vreinterpretq_u32_f32(a); }
static inline float32x4_t v_f32(uint32x4_t a) { return vreinterpretq_f32_u32(a); }
static inline vf v_abs(vf a) { V_EACH(vf, v_f32(vandq_u32(v_u32(a.v[i]), vdupq_n_u32(0x7fffffffu)))); }
static inline vf v_neg(vf a) { V_EACH(vf, v_f32(veorq_u32(v_u32(a.v[i]), vdupq_n_u32(0x80000000u)))); }
static inline vf v_rint(vf a) { V_EACH(vf, vrndnq_f32(a.v[i])); }
/* 2^n of an integer-valued n in -126..127 */
static inline vf v_pow2(vf n)
{
    V_EACH(vf, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
/* p 2^n of an integer-valued n in -126..127 */
static inline vf v_scale2(vf p, vf n) { return v_mul(p, v_pow2(n)); }
/* y, but 0 where x < bound */
static inline vf v_zero_below(vf x, vf bound, vf value)
{
    V_EACH(vf, v_f32(vbicq_u32(v_u32(value.v[i]), vcltq_f32(x.v[i], bound.v[i]))));
}

/* partial j with partial j + half, four times: the fixed tree */
static inline float v_tree(vf a)
{
    float32x4_t s4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
static inline float v_reduce_max(vf a)
{
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}

static inline vf v_widen_bf16(const uint16_t *p)
{
    V_EACH(vf, v_f32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
/* ouro_f32_to_bf16 of four */
static inline uint16x4_t v_round_quarter(float32x4_t x)
{
    uint32x4_t u = v_u32(x), top = vshrq_n_u32(u, 16);
    uint32x4_t even = vaddq_u32(vdupq_n_u32(0x7fff), vandq_u32(top, vdupq_n_u32(1)));
    uint32x4_t y = vshrq_n_u32(vaddq_u32(u, even), 16);
    uint32x4_t normal = vtstq_u32(u, vdupq_n_u32(0x7f800000u));
    y = vbslq_u32(normal, y, vandq_u32(top, vdupq_n_u32(0x8000u)));
    uint32x4_t number = vceqq_f32(x, x);
    return vmovn_u32(vbslq_u32(number, y, vorrq_u32(top, vdupq_n_u32(0x40))));
}
static inline void v_store_bf16(uint16_t *p, vf a)
{
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, v_round_quarter(a.v[i]));
}

/* ---- integers ------------------------------------------------------------------------------------------------ */

static inline vi vi_set1(int32_t a) { V_EACH(vi, vdupq_n_s32(a)); }
static inline vi vi_zero(void) { return vi_set1(0); }
static inline vi vi_add(vi a, vi b) { V_EACH(vi, vaddq_s32(a.v[i], b.v[i])); }
static inline int32_t vi_sum(vi a)
{
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
static inline vi vi_rint(vf a) { V_EACH(vi, vcvtnq_s32_f32(a.v[i])); }
static inline vf v_from_int(vi a) { V_EACH(vf, vcvtq_f32_s32(a.v[i])); }
static inline void vi_store_s8(int8_t *p, vi a)
{
    int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
static inline vf v_widen_s8(const int8_t *p)
{
    int8x16_t q = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_s8(vget_high_s8(q));
    return v_from_int((vi){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                            vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}});
}

/* sixteen s8 of each of two rows as bf16 in turns: whole numbers of seven bits, whose low halves are 0 */
static inline void v_expand_pairs(const int8_t *a, const int8_t *b, uint16_t *y)
{
    vf low = v_widen_s8(a), high = v_widen_s8(b);
    for (int i = 0; i < 4; i++)
        vst1q_u16(y + 8 * i, vreinterpretq_u16_u32(vorrq_u32(vshrq_n_u32(v_u32(low.v[i]), 16), v_u32(high.v[i]))));
}

/* ---- product units --------------------------------------------------------------------------------------------- */

/* a macro: gcc 12 takes an inline function that only prefetches for a pure one and drops the calls */
#define V_PREFETCH(p) __builtin_prefetch((const void *)(p), 0, 2)
#define V_PREFETCH_OUT(p) __builtin_prefetch(p, 1, 3)
static inline vf v_bcast(const uint8_t *p) { return v_set1(*(const float *)(const void *)p); }

/* bf16 weights times f32: the pair widened */
typedef struct v_pair { vf even, odd; } v_pair;
static inline v_pair v_load_pair(const uint8_t *p)
{
    v_pair y;
    for (int i = 0; i < 4; i++) {
        uint32x4_t w = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
        y.even.v[i] = v_f32(vshlq_n_u32(w, 16));
        y.odd.v[i] = v_f32(vandq_u32(w, vdupq_n_u32(0xffff0000u)));
    }
    return y;
}

/* bf16 weights times bf16 */
typedef v_pair v_bw;
typedef struct v_bx { float even, odd; } v_bx;
static inline v_bw v_load_bw(const uint8_t *p) { return v_load_pair(p); }
static inline v_bx v_load_bx(const uint8_t *p)
{
    uint32_t u, low;
    v_bx x;
    memcpy(&u, p, sizeof u);
    low = u << 16;
    u &= 0xffff0000u;
    memcpy(&x.even, &low, sizeof low);
    memcpy(&x.odd, &u, sizeof u);
    return x;
}
static inline vf v_dot_bf16(vf acc, v_bw w, v_bx x)
{
    return v_fma(w.even, v_set1(x.even), v_fma(w.odd, v_set1(x.odd), acc));
}

/* u8 weights times s8 */
typedef int8x16_t v_ix;
#if defined(__ARM_FEATURE_MATMUL_INT8)
typedef struct v_iw { uint8x16_t v[4]; } v_iw;
#define V_INT8_START(offset_sum) vi_set1(offset_sum)
#define V_TO_IW(w) (w)
static inline v_iw v_load_int8(const uint8_t *p) { V_EACH(v_iw, vld1q_u8(p + 16 * i)); }
#else
typedef struct v_iw { int8x16_t v[4]; } v_iw;
#define V_INT8_START(offset_sum) ((void)(offset_sum), vi_zero())
#define V_TO_IW(w) vreinterpretq_s8_u8(w)
static inline v_iw v_load_int8(const uint8_t *p)
{
    V_EACH(v_iw, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(0x80))));
}
#endif
#define V_INT4_START(offset_sum) vi_set1(offset_sum)
static inline void v_load_int4(const uint8_t *p, v_iw *low, v_iw *high)
{
    for (int i = 0; i < 4; i++) {
        uint8x16_t b = vld1q_u8(p + 16 * i);
        low->v[i] = V_TO_IW(vandq_u8(b, vdupq_n_u8(15)));
        high->v[i] = V_TO_IW(vshrq_n_u8(b, 4));
    }
}
static inline v_ix v_load_ix(const uint8_t *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define v_dot_quarter vusdotq_s32
#elif defined(__ARM_FEATURE_DOTPROD)
#define v_dot_quarter vdotq_s32
#else
static inline int32x4_t v_dot_quarter(int32x4_t acc, int8x16_t w, int8x16_t x)
{
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
    return vaddq_s32(acc, vpaddq_s32(low, high));
}
#endif
static inline vi v_dot_int8(vi acc, v_iw w, v_ix x) { V_EACH(vi, v_dot_quarter(acc.v[i], w.v[i], x)); }
/* int4 adds up in the 32-bit sums themselves; see vec_avx2.h for where it does not */
#define V_PART_UNITS 8
typedef vi v_part;
static inline v_part v_part_begin(vi sum) { return sum; }
static inline vi v_part_end(vi sum, v_part part) { return (void)sum, part; }
static inline v_part v_dot_int4(v_part acc, v_iw w, v_ix x) { return v_dot_int8(acc, w, x); }

#endif
