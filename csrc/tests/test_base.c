/* test_base.c - threads, barriers, the divider of work, fork, memory and statuses. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/blas.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/pool.h"
#include "ouro_status.h"

static long passed, failed;

#define CHECK(condition) do { \
    if (condition) passed++; \
    else failed++, printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); } while (0)

/* ---- regions: each phase adds up what the phase before wrote ------------------------------------------------- */

typedef struct phases { ouro_pool *pool; long slot[64]; long sums; int wrong; } phases;

static void phase_region(void *ctx, int thread, int n_threads)
{
    phases *p = ctx;
    for (long round = 1; round <= 50; round++) {
        p->slot[thread] = round;
        ouro_pool_barrier(p->pool, thread);
        long sum = 0;
        for (int i = 0; i < n_threads; i++) sum += p->slot[i];
        if (thread == 0) p->wrong += sum != round * n_threads;
        ouro_pool_barrier(p->pool, thread);
    }
}

static void test_regions(int threads)
{
    ouro_pool *pool = ouro_pool_new(threads);
    CHECK(pool && ouro_pool_threads(pool) == threads);
    phases p = {.pool = pool};
    for (int i = 0; i < 40; i++) CHECK(ouro_pool_run(pool, phase_region, &p) == OURO_OK);
    CHECK(p.wrong == 0);
    ouro_pool_free(pool);
}

/* ---- work: every unit exactly once, whoever takes it ----------------------------------------------------------- */

typedef struct deal { ouro_pool *pool; ouro_work work; int n, chunk; atomic_int count[5000]; } deal;

static void deal_region(void *ctx, int thread, int n_threads)
{
    deal *d = ctx;
    ouro_work_init_own(&d->work, d->n, thread, n_threads);
    ouro_pool_barrier(d->pool, thread);
    for (int begin, end; ouro_work_next(&d->work, thread, n_threads, d->chunk, &begin, &end);)
        for (int i = begin; i < end; i++) {
            atomic_fetch_add(&d->count[i], 1);
            for (volatile int spin = 0; thread == 0 && spin < 200; spin++) continue;   /* one slow thread: others must help */
        }
}

static void test_work(int threads, int n, int chunk)
{
    deal *d = ouro_alloc(sizeof *d);
    memset(d, 0, sizeof *d);
    d->pool = ouro_pool_new(threads);
    d->n = n, d->chunk = chunk;
    CHECK(ouro_pool_run(d->pool, deal_region, d) == OURO_OK);
    int once = 1;
    for (int i = 0; i < 5000; i++) once = once && atomic_load(&d->count[i]) == (i < n);
    CHECK(once);
    ouro_pool_free(d->pool);
    ouro_free(d);
}

static void test_fork(void)
{
    ouro_pool *pool = ouro_pool_new(3);
    phases p = {.pool = pool};
    CHECK(ouro_pool_run(pool, phase_region, &p) == OURO_OK);
    pid_t child = fork();
    if (child == 0) _exit(ouro_pool_run(pool, phase_region, &p) == OURO_OK && p.wrong == 0 ? 0 : 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(ouro_pool_run(pool, phase_region, &p) == OURO_OK && p.wrong == 0);
    ouro_pool_free(pool);
}

static void test_memory(void)
{
    uint8_t *small = ouro_alloc(100), *big = ouro_big_alloc((size_t)5 << 20);
    CHECK(small && (uintptr_t)small % 64 == 0);
    CHECK(big && (uintptr_t)big % (2 << 20) == 0 && big[0] == 0 && big[((size_t)5 << 20) - 1] == 0);
    ouro_free(small);
    ouro_big_free(big, (size_t)5 << 20);
    CHECK(ouro_alloc(SIZE_MAX) == NULL && ouro_big_alloc(SIZE_MAX) == NULL && ouro_big_alloc(0) == NULL);
    CHECK(ouro_available_memory() > 1 << 20);
}

static void test_flush_to_zero(void)
{
    volatile float tiny = 1e-39f, one = 1.0f;
    unsigned before = ouro_ftz_enter();
    CHECK(tiny * one == 0.0f);
    ouro_ftz_leave(before);
    CHECK(tiny * one > 0.0f);
}

int main(void)
{
    static const int threads[] = {1, 2, 3, 8};
    for (int i = 0; i < 4; i++) {
        test_regions(threads[i]);
        test_work(threads[i], 5000, 7);
        test_work(threads[i], 3, 1);
        test_work(threads[i], 0, 4);
        test_work(threads[i], 4999, 1000);
    }
#if !defined(__SANITIZE_THREAD__)
    test_fork();                         /* a forked child may not make threads under ThreadSanitizer */
#endif
    test_memory();
    test_flush_to_zero();
    CHECK(ouro_pool_new(-1) == NULL && strstr(ouro_last_error(), "-1"));
    CHECK(ouro_fail(OURO_ERR_SHAPE, "found %d", 3) == OURO_ERR_SHAPE && strcmp(ouro_last_error(), "found 3") == 0);
    CHECK(strcmp(ouro_status_name(OURO_ERR_CANCELLED), "cancelled") == 0 && strcmp(ouro_status_name(7), "unknown status") == 0);
    ouro_blas *blas;
    CHECK(ouro_blas_open("/nonexistent.so", &blas) == OURO_ERR_UNSUPPORTED && blas == NULL);
    CHECK(ouro_cpu_count() >= 1);
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0;
}
