/* vec_avx512.h - sixteen lanes for AVX-512: the primitives that rows_body.h, blocks_float.h and blocks_int.h are
 * written in. Needs F, BW, VL, DQ, BF16 and VNNI.
 *
 * vf is 16 f32, vi 16 i32: one register each. v_min(a, b) is a < b ? a : b and v_max(a, b) is a > b ? a : b, so the
 * second operand wins against a NaN and between zeros, as in the scalar comparisons they stand for.
 *
 * A product unit is 64 bytes of a tile: one k of 16 f32 rows, two k of 16 bf16 rows (vdpbf16ps adds the odd product,
 * then the even one, each a fused multiply-add), or four k of 16 u8 rows (vpdpbusd).
 */
#ifndef OURO_KERNELS_VEC_AVX512_H
#define OURO_KERNELS_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#define V_NAME avx512
#define V_LANES 12                              /* lanes of the largest register block */
#define V_FLOAT_LANES 12
#define V_INT_LANES 6                           /* the same of int8 and int4, whose float sums stay in registers too */
#define V_INT_ALONE 8                           /* int kinds: lanes that are one block when there are no others */
/* Tiles worked on at once. Few lanes are bound by memory, which answers four streams faster than two. */
#define V_TILES(kind, lanes) ((lanes) <= ((kind) == V_BF16 || (kind) == V_INT8 ? 6 : (kind) == V_INT4 ? 4 : 2) ? 4 : 2)
#define V_KEEP 12                               /* int kinds: float accumulators that fit beside the sums */
/* Bytes ahead that a block of so many lanes asks memory for its weights; 0: it is served better by the hardware's own
 * prefetch. Requests into the second-level cache are dropped by Zen 4 when they come too fast, and tie up the few miss
 * buffers of the first when they go there. Measured on one core (docs/speed.md). */
#define V_AHEAD(kind, lanes) \
    ((kind) == V_BF16 ? (lanes) <= 6 ? 1024 : 8192 : \
     (kind) == V_INT8 ? (lanes) <= 3 ? 1024 : (lanes) == 4 ? 2048 : 4096 : \
     (kind) == V_INT4 ? (lanes) <= 2 ? 2048 : 8192 : (lanes) >= ((kind) == V_MIXED ? 3 : 5) ? 8192 : 0)
/* Bytes ahead that it asks once more, int kinds, for what was dropped: a constant, which costs no instruction but its own; 0: not. */
#define V_AGAIN(kind, lanes) ((kind) == V_INT4 && (lanes) <= 2 ? 1024 : 0)
/* the instances X(kind, tiles, lanes) of a register block */
#define V_ROW(X, kind, T) X(kind, T, 1) X(kind, T, 2) X(kind, T, 3) X(kind, T, 4) X(kind, T, 5) X(kind, T, 6)
#define V_MORE(X, kind, T) X(kind, T, 7) X(kind, T, 8) X(kind, T, 9) X(kind, T, 10) X(kind, T, 11) X(kind, T, 12)
#define V_ALONE(X, kind, T) X(kind, T, 7) X(kind, T, 8)
#define V_INT_INSTANCES(X, kind) \
    V_ROW(X, kind, 1) V_ROW(X, kind, 2) V_ROW(X, kind, 4) V_ALONE(X, kind, 1) V_ALONE(X, kind, 2)
#define V_INSTANCES(X, kind) V_ROW(X, kind, 1) V_ROW(X, kind, 2) V_ROW(X, kind, 4) V_MORE(X, kind, 1) V_MORE(X, kind, 2)
/* tiles side by side: the same shapes, but all tiles at once for one or two lanes, which then read one stream */
#define V_SIDE_INSTANCES(X, kind) V_INSTANCES(X, kind) X(kind, 8, 1) X(kind, 8, 2)
#define V_S8_LANES 2
#define V_S8_INSTANCES(X, kind) \
    X(kind, 1, 1) X(kind, 1, 2) X(kind, 2, 1) X(kind, 2, 2) X(kind, 4, 1) X(kind, 4, 2) X(kind, 8, 1) X(kind, 8, 2)
#define V_SIDE_TILES(kind, lanes) ((lanes) <= 2 ? 8 : (lanes) <= 6 && (kind) == V_SIDE_BF16 ? 4 : 2)

typedef __m512 vf;
/* sixteen i32 by type, not __m512i (eight i64): gcc 12 copies accumulators between the two and then spills them */
typedef int32_t vi __attribute__((vector_size(64)));

static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_set1(float a) { return _mm512_set1_ps(a); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
/* past the caches; p 64-byte aligned. v_stream_end before others may read it */
static inline void v_stream(float *p, vf a) { _mm512_stream_ps(p, a); }
static inline void v_stream_end(void) { _mm_sfence(); }
static inline __mmask16 v_first(int n) { return (__mmask16)((1u << n) - 1u); }
static inline vf v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
static inline void v_store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, v_first(n), a); }
/* the first n elements of a, the others of b; n in 0..16 */
static inline vf v_first_of(vf a, vf b, int n) { return _mm512_mask_mov_ps(b, v_first(n), a); }

static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf v_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static inline vf v_rint(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* p 2^n of an integer-valued n, where the result is normal */
static inline vf v_scale2(vf p, vf n) { return _mm512_scalef_ps(p, n); }
/* y, but 0 where x < bound */
static inline vf v_zero_below(vf x, vf bound, vf y)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), y);
}

/* partial j with partial j + half, four times: the fixed tree */
static inline float v_tree(vf a)
{
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
static inline float v_reduce_max(vf a) { return _mm512_reduce_max_ps(a); }

/* v_tree and v_reduce_max of four vectors at once, y [4]: halves of two vectors are folded as one */
#define V_FOLD_FOUR(name, op)                                                                                        \
    static inline void name(const vf *a, float *y)                                                                   \
    {                                                                                                                \
        vf p = op(_mm512_shuffle_f32x4(a[0], a[1], 0x44), _mm512_shuffle_f32x4(a[0], a[1], 0xee));                   \
        vf q = op(_mm512_shuffle_f32x4(a[2], a[3], 0x44), _mm512_shuffle_f32x4(a[2], a[3], 0xee));                   \
        vf r = op(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));                               \
        r = op(r, _mm512_permute_ps(r, 0x4e));                                                                       \
        r = op(r, _mm512_permute_ps(r, 0xb1));                                                                       \
        __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);                          \
        _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, r)));                                   \
    }
V_FOLD_FOUR(v_tree_four, _mm512_add_ps)
V_FOLD_FOUR(v_max_four, _mm512_max_ps)

static inline vf v_widen_bf16(const uint16_t *p)
{
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
static inline void v_store_bf16(uint16_t *p, vf a)
{
    _mm256_storeu_si256((__m256i *)(void *)p, (__m256i)_mm512_cvtneps_pbh(a));
}

/* ---- integers ------------------------------------------------------------------------------------------------ */

static inline vi vi_zero(void) { return (vi)_mm512_setzero_si512(); }
static inline vi vi_add(vi a, vi b) { return a + b; }
static inline int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32((__m512i)a); }
static inline vi vi_rint(vf a) { return (vi)_mm512_cvtps_epi32(a); }
static inline vf v_from_int(vi a) { return _mm512_cvtepi32_ps((__m512i)a); }
static inline void vi_store_s8(int8_t *p, vi a)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8((__m512i)a));
}
static inline vf v_widen_s8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

/* sixteen s8 of each of two rows as bf16 in turns: whole numbers of seven bits, whose low halves are 0 */
static inline void v_expand_pairs(const int8_t *a, const int8_t *b, uint16_t *y)
{
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(v_widen_s8(a)), 16);
    _mm512_storeu_si512(y, _mm512_or_si512(low, _mm512_castps_si512(v_widen_s8(b))));
}

/* ---- product units --------------------------------------------------------------------------------------------- */

/* a macro: gcc 12 takes an inline function that only prefetches for a pure one and drops the calls */
#define V_PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)

#define V_PREFETCH_OUT(p) __asm__ volatile("prefetchw %0" : : "m"(*(const char *)(p)))

/* f32 weights: one k */
static inline vf v_bcast(const uint8_t *p) { return _mm512_set1_ps(*(const float *)(const void *)p); }

/* bf16 weights times f32: the pair widened */
typedef struct v_pair { vf even, odd; } v_pair;
static inline v_pair v_load_pair(const uint8_t *p)
{
    __m512i w = _mm512_load_si512(p);
    return (v_pair){_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
                    _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u)))};
}

/* bf16 weights times bf16 */
typedef __m512i v_bw;
typedef __m512i v_bx;
static inline v_bw v_load_bw(const uint8_t *p) { return _mm512_load_si512(p); }
static inline v_bx v_load_bx(const uint8_t *p) { return _mm512_set1_epi32(*(const int32_t *)(const void *)p); }
static inline vf v_dot_bf16(vf acc, v_bw w, v_bx x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }

/* u8 weights, offset included, times s8: the sum starts at minus offset times the sum of x */
typedef __m512i v_iw;
typedef __m512i v_ix;
/* from memory: broadcast from a register it would take a place of the vector units */
static inline vi v_start(const int32_t *offset_sum)
{
    vi y;
    __asm__("vpbroadcastd %1, %0" : "=v"(y) : "m"(*offset_sum));
    return y;
}
#define V_INT8_START(offset_sum) v_start(&(offset_sum))
#define V_INT4_START(offset_sum) v_start(&(offset_sum))
static inline v_iw v_load_int8(const uint8_t *p) { return _mm512_load_si512(p); }
static inline void v_load_int4(const uint8_t *p, v_iw *low, v_iw *high)
{
    __m512i b = _mm512_load_si512(p), mask = _mm512_set1_epi8(15);
    *low = _mm512_and_si512(b, mask);
    *high = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
}
static inline v_ix v_load_ix(const uint8_t *p) { return _mm512_set1_epi32(*(const int32_t *)(const void *)p); }
/* by name: around the intrinsic gcc 12 copies and spills accumulators that fit */
static inline vi v_dot_int8(vi acc, v_iw w, v_ix x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
}
/* int4 adds up in the 32-bit sums themselves; see vec_avx2.h for where it does not */
#define V_PART_UNITS 8
typedef vi v_part;
static inline v_part v_part_begin(vi sum) { return sum; }
static inline vi v_part_end(vi sum, v_part part) { return (void)sum, part; }
static inline v_part v_dot_int4(v_part acc, v_iw w, v_ix x) { return v_dot_int8(acc, w, x); }

#endif
