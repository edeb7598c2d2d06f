/* test_base_system.c - status details, memory, processor detection, and a BLAS opened from a file.
 *
 * OURO_TEST_BLAS names a shared library with cblas_sgemm; without it only the refusals of blas.h are tested.
 */
#include "base/blas.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/pool.h"
#include "base/stock.h"
#include "harness.h"
#include "ouro_status.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- status ------------------------------------------------------------------------------------------------------ */

static void *fail_elsewhere(void *seen)
{
    *(int *)seen = ouro_last_error()[0] == 0;
    ouro_fail(OURO_ERR_STATE, "elsewhere");
    return NULL;
}

static void test_status(void)
{
    EXPECT(ouro_fail(OURO_ERR_SHAPE, "%d rows", 3) == OURO_ERR_SHAPE, "fail returns its status");
    pthread_t thread;
    int empty = 0;
    pthread_create(&thread, NULL, fail_elsewhere, &empty);
    pthread_join(thread, NULL);
    EXPECT(empty && !strcmp(ouro_last_error(), "3 rows"), "details belong to a thread: %s", ouro_last_error());
    ouro_fail(OURO_ERR_SHAPE, "layer 2: %s", ouro_last_error());
    EXPECT(!strcmp(ouro_last_error(), "layer 2: 3 rows"), "a detail may hold the last one: %s", ouro_last_error());
    char big[2000];
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = 0;
    ouro_fail(OURO_ERR_SHAPE, "%s", big);
    EXPECT(strlen(ouro_last_error()) < sizeof big, "a long detail is cut");
    for (int s = OURO_OK; s >= OURO_ERR_SYSTEM; s--)
        for (int t = s - 1; t >= OURO_ERR_SYSTEM - 1; t--)
            EXPECT(strcmp(ouro_status_name(s), ouro_status_name(t)) != 0, "%d and %d have one name", s, t);
    EXPECT(!strcmp(ouro_status_name(1), ouro_status_name(-1000)), "unknown codes have a name");
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static void test_alloc(void)
{
    static const size_t sizes[] = {0, 1, 63, 64, 65, 100000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint8_t *p = ouro_alloc(sizes[i]);
        EXPECT(p && (uintptr_t)p % 64 == 0, "%zu bytes at %p", sizes[i], (void *)p);
        if (p) memset(p, 1, sizes[i]);
        ouro_free(p);
    }
    EXPECT(ouro_alloc(SIZE_MAX) == NULL && ouro_alloc(SIZE_MAX - 63) == NULL, "a size that wraps around");
    ouro_free(NULL);
}

static int is_zero(const uint8_t *p, size_t n) { return p[0] == 0 && memcmp(p, p + 1, n - 1) == 0; }

static void test_stock(void)
{
    enum { N = 4, BYTES = 10000 };
    ouro_stock s;
    uint8_t *p[N];
    EXPECT(ouro_stock_init(&s, BYTES, 3 * BYTES) == OURO_OK, "%s", ouro_last_error());
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++) {
            p[i] = ouro_stock_take(&s);
            EXPECT(p[i] && is_zero(p[i], BYTES), "round %d, block %d is zero", round, i);
            if (p[i]) memset(p[i], 0xff, BYTES);
        }
        EXPECT(ouro_stock_kept(&s) == 0, "%zu kept", ouro_stock_kept(&s));
        for (int i = 0; i < N; i++) ouro_stock_give(&s, p[i]);
        EXPECT(ouro_stock_kept(&s) == 3 * BYTES, "%zu kept, no more than the limit", ouro_stock_kept(&s));
    }
    uint8_t *again = ouro_stock_take(&s);
    EXPECT(again == p[2], "the last that was kept comes first");
    EXPECT(ouro_stock_empty(&s) == 2 * BYTES && ouro_stock_empty(&s) == 0 && ouro_stock_kept(&s) == 0, "emptied");
    ouro_stock_give(&s, again);
    EXPECT(ouro_stock_fill(&s, BYTES) == BYTES, "filled with what is there");
    EXPECT(ouro_stock_fill(&s, 3 * BYTES - 1) == 2 * BYTES, "whole blocks");
    EXPECT(ouro_stock_fill(&s, SIZE_MAX) == 3 * BYTES && ouro_stock_kept(&s) == 3 * BYTES, "filled up to the limit");
    ouro_stock_fini(&s);
}

static void *take_and_give(void *stock)
{
    long wrong = 0;
    for (int i = 0; i < 200; i++) {
        uint8_t *p = ouro_stock_take(stock);
        wrong += !p || !is_zero(p, 4096);
        if (p) memset(p, i | 1, 4096);
        if (p) ouro_stock_give(stock, p);
        if (i % 64 == 0) ouro_stock_empty(stock);
    }
    return (void *)(intptr_t)wrong;
}

static void test_stock_of_threads(void)
{
    ouro_stock s;
    pthread_t thread[4];
    EXPECT(ouro_stock_init(&s, 4096, 2 * 4096) == OURO_OK, "%s", ouro_last_error());
    for (int i = 0; i < 4; i++) pthread_create(&thread[i], NULL, take_and_give, &s);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(thread[i], &wrong);
        EXPECT(!wrong, "thread %d saw %ld blocks that were not its own and zero", i, (long)(intptr_t)wrong);
    }
    EXPECT(ouro_stock_kept(&s) <= 2 * 4096, "%zu kept", ouro_stock_kept(&s));
    ouro_stock_fini(&s);
}

static void test_big_alloc(void)
{
    static const size_t sizes[] = {1, 4096, 5000, (size_t)2 << 20, ((size_t)2 << 20) + 1, (size_t)33 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t align = sizes[i] >= (size_t)2 << 20 ? (size_t)2 << 20 : 4096;
        uint8_t *p = ouro_big_alloc(sizes[i]);
        EXPECT(p && (uintptr_t)p % align == 0, "%zu bytes at %p", sizes[i], (void *)p);
        if (!p) continue;
        EXPECT(p[0] == 0 && p[sizes[i] / 2] == 0 && p[sizes[i] - 1] == 0, "pages are zero");
        memset(p, 1, sizes[i]);
        ouro_big_free(p, sizes[i]);
    }
    EXPECT(ouro_big_alloc(0) == NULL && ouro_big_alloc(SIZE_MAX) == NULL, "sizes that make no sense");
    ouro_big_free(NULL, 1);
}

/* untouched pages are not resident, touched ones are, and freed ones are gone */
static void test_resident(void)
{
    size_t bytes = (size_t)256 << 20, part = (size_t)64 << 20, before = ouro_resident_memory();
    if (before == 0) {
        printf("  skipped: the system does not say what is resident\n");
        return;
    }
    uint8_t *p = ouro_big_alloc(bytes);
    size_t reserved = ouro_resident_memory() - before;
    for (size_t i = 0; p && i < part; i += 4096) p[i] = 1;
    size_t touched = ouro_resident_memory() - before;
    ouro_big_free(p, bytes);
    size_t after = ouro_resident_memory();
    EXPECT(reserved < part / 4, "%zu bytes resident before any was touched", reserved);
    EXPECT(touched > part * 3 / 4 && touched < part * 3, "%zu bytes resident of %zu touched", touched, part);
    EXPECT(after < before + part / 2, "%zu bytes resident after, %zu before", after, before);
}

static void test_available(void)
{
    size_t all = ouro_available_memory();
    EXPECT(all > (size_t)1 << 20, "%zu bytes available", all);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && defined(__linux__)
    if (getenv("OURO_TEST_NO_FORK")) return;         /* qemu's user emulation accepts the limit and keeps none */
    pid_t child = fork();                /* the limit stays in the child */
    if (child == 0) {
        size_t limit = (size_t)1 << 30;
        if (setrlimit(RLIMIT_AS, &(struct rlimit){limit, limit}) != 0) _exit(2);
        _exit(ouro_available_memory() <= limit ? 0 : 3);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "RLIMIT_AS is not seen: %d", status);
#endif
}

/* ---- processor ---------------------------------------------------------------------------------------------------- */

static void test_cpu(void)
{
    const ouro_cpu *c = ouro_cpu_get();
    EXPECT(c == ouro_cpu_get(), "detected once");
    EXPECT(c->avx2 == (strstr(c->features, "avx2") != NULL), "the text agrees: %s", c->features);
    EXPECT(c->avx512_bf16 <= c->avx512f && c->avx512_vnni <= c->avx512f && c->avx512f <= c->avx2, "%s", c->features);
    EXPECT(ouro_cpu_count() >= 1, "%d processors", ouro_cpu_count());
    printf("  %d processors, %s\n", ouro_cpu_count(), c->features[0] ? c->features : "no features known");
}

static void test_ftz(void)
{
    volatile float denormal = 1e-40f, tiny = 1e-38f, one = 1.0f, tenth = 0.1f;
    EXPECT(tiny * tenth > 0.0f && denormal * one > 0.0f, "denormals exist before");
    unsigned mode = ouro_ftz_enter();
#if defined(__x86_64__) || defined(__aarch64__)
    float out = tiny * tenth, in = denormal * one;
    EXPECT(out == 0.0f && in == 0.0f, "results and inputs count as zero: %g %g", (double)out, (double)in);
#endif
    unsigned inner = ouro_ftz_enter();
    ouro_ftz_leave(inner);
    EXPECT(tenth + one > one, "arithmetic goes on");
    ouro_ftz_leave(mode);
    EXPECT(tiny * tenth > 0.0f && denormal * one > 0.0f, "denormals exist after");
}

/* ---- BLAS --------------------------------------------------------------------------------------------------------- */

static void test_blas_refused(void)
{
    ouro_blas *b = (ouro_blas *)(void *)&b;
    EXPECT(ouro_blas_open("/nonexistent/libblas.so", &b) == OURO_ERR_UNSUPPORTED && !b, "a file that is not there");
    EXPECT(strstr(ouro_last_error(), "libblas.so") != NULL, "%s", ouro_last_error());
    EXPECT(ouro_blas_open(NULL, &b) == OURO_ERR_ARGUMENT && ouro_blas_open("x", NULL) == OURO_ERR_ARGUMENT, "NULL");
#if defined(__linux__)
    EXPECT(ouro_blas_open("libm.so.6", &b) == OURO_ERR_UNSUPPORTED && strstr(ouro_last_error(), "sgemm"), "%s",
           ouro_last_error());
#endif
    ouro_blas_close(NULL);
}

enum { M = 37, N = 53, K = 70, LDA = 75, LDB = 71, LDC = 60, REPEAT = 200 };
typedef struct products { ouro_blas *blas; float a[M * LDA], b[N * LDB], c[4][M * LDC]; } products;

static void blas_region(void *ctx, int thread, int n)
{
    products *p = ctx;
    (void)n;
    for (int i = 0; i < REPEAT; i++) ouro_blas_sgemm_nt(p->blas, M, N, K, p->a, LDA, p->b, LDB, p->c[thread], LDC);
}

static double worst_error(const products *p, const float *c)
{
    double worst = 0.0;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0.0;
            for (int k = 0; k < K; k++) sum += (double)p->a[i * LDA + k] * (double)p->b[j * LDB + k];
            double error = sum - (double)c[i * LDC + j];
            worst = error > worst ? error : -error > worst ? -error : worst;
        }
    return worst;
}

/* right, with strides, from several threads at once, and no writing between the rows */
static void test_blas_products(void)
{
    const char *path = getenv("OURO_TEST_BLAS");
    static products p;
    if (!path || !*path) {
        printf("  skipped: OURO_TEST_BLAS is not set\n");
        return;
    }
    int status = ouro_blas_open(path, &p.blas);
    EXPECT(status == OURO_OK, "%s", ouro_last_error());
    if (status != OURO_OK) return;
    printf("  %s\n", ouro_blas_config(p.blas));
    uint32_t u = 1;
    for (int i = 0; i < M * LDA; i++) u = u * 1664525u + 1013904223u, p.a[i] = (float)(u >> 8) * 0x1p-24f - 0.5f;
    for (int i = 0; i < N * LDB; i++) u = u * 1664525u + 1013904223u, p.b[i] = (float)(u >> 8) * 0x1p-24f - 0.5f;
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < M * LDC; i++) p.c[t][i] = 9.0f;
    ouro_pool *pool = ouro_pool_new(4);
    ouro_pool_run(pool, blas_region, &p);
    ouro_pool_free(pool);
    for (int t = 0; t < 4; t++) {
        EXPECT(worst_error(&p, p.c[t]) < 1e-5, "thread %d: largest error %g", t, worst_error(&p, p.c[t]));
        EXPECT(memcmp(p.c[t], p.c[0], sizeof p.c[0]) == 0, "thread %d got other bits", t);
    }
    int touched = 0;
    for (int i = 0; i < M; i++)
        for (int j = N; j < LDC; j++) touched += p.c[0][i * LDC + j] != 9.0f;
    EXPECT(touched == 0, "%d floats between the rows were written", touched);
    ouro_blas_close(p.blas);
}

int main(void)
{
    long failed = harness_failed;
    RUN(test_status);
    RUN(test_alloc);
    RUN(test_big_alloc);
    RUN(test_stock);
    RUN(test_stock_of_threads);
    RUN(test_resident);
    RUN(test_available);
    RUN(test_cpu);
    RUN(test_ftz);
    RUN(test_blas_refused);
    RUN(test_blas_products);
    return harness_failed != failed;
}
