/* limits.c - see limits.h. Each loop is written once per instruction set and chosen at run time, so that one build
 * measures what the machine it runs on has.
 *
 * A peak loop keeps CHAINS independent accumulators in registers, enough to hide the latency of a multiply-add. Where
 * each starts is hidden from the compiler, which can not see that they are alike and keep one.
 */
#include "bench/limits.h"

#include "base/cpu.h"
#include "base/memory.h"
#include "ouro_status.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define CHAINS 12
#define EACH _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)
#define HIDE(reg, x) __asm__ volatile("" : "+" reg(x))   /* the compiler does not know what x is now */
#define ROUND_SECONDS 0.03

/* one loop: what it is called, operations of one turn, and the turns */
typedef struct peak_loop {
    const char *instruction;
    double operations;
    void (*run)(int64_t turns);
} peak_loop;

typedef uint64_t (*read_fn)(const uint8_t *p, size_t bytes);      /* bytes: a multiple of 512 */

static _Atomic uint64_t sink;                    /* results go here, so that none of the work is dropped */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- portable ------------------------------------------------------------------------------------------------- */

static void f32_plain(int64_t turns)
{
    volatile float hidden = 0.5f;
    float a = hidden, x[4 * CHAINS] = {0};
    for (int64_t n = 0; n < turns; n++)
        for (int i = 0; i < 4 * CHAINS; i++) x[i] = x[i] * a + a;
    for (int i = 1; i < 4 * CHAINS; i++) x[0] += x[i];
    atomic_store(&sink, (uint64_t)x[0]);
}

static void int8_plain(int64_t turns)
{
    volatile int32_t hidden = 3;
    uint32_t a = (uint32_t)hidden, x[4 * CHAINS] = {0};
    for (int64_t n = 0; n < turns; n++)
        for (int i = 0; i < 4 * CHAINS; i++) x[i] = x[i] * a + a;
    for (int i = 1; i < 4 * CHAINS; i++) x[0] += x[i];
    atomic_store(&sink, x[0]);
}

static uint64_t read_plain(const uint8_t *p, size_t bytes)
{
    uint64_t s[8] = {0};
    for (size_t at = 0; at < bytes; at += 64)
        for (int i = 0; i < 8; i++) {
            uint64_t v;
            memcpy(&v, p + at + 8 * i, 8);
            s[i] ^= v;
        }
    for (int i = 1; i < 8; i++) s[0] ^= s[i];
    return s[0];
}

/* ---- x86-64 ---------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512bf16,avx512vnni")))
#define AVX2 __attribute__((target("avx2,fma")))

AVX512 static void f32_avx512(int64_t turns)
{
    __m512 a = _mm512_setzero_ps(), x[CHAINS];
    HIDE("v", a);
    EACH {
        x[i] = a;
        HIDE("v", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) EACH x[i] = _mm512_fmadd_ps(a, a, x[i]);
    for (int i = 1; i < CHAINS; i++) x[0] = _mm512_add_ps(x[0], x[i]);
    atomic_store(&sink, (uint64_t)_mm512_reduce_add_ps(x[0]));
}

AVX512 static void bf16_avx512(int64_t turns)
{
    __m512i a = _mm512_setzero_si512();
    __m512 x[CHAINS];
    HIDE("v", a);
    EACH {
        x[i] = _mm512_castsi512_ps(a);
        HIDE("v", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) EACH x[i] = _mm512_dpbf16_ps(x[i], (__m512bh)a, (__m512bh)a);
    for (int i = 1; i < CHAINS; i++) x[0] = _mm512_add_ps(x[0], x[i]);
    atomic_store(&sink, (uint64_t)_mm512_reduce_add_ps(x[0]));
}

AVX512 static void int8_avx512(int64_t turns)
{
    __m512i a = _mm512_setzero_si512(), x[CHAINS];
    HIDE("v", a);
    EACH {
        x[i] = a;
        HIDE("v", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) EACH x[i] = _mm512_dpbusd_epi32(x[i], a, a);
    for (int i = 1; i < CHAINS; i++) x[0] = _mm512_add_epi32(x[0], x[i]);
    atomic_store(&sink, (uint64_t)_mm512_reduce_add_epi32(x[0]));
}

AVX512 static uint64_t read_avx512(const uint8_t *p, size_t bytes)
{
    __m512i s[8];
    for (int i = 0; i < 8; i++) s[i] = _mm512_setzero_si512();
    for (size_t at = 0; at < bytes; at += 512)
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
            _mm_prefetch((const char *)p + at + 64 * i + 2048, _MM_HINT_T0);
            s[i] = _mm512_xor_si512(s[i], _mm512_load_si512(p + at + 64 * i));
        }
    for (int i = 1; i < 8; i++) s[0] = _mm512_xor_si512(s[0], s[i]);
    return (uint64_t)_mm512_reduce_add_epi64(s[0]);
}

AVX2 static void f32_avx2(int64_t turns)
{
    __m256 a = _mm256_setzero_ps(), x[CHAINS];
    HIDE("x", a);
    EACH {
        x[i] = a;
        HIDE("x", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) EACH x[i] = _mm256_fmadd_ps(a, a, x[i]);
    for (int i = 1; i < CHAINS; i++) x[0] = _mm256_add_ps(x[0], x[i]);
    atomic_store(&sink, (uint64_t)_mm256_cvtss_f32(x[0]));
}

AVX2 static void int8_avx2(int64_t turns)
{
    __m256i a = _mm256_setzero_si256(), x[CHAINS], b;
    HIDE("x", a);
    b = a;
    EACH {
        x[i] = a;
        HIDE("x", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) {
        EACH {
            HIDE("x", b);                        /* a new product each time, as a kernel has it */
            x[i] = _mm256_add_epi32(x[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), a));
        }
    }
    for (int i = 1; i < CHAINS; i++) x[0] = _mm256_add_epi32(x[0], x[i]);
    atomic_store(&sink, (uint64_t)_mm256_cvtsi256_si32(x[0]));
}

AVX2 static uint64_t read_avx2(const uint8_t *p, size_t bytes)
{
    __m256i s[8];
    for (int i = 0; i < 8; i++) s[i] = _mm256_setzero_si256();
    for (size_t at = 0; at < bytes; at += 256)
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
            if (i % 2 == 0) _mm_prefetch((const char *)p + at + 32 * i + 2048, _MM_HINT_T0);
            s[i] = _mm256_xor_si256(s[i], _mm256_load_si256((const __m256i *)(const void *)(p + at + 32 * i)));
        }
    for (int i = 1; i < 8; i++) s[0] = _mm256_xor_si256(s[0], s[i]);
    return (uint64_t)_mm256_extract_epi64(s[0], 0) ^ (uint64_t)_mm256_extract_epi64(s[0], 3);
}

static bool has_avx512(void)
{
    const ouro_cpu *c = ouro_cpu_get();
    return c->avx512f && c->avx512bw && c->avx512dq && c->avx512_bf16 && c->avx512_vnni;
}

static bool has_avx2(void) { return ouro_cpu_get()->avx2 && ouro_cpu_get()->fma; }

/* ---- AArch64 --------------------------------------------------------------------------------------------------- */

#elif defined(__aarch64__)

static void f32_neon(int64_t turns)
{
    float32x4_t a = vdupq_n_f32(0.0f), x[CHAINS];
    HIDE("w", a);
    EACH {
        x[i] = a;
        HIDE("w", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) EACH x[i] = vfmaq_f32(x[i], a, a);
    for (int i = 1; i < CHAINS; i++) x[0] = vaddq_f32(x[0], x[i]);
    atomic_store(&sink, (uint64_t)vaddvq_f32(x[0]));
}

static void int8_neon(int64_t turns)
{
    int8x16_t a = vdupq_n_s8(0);
    int32x4_t x[CHAINS];
    EACH {
        x[i] = vdupq_n_s32(0);
        HIDE("w", x[i]);
    }
    for (int64_t n = 0; n < turns; n++) {
        EACH {
            HIDE("w", a);
            x[i] = vpadalq_s16(x[i], vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(a)), a, a));
        }
    }
    for (int i = 1; i < CHAINS; i++) x[0] = vaddq_s32(x[0], x[i]);
    atomic_store(&sink, (uint64_t)vaddvq_s32(x[0]));
}

#ifdef __clang__
__attribute__((target("dotprod")))
#else
__attribute__((target("arch=armv8.2-a+dotprod")))
#endif
static void int8_sdot(int64_t turns)
{
    int8x16_t a = vdupq_n_s8(0);
    int32x4_t x[CHAINS];
    EACH {
        x[i] = vdupq_n_s32(0);
        HIDE("w", x[i]);
    }
    for (int64_t n = 0; n < turns; n++)
        EACH __asm__ volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(x[i]) : "w"(a));
    for (int i = 1; i < CHAINS; i++) x[0] = vaddq_s32(x[0], x[i]);
    atomic_store(&sink, (uint64_t)vaddvq_s32(x[0]));
}

static uint64_t read_neon(const uint8_t *p, size_t bytes)
{
    uint8x16_t s[8];
    for (int i = 0; i < 8; i++) s[i] = vdupq_n_u8(0);
    for (size_t at = 0; at < bytes; at += 128)
        for (int i = 0; i < 8; i++) s[i] = veorq_u8(s[i], vld1q_u8(p + at + 16 * i));
    for (int i = 1; i < 8; i++) s[0] = veorq_u8(s[0], s[i]);
    return vgetq_lane_u64(vreinterpretq_u64_u8(s[0]), 0) ^ vgetq_lane_u64(vreinterpretq_u64_u8(s[0]), 1);
}
#endif

/* ---- choice ---------------------------------------------------------------------------------------------------- */

static peak_loop peak_of(ouro_unit unit)
{
#if defined(__x86_64__)
    if (has_avx512())
        return unit == OURO_UNIT_F32    ? (peak_loop){"vfmadd231ps zmm", 32.0 * CHAINS, f32_avx512}
               : unit == OURO_UNIT_BF16 ? (peak_loop){"vdpbf16ps zmm", 64.0 * CHAINS, bf16_avx512}
                                        : (peak_loop){"vpdpbusd zmm", 128.0 * CHAINS, int8_avx512};
    if (has_avx2())
        return unit == OURO_UNIT_INT8 ? (peak_loop){"vpmaddubsw ymm", 64.0 * CHAINS, int8_avx2}
                                      : (peak_loop){"vfmadd231ps ymm", 16.0 * CHAINS, f32_avx2};
#elif defined(__aarch64__)
    if (unit != OURO_UNIT_INT8) return (peak_loop){"fmla 4s", 8.0 * CHAINS, f32_neon};
    return ouro_cpu_get()->dotprod ? (peak_loop){"sdot 4s", 32.0 * CHAINS, int8_sdot}
                                   : (peak_loop){"smull smlal2 sadalp", 32.0 * CHAINS, int8_neon};
#endif
    return unit == OURO_UNIT_INT8 ? (peak_loop){"integer multiply and add", 8.0 * CHAINS, int8_plain}
                                  : (peak_loop){"multiply and add", 8.0 * CHAINS, f32_plain};
}

static read_fn read_of(void)
{
#if defined(__x86_64__)
    if (has_avx512()) return read_avx512;
    if (has_avx2()) return read_avx2;
#elif defined(__aarch64__)
    return read_neon;
#endif
    return read_plain;
}

const char *ouro_unit_instruction(ouro_unit unit) { return peak_of(unit).instruction; }

/* ---- measurement ------------------------------------------------------------------------------------------------ */

typedef struct measurement {
    ouro_pool *pool;
    int rounds;
    double *rates;
    uint8_t *data;                               /* read: [bytes] */
    size_t bytes;
    read_fn read;
    peak_loop loop;                              /* peak */
    int64_t turns;
} measurement;

/* part of the bytes that a thread owns; bounds are multiples of 512 */
static uint8_t *own_part(const measurement *m, int thread, int n_threads, size_t *bytes)
{
    size_t units = m->bytes / 512, begin = units * (size_t)thread / (size_t)n_threads;
    size_t end = units * ((size_t)thread + 1) / (size_t)n_threads;
    *bytes = (end - begin) * 512;
    return m->data + begin * 512;
}

static void read_region(void *context, int thread, int n_threads)
{
    measurement *m = context;
    size_t bytes;
    uint8_t *p = own_part(m, thread, n_threads, &bytes);
    memset(p, thread + 1, bytes);
    for (int r = 0; r < m->rounds; r++) {
        ouro_pool_barrier(m->pool, thread);
        double begin = now();
        atomic_fetch_xor(&sink, m->read(p, bytes));
        ouro_pool_barrier(m->pool, thread);
        if (thread == 0) m->rates[r] = (double)m->bytes / (now() - begin);
    }
}

static void peak_region(void *context, int thread, int n_threads)
{
    measurement *m = context;
    for (int r = 0; r < m->rounds; r++) {
        ouro_pool_barrier(m->pool, thread);
        double begin = now();
        m->loop.run(m->turns);
        ouro_pool_barrier(m->pool, thread);
        if (thread == 0) m->rates[r] = m->loop.operations * (double)m->turns * n_threads / (now() - begin);
    }
}

int ouro_measure_read(ouro_pool *pool, size_t bytes, int rounds, double *rates)
{
    measurement m = {.pool = pool, .rounds = rounds, .rates = rates, .bytes = bytes / 512 * 512, .read = read_of()};
    if (rounds < 1 || m.bytes == 0)
        return ouro_fail(OURO_ERR_ARGUMENT, "expected at least 512 bytes and 1 round, got %zu and %d", bytes, rounds);
    m.data = bytes <= ouro_available_memory() ? ouro_big_alloc(m.bytes) : NULL;
    if (!m.data) return ouro_fail(OURO_ERR_MEMORY, "no memory for a buffer of %zu bytes to read", bytes);
    int status = ouro_pool_run(pool, read_region, &m);
    ouro_big_free(m.data, m.bytes);
    return status;
}

int ouro_measure_peak(ouro_pool *pool, ouro_unit unit, int rounds, double *rates)
{
    if (rounds < 1) return ouro_fail(OURO_ERR_ARGUMENT, "expected at least 1 round, got %d", rounds);
    measurement m = {.pool = pool, .rounds = 1, .rates = rates, .loop = peak_of(unit), .turns = 1000};
    int status = OURO_OK;
    for (int i = 0; i < 8 && status == OURO_OK; i++) {           /* as many turns as fill a round */
        status = ouro_pool_run(pool, peak_region, &m);
        double took = m.loop.operations * (double)m.turns * ouro_pool_threads(pool) / rates[0];
        if (took > 0.5 * ROUND_SECONDS) break;
        m.turns *= took > 0.01 * ROUND_SECONDS ? (int64_t)(ROUND_SECONDS / took) + 1 : 50;
    }
    m.rounds = rounds;
    return status == OURO_OK ? ouro_pool_run(pool, peak_region, &m) : status;
}
