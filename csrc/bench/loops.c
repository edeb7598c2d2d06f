/* loops.c - see loops.h. A loop is a macro here, and an instruction set gives its vectors and its instruction. */
#include "bench/loops.h"

#include "base/cpu.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CHAINS 12                                /* accumulators: enough to hide the latency of a multiply-add */
#define EACH _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)
#define STREAMS 8                                /* sums of a read: loads and nothing else limit it */
#define HIDE(reg, x) __asm__ volatile("" : "+" reg(x))   /* the compiler does not know what x is now */

static uint64_t fold(const void *data, size_t bytes)
{
    uint64_t sum = 0, word;
    for (size_t at = 0; at + 8 <= bytes; at += 8) {
        memcpy(&word, (const char *)data + at, 8);
        sum ^= word;
    }
    return sum;
}

/* PEAK: x[i] are the accumulators, a the operand of `turn`. Hidden from the compiler are where each x[i] starts, so that it
 * can not keep one for all, and a, so that a product of a alone is made anew each time, as a kernel has it. */
#define PEAK(TARGET, name, reg, vector, operand, turn)                   \
    TARGET static uint64_t name(int64_t turns)                           \
    {                                                                    \
        const vector zero = {0};                                         \
        operand a = {0};                                                 \
        vector x[CHAINS], end[CHAINS];                                   \
        EACH {                                                           \
            x[i] = zero;                                                 \
            HIDE(reg, x[i]);                                             \
        }                                                                \
        for (int64_t n = 0; n < turns; n++) {                            \
            EACH {                                                       \
                HIDE(reg, a);                                            \
                x[i] = turn;                                             \
            }                                                            \
        }                                                                \
        EACH end[i] = x[i];                                              \
        return fold(end, sizeof end);                                    \
    }

/* READ: `load` reads a vector at `from`, after `ask` has asked for a line further on where the machine likes that. */
#define READ(TARGET, name, vector, load, ask)                            \
    TARGET static uint64_t name(const uint8_t *p, size_t bytes)          \
    {                                                                    \
        vector s[STREAMS] = {{0}}, end[STREAMS];                         \
        for (size_t at = 0; at < bytes; at += sizeof s)                  \
            _Pragma("GCC unroll 8") for (int i = 0; i < STREAMS; i++) {  \
                const uint8_t *from = p + at + sizeof(vector) * (size_t)i; \
                ask;                                                     \
                s[i] ^= load;                                            \
            }                                                            \
        for (int i = 0; i < STREAMS; i++) end[i] = s[i];                 \
        return fold(end, sizeof end);                                    \
    }

/* ---- portable ------------------------------------------------------------------------------------------------- */

#define PLAIN(name, number, one)                                         \
    static uint64_t name(int64_t turns)                                  \
    {                                                                    \
        volatile number hidden = one;                                    \
        number a = hidden, x[4 * CHAINS] = {0};                          \
        for (int64_t n = 0; n < turns; n++)                              \
            for (int i = 0; i < 4 * CHAINS; i++) x[i] = x[i] * a + a;    \
        return fold(x, sizeof x);                                        \
    }

PLAIN(f32_plain, float, 0.5f)
PLAIN(int8_plain, uint32_t, 3)

static uint64_t read_plain(const uint8_t *p, size_t bytes) { return fold(p, bytes); }

/* ---- x86-64 ---------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512bf16,avx512vnni")))
#define AVX2 __attribute__((target("avx2,fma")))
#define ASK _mm_prefetch((const char *)from + 2048, _MM_HINT_T0)

PEAK(AVX512, f32_avx512, "v", __m512, __m512, _mm512_fmadd_ps(a, a, x[i]))
PEAK(AVX512, bf16_avx512, "v", __m512, __m512, _mm512_dpbf16_ps(x[i], (__m512bh)a, (__m512bh)a))
PEAK(AVX512, int8_avx512, "v", __m512i, __m512i, _mm512_dpbusd_epi32(x[i], a, a))
READ(AVX512, read_avx512, __m512i, _mm512_load_si512(from), ASK)

PEAK(AVX2, f32_avx2, "x", __m256, __m256, _mm256_fmadd_ps(a, a, x[i]))
PEAK(AVX2, int8_avx2, "x", __m256i, __m256i,
     _mm256_add_epi32(x[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), a)))
#ifdef OURO_HAVE_AVX_VNNI
#define AVX_VNNI __attribute__((target("avx2,avxvnni")))
PEAK(AVX_VNNI, int8_avx_vnni, "x", __m256i, __m256i, _mm256_dpbusd_avx_epi32(x[i], a, a))
#endif
#ifdef OURO_HAVE_AVX_VNNI_VL
#define AVX_VNNI_VL __attribute__((target("avx512f,avx512vl,avx512vnni")))
PEAK(AVX_VNNI_VL, int8_avx_vnni_vl, "x", __m256i, __m256i, _mm256_dpbusd_epi32(x[i], a, a))
#endif
READ(AVX2, read_avx2, __m256i, _mm256_load_si256((const __m256i *)(const void *)from), if (i % 2 == 0) ASK)

static bool has_avx512(void)
{
    const ouro_cpu *c = ouro_cpu_get();
    return c->avx512f && c->avx512bw && c->avx512dq && c->avx512_bf16 && c->avx512_vnni;
}

static bool has_avx2(void) { return ouro_cpu_get()->avx2 && ouro_cpu_get()->fma; }

/* ---- AArch64 --------------------------------------------------------------------------------------------------- */

#elif defined(__aarch64__)
#ifdef __clang__
#define DOTPROD __attribute__((target("dotprod")))
#else
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

DOTPROD static inline int32x4_t sdot(int32x4_t x, int8x16_t a)
{
    __asm__("sdot %0.4s, %1.16b, %1.16b" : "+w"(x) : "w"(a));
    return x;
}

PEAK(, f32_neon, "w", float32x4_t, float32x4_t, vfmaq_f32(x[i], a, a))
PEAK(, int8_neon, "w", int32x4_t, int8x16_t,
     vpadalq_s16(x[i], vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(a)), a, a)))
PEAK(DOTPROD, int8_sdot, "w", int32x4_t, int8x16_t, sdot(x[i], a))
READ(, read_neon, uint8x16_t, vld1q_u8(from), )
#endif

/* ---- choice ---------------------------------------------------------------------------------------------------- */

ouro_peak_loop ouro_peak_loop_of(ouro_unit unit)
{
#if defined(__x86_64__)
    if (has_avx512())
        return unit == OURO_UNIT_F32    ? (ouro_peak_loop){"vfmadd231ps zmm", 32.0 * CHAINS, f32_avx512}
               : unit == OURO_UNIT_BF16 ? (ouro_peak_loop){"vdpbf16ps zmm", 64.0 * CHAINS, bf16_avx512}
                                        : (ouro_peak_loop){"vpdpbusd zmm", 128.0 * CHAINS, int8_avx512};
#ifdef OURO_HAVE_AVX_VNNI_VL
    if (unit == OURO_UNIT_INT8 && has_avx2() && ouro_cpu_get()->avx512vl && ouro_cpu_get()->avx512_vnni)
        return (ouro_peak_loop){"vpdpbusd ymm", 64.0 * CHAINS, int8_avx_vnni_vl};
#endif
#ifdef OURO_HAVE_AVX_VNNI
    if (unit == OURO_UNIT_INT8 && has_avx2() && ouro_cpu_get()->avx_vnni)
        return (ouro_peak_loop){"vpdpbusd ymm", 64.0 * CHAINS, int8_avx_vnni};
#endif
    if (has_avx2())
        return unit == OURO_UNIT_INT8 ? (ouro_peak_loop){"vpmaddubsw ymm", 64.0 * CHAINS, int8_avx2}
                                      : (ouro_peak_loop){"vfmadd231ps ymm", 16.0 * CHAINS, f32_avx2};
#elif defined(__aarch64__)
    if (unit != OURO_UNIT_INT8) return (ouro_peak_loop){"fmla 4s", 8.0 * CHAINS, f32_neon};
    return ouro_cpu_get()->dotprod ? (ouro_peak_loop){"sdot 4s", 32.0 * CHAINS, int8_sdot}
                                   : (ouro_peak_loop){"smull smlal2 sadalp", 32.0 * CHAINS, int8_neon};
#endif
    return unit == OURO_UNIT_INT8 ? (ouro_peak_loop){"integer multiply and add", 8.0 * CHAINS, int8_plain}
                                  : (ouro_peak_loop){"multiply and add", 8.0 * CHAINS, f32_plain};
}

ouro_read_loop ouro_read_loop_of_machine(void)
{
#if defined(__x86_64__)
    if (has_avx512()) return read_avx512;
    if (has_avx2()) return read_avx2;
#elif defined(__aarch64__)
    return read_neon;
#endif
    return read_plain;
}
