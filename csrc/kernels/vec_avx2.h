/* vec_avx2.h - sixteen lanes for AVX2 and FMA: two registers of eight. The primitives are those of vec_avx512.h. Built for
 * AVX-VNNI, or AVX512-VNNI with VL, the products of int8 and int4 are vpdpbusd of 256 bits.
 *
 * The bf16 pair product is two fused multiply-adds, odd element first, of what vdpbf16ps would multiply. The u8 by s8
 * product of vpmaddubsw saturates at 16 bits, so int8 weights are used as |w - 128| <= 128 and the sign is moved to the
 * activation (|x| <= 127): two products are at most 2 * 128 * 127 = 32512. The offset is then gone and the sum starts
 * at 0. Nibbles, 0..15, are far from the limit and keep their offset. vpdpbusd does not saturate and takes both as they are.
 * The integer is the same.
 */
#ifndef OURO_KERNELS_VEC_AVX2_H
#define OURO_KERNELS_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVXVNNI__)
#define V_DPBUSD "%{vex%} vpdpbusd"
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define V_DPBUSD "vpdpbusd"
#endif

#define V_FLOAT_LANES 4
#ifdef V_DPBUSD
#define V_LANES 6                               /* lanes of the largest register block */
#define V_INT_LANES 6                           /* twelve sums hide the latency of vpdpbusd, eight do not */
#define V_INT_ALONE 6
#else
#define V_LANES 4
#define V_INT_LANES 4
#define V_INT_ALONE 4
#endif
#define V_TILES(kind, lanes) ((lanes) <= 1 ? 2 : 1)     /* tiles worked on at once */
#ifdef __AVX512VL__                             /* thirty-two registers */
#define V_KEEP 6
#else
#define V_KEEP 2                                /* int kinds: float accumulators that fit beside the sums */
#endif
/* bytes ahead that weights are asked for, and once more; see vec_avx512.h */
#define V_AHEAD(kind, lanes) ((kind) == V_INT4 || (lanes) >= 2 ? 8192 : 0)
#define V_AGAIN(kind, lanes) 0
/* the instances X(kind, tiles, lanes) of a register block */
#ifdef V_DPBUSD
#define V_INT_INSTANCES(X, kind) V_INSTANCES(X, kind) X(kind, 1, 5) X(kind, 1, 6)
#else
#define V_INT_INSTANCES V_INSTANCES
#endif
#define V_INSTANCES(X, kind) X(kind, 1, 1) X(kind, 1, 2) X(kind, 1, 3) X(kind, 1, 4) X(kind, 2, 1)
#define V_SIDE_INSTANCES(X, kind) V_INSTANCES(X, kind) X(kind, 4, 1)
#define V_S8_LANES 1
#define V_S8_INSTANCES(X, kind) X(kind, 1, 1) X(kind, 2, 1) X(kind, 4, 1)
#define V_SIDE_TILES(kind, lanes) ((lanes) <= 1 ? 4 : 1)

typedef struct vf { __m256 a, b; } vf;
/* eight i32 by type, not __m256i (four i64): see vec_avx512.h */
typedef int32_t v_eight __attribute__((vector_size(32)));
typedef struct vi { v_eight a, b; } vi;

#define V_BOTH(type, f) ((type){f(p.a, q.a), f(p.b, q.b)})

static inline vf v_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf v_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf v_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void v_store(float *p, vf x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
/* past the caches; p 64-byte aligned. v_stream_end before others may read it */
static inline void v_stream(float *p, vf x)
{
    _mm256_stream_ps(p, x.a);
    _mm256_stream_ps(p + 8, x.b);
}
static inline void v_stream_end(void) { _mm_sfence(); }
static inline vf v_load_n(const float *p, int n)
{
    float part[16] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load(part);
}
static inline void v_store_n(float *p, vf x, int n)
{
    float part[16];
    v_store(part, x);
    memcpy(p, part, (size_t)n * sizeof *p);
}
/* the first n elements of p, the others of q; n in 0..16 */
static inline vf v_first_of(vf p, vf q, int n)
{
    __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), low = _mm256_set1_epi32(n), high = _mm256_set1_epi32(n - 8);
    return (vf){_mm256_blendv_ps(q.a, p.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(low, at))),
                _mm256_blendv_ps(q.b, p.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(high, at)))};
}

static inline vf v_add(vf p, vf q) { return V_BOTH(vf, _mm256_add_ps); }
static inline vf v_sub(vf p, vf q) { return V_BOTH(vf, _mm256_sub_ps); }
static inline vf v_mul(vf p, vf q) { return V_BOTH(vf, _mm256_mul_ps); }
static inline vf v_div(vf p, vf q) { return V_BOTH(vf, _mm256_div_ps); }
static inline vf v_min(vf p, vf q) { return V_BOTH(vf, _mm256_min_ps); }
static inline vf v_max(vf p, vf q) { return V_BOTH(vf, _mm256_max_ps); }
static inline vf v_fma(vf p, vf q, vf r)
{
    return (vf){_mm256_fmadd_ps(p.a, q.a, r.a), _mm256_fmadd_ps(p.b, q.b, r.b)};
}
static inline vf v_fnma(vf p, vf q, vf r)
{
    return (vf){_mm256_fnmadd_ps(p.a, q.a, r.a), _mm256_fnmadd_ps(p.b, q.b, r.b)};
}
static inline vf v_abs(vf x)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline vf v_neg(vf x)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
}
static inline vf v_rint(vf x)
{
    return (vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 v_pow2_half(__m256 n)
{
    __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
static inline vf v_pow2(vf n) { return (vf){v_pow2_half(n.a), v_pow2_half(n.b)}; }
/* p 2^n of an integer-valued n in -126..127 */
static inline vf v_scale2(vf p, vf n) { return v_mul(p, v_pow2(n)); }
/* y, but 0 where x < bound */
static inline vf v_zero_below(vf x, vf bound, vf y)
{
    return (vf){_mm256_and_ps(y.a, _mm256_cmp_ps(x.a, bound.a, _CMP_NLT_UQ)),
                _mm256_and_ps(y.b, _mm256_cmp_ps(x.b, bound.b, _CMP_NLT_UQ))};
}

/* partial j with partial j + half, four times: the fixed tree */
static inline float v_tree(vf x)
{
    __m256 s8 = _mm256_add_ps(x.a, x.b);
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
static inline float v_reduce_max(vf x)
{
    __m256 m8 = _mm256_max_ps(x.a, x.b);
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));
}

static inline __m256 v_widen_half(const uint16_t *p)
{
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
static inline vf v_widen_bf16(const uint16_t *p) { return (vf){v_widen_half(p), v_widen_half(p + 8)}; }

/* ouro_f32_to_bf16 of eight, each in the low half of a 32-bit word */
static inline __m256i v_round_half(__m256 x)
{
    __m256i u = _mm256_castps_si256(x), top = _mm256_srli_epi32(u, 16), one = _mm256_set1_epi32(1);
    __m256i even = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(top, one));
    __m256i y = _mm256_srli_epi32(_mm256_add_epi32(u, even), 16);
    __m256i exponent = _mm256_and_si256(u, _mm256_set1_epi32(0x7f800000));
    __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    y = _mm256_blendv_epi8(y, _mm256_and_si256(top, _mm256_set1_epi32(0x8000)), small);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(y, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
}
static inline void v_store_bf16(uint16_t *p, vf x)
{
    __m256i y = _mm256_packus_epi32(v_round_half(x.a), v_round_half(x.b));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(y, 0xd8));
}

/* ---- integers ------------------------------------------------------------------------------------------------ */

static inline vi vi_of(__m256i a, __m256i b) { return (vi){(v_eight)a, (v_eight)b}; }
static inline vi vi_zero(void) { return vi_of(_mm256_setzero_si256(), _mm256_setzero_si256()); }
static inline vi vi_set1(int32_t x) { return vi_of(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static inline vi vi_add(vi p, vi q) { return (vi){p.a + q.a, p.b + q.b}; }
static inline int32_t vi_sum(vi x)
{
    __m256i s8 = (__m256i)(x.a + x.b);
    __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
}
static inline vi vi_rint(vf x) { return vi_of(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)); }
static inline vf v_from_int(vi x)
{
    return (vf){_mm256_cvtepi32_ps((__m256i)x.a), _mm256_cvtepi32_ps((__m256i)x.b)};
}
static inline void vi_store_s8(int8_t *p, vi x)
{
    __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.a, (__m256i)x.b), 0xd8);
    __m128i y = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128((__m128i *)(void *)p, y);
}
static inline vf v_widen_s8(const int8_t *p)
{
    __m128i x = _mm_loadu_si128((const __m128i *)(const void *)p);
    return v_from_int(vi_of(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))));
}

/* sixteen s8 of each of two rows as bf16 in turns: whole numbers of seven bits, whose low halves are 0 */
static inline void v_expand_pairs(const int8_t *a, const int8_t *b, uint16_t *y)
{
    vf low = v_widen_s8(a), high = v_widen_s8(b);
    __m256i first = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low.a), 16), _mm256_castps_si256(high.a));
    __m256i second = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(low.b), 16), _mm256_castps_si256(high.b));
    _mm256_storeu_si256((__m256i *)(void *)y, first);
    _mm256_storeu_si256((__m256i *)(void *)(y + 16), second);
}

/* ---- product units --------------------------------------------------------------------------------------------- */

/* a macro: gcc 12 takes an inline function that only prefetches for a pure one and drops the calls */
#define V_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define V_PREFETCH_OUT(p) __asm__ volatile("prefetchw %0" : : "m"(*(const char *)(p)))
static inline __m256i v_bytes(const uint8_t *p) { return _mm256_load_si256((const __m256i *)(const void *)p); }
static inline __m256i v_word(const uint8_t *p) { return _mm256_set1_epi32(*(const int32_t *)(const void *)p); }
static inline vf v_bcast(const uint8_t *p) { return v_set1(*(const float *)(const void *)p); }

/* bf16 weights times f32: the pair widened */
typedef struct v_pair { vf even, odd; } v_pair;
static inline __m256 v_even(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
static inline __m256 v_odd(__m256i w)
{
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u)));
}
static inline v_pair v_load_pair(const uint8_t *p)
{
    __m256i a = v_bytes(p), b = v_bytes(p + 32);
    return (v_pair){{v_even(a), v_even(b)}, {v_odd(a), v_odd(b)}};
}

/* bf16 weights times bf16 */
typedef v_pair v_bw;
typedef struct v_bx { __m256 even, odd; } v_bx;
static inline v_bw v_load_bw(const uint8_t *p) { return v_load_pair(p); }
static inline v_bx v_load_bx(const uint8_t *p)
{
    __m256i x = v_word(p);
    return (v_bx){v_even(x), v_odd(x)};
}
static inline vf v_dot_bf16(vf acc, v_bw w, v_bx x)
{
    acc = v_fma(w.odd, (vf){x.odd, x.odd}, acc);
    return v_fma(w.even, (vf){x.even, x.even}, acc);
}

/* u8 weights times s8 */
typedef struct v_iw { __m256i a, b; } v_iw;
typedef __m256i v_ix;
#define V_INT4_START(offset_sum) vi_set1(offset_sum)
#ifdef V_DPBUSD
#define V_INT8_START(offset_sum) vi_set1(offset_sum)
static inline v_iw v_load_int8(const uint8_t *p) { return (v_iw){v_bytes(p), v_bytes(p + 32)}; }
#else
#define V_INT8_START(offset_sum) ((void)(offset_sum), vi_zero())
static inline v_iw v_load_int8(const uint8_t *p)
{
    __m256i offset = _mm256_set1_epi8((char)0x80);
    return (v_iw){_mm256_xor_si256(v_bytes(p), offset), _mm256_xor_si256(v_bytes(p + 32), offset)};
}
#endif
static inline __m256i v_nibbles(__m256i b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
static inline void v_load_int4(const uint8_t *p, v_iw *low, v_iw *high)
{
    __m256i a = v_bytes(p), b = v_bytes(p + 32);
    *low = (v_iw){v_nibbles(a), v_nibbles(b)};
    *high = (v_iw){v_nibbles(_mm256_srli_epi16(a, 4)), v_nibbles(_mm256_srli_epi16(b, 4))};
}
static inline v_ix v_load_ix(const uint8_t *p) { return v_word(p); }
#ifdef V_DPBUSD
/* by name: around the intrinsic gcc 12 copies and spills accumulators that fit */
static inline vi v_dot_int8(vi acc, v_iw w, v_ix x)
{
    __asm__(V_DPBUSD " %2, %1, %0" : "+v"(acc.a) : "v"(w.a), "v"(x));
    __asm__(V_DPBUSD " %2, %1, %0" : "+v"(acc.b) : "v"(w.b), "v"(x));
    return acc;
}
/* int4 adds up in the 32-bit sums themselves */
#define V_PART_UNITS 8
typedef vi v_part;
static inline v_part v_part_begin(vi sum) { return sum; }
static inline vi v_part_end(vi sum, v_part part) { return (void)sum, part; }
static inline v_part v_dot_int4(v_part acc, v_iw w, v_ix x) { return v_dot_int8(acc, w, x); }
#else
static inline v_eight v_dot4_half(v_eight acc, __m256i w, __m256i x)
{
    __m256i pairs = _mm256_maddubs_epi16(w, x);
    return acc + (v_eight)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline vi v_dot_int8(vi acc, v_iw w, v_ix x)
{
    return (vi){v_dot4_half(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)),
                v_dot4_half(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b))};
}
/* The sums of four units of nibbles, low and high, are at most 8 * 2 * 15 * 127 = 30480: they fit in 16 bits. */
#define V_PART_UNITS 4
typedef struct v_part { __m256i a, b; } v_part;
static inline v_part v_part_begin(vi sum)
{
    (void)sum;
    return (v_part){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
static inline v_part v_dot_int4(v_part acc, v_iw w, v_ix x)
{
    acc.a = _mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x));
    acc.b = _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x));
    __asm__("" : "+x"(acc.a), "+x"(acc.b));     /* or gcc adds products to each other first, and has too few registers for them */
    return acc;
}
static inline vi v_part_end(vi sum, v_part p)
{
    __m256i one = _mm256_set1_epi16(1);
    return (vi){sum.a + (v_eight)_mm256_madd_epi16(p.a, one), sum.b + (v_eight)_mm256_madd_epi16(p.b, one)};
}
#endif

#endif
