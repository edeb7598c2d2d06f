/* cpu.c - detection by cpuid (through the compiler's builtins) and by the auxiliary vector; see cpu.h. */
#include "base/cpu.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static ouro_cpu cpu;

static void add_name(bool has, const char *name)
{
    size_t used = strlen(cpu.features);
    if (has) snprintf(cpu.features + used, sizeof cpu.features - used, "%s%s", used ? " " : "", name);
}

#if defined(__x86_64__)
static void detect(void)
{
    __builtin_cpu_init();                    /* asks the operating system (xgetbv) too */
    cpu.avx2 = __builtin_cpu_supports("avx2");
    cpu.fma = __builtin_cpu_supports("fma");
    cpu.avx512f = __builtin_cpu_supports("avx512f");
    cpu.avx512bw = __builtin_cpu_supports("avx512bw");
    cpu.avx512vl = __builtin_cpu_supports("avx512vl");
    cpu.avx512dq = __builtin_cpu_supports("avx512dq");
    cpu.avx512_vnni = __builtin_cpu_supports("avx512vnni");
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) cpu.f16c = cpu.avx2 && (c >> 29 & 1);
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        cpu.avx512_bf16 = cpu.avx512f && (a >> 5 & 1);
        cpu.avx_vnni = cpu.avx2 && (a >> 4 & 1);
    }
}
#elif defined(__aarch64__)
static void detect(void)
{
    cpu.neon = true;
#if defined(__linux__)
    unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
    cpu.dotprod = one >> 20 & 1;             /* HWCAP_ASIMDDP */
    cpu.i8mm = two >> 13 & 1;                /* HWCAP2_I8MM */
    cpu.bf16 = two >> 14 & 1;                /* HWCAP2_BF16 */
#endif
}
#else
static void detect(void) {}
#endif

static void detect_and_name(void)
{
    detect();
    add_name(cpu.avx2, "avx2");
    add_name(cpu.fma, "fma");
    add_name(cpu.f16c, "f16c");
    add_name(cpu.avx_vnni, "avx_vnni");
    add_name(cpu.avx512f, "avx512f");
    add_name(cpu.avx512bw, "avx512bw");
    add_name(cpu.avx512vl, "avx512vl");
    add_name(cpu.avx512dq, "avx512dq");
    add_name(cpu.avx512_bf16, "avx512_bf16");
    add_name(cpu.avx512_vnni, "avx512_vnni");
    add_name(cpu.neon, "neon");
    add_name(cpu.dotprod, "dotprod");
    add_name(cpu.i8mm, "i8mm");
    add_name(cpu.bf16, "bf16");
}

const ouro_cpu *ouro_cpu_get(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, detect_and_name);
    return &cpu;
}

int ouro_cpu_count(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);         /* also where the mask is longer than a cpu_set_t */
    return online > 0 ? (int)online : 1;
}

#if defined(__x86_64__)
unsigned ouro_ftz_enter(void)
{
    unsigned before = _mm_getcsr();
    _mm_setcsr((before & ~0x6000u) | 0x8040u);           /* round to nearest; FTZ and DAZ */
    return before;
}

unsigned ouro_ftz_suspend(void)
{
    unsigned before = _mm_getcsr();
    _mm_setcsr(before & ~0x8040u);
    return before;
}

void ouro_ftz_leave(unsigned before) { _mm_setcsr(before); }
#elif defined(__aarch64__)
unsigned ouro_ftz_enter(void)
{
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"((before & ~((uint64_t)3 << 22)) | (uint64_t)1 << 24));
    return (unsigned)before;
}

unsigned ouro_ftz_suspend(void)
{
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before & ~((uint64_t)1 << 24)));
    return (unsigned)before;
}

void ouro_ftz_leave(unsigned before)
{
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)before));
}
#else
unsigned ouro_ftz_enter(void) { return 0; }
unsigned ouro_ftz_suspend(void) { return 0; }
void ouro_ftz_leave(unsigned before) { (void)before; }
#endif
