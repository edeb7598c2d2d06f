/* test_base_pool.c - regions, barriers, sleeping, crowding, callers in turn, fork, and the divider of work.
 *
 * The plain (not atomic) cells that threads hand to each other over a barrier are there for ThreadSanitizer: a barrier
 * that does not order memory is a data race here.
 */
#include "base/cpu.h"
#include "base/pool.h"
#include "harness.h"
#include "ouro_status.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 8

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

/* ---- regions and barriers ------------------------------------------------------------------------------------ */

typedef struct relay {
    ouro_pool *pool;
    int rounds;
    long cell[MOST];             /* written by its thread only, read by the others after a barrier */
    long wrong[MOST];
} relay;

/* Each round every thread writes its cell, and after the barrier reads all of them. */
static void relay_region(void *ctx, int thread, int n)
{
    relay *r = ctx;
    for (int i = 0; i < r->rounds; i++) {
        r->cell[thread] = i * 10L + thread;
        ouro_pool_barrier(r->pool, thread);
        for (int t = 0; t < n; t++) r->wrong[thread] += r->cell[t] != i * 10L + t;
        ouro_pool_barrier(r->pool, thread);
    }
}

static void relay_on(int threads, int regions, int rounds)
{
    relay r = {.pool = ouro_pool_new(threads), .rounds = rounds};
    EXPECT(r.pool && ouro_pool_threads(r.pool) == threads, "%d threads asked", threads);
    int bad = 0;
    for (int i = 0; i < regions; i++) bad += ouro_pool_run(r.pool, relay_region, &r) != OURO_OK;
    long wrong = 0;
    for (int t = 0; t < MOST; t++) wrong += r.wrong[t];
    EXPECT(bad == 0 && wrong == 0, "%d threads: %d regions failed, %ld cells were stale", threads, bad, wrong);
    ouro_pool_free(r.pool);
}

static void test_regions_and_barriers(void)
{
    for (int threads = 1; threads <= 4; threads++) relay_on(threads, 500, 6);
}

/* more threads than processors: must finish, and soon, because waiting threads sleep */
static void test_crowded(void) { relay_on(MOST, 100, 4); }

static void count_region(void *ctx, int thread, int n)
{
    long *counts = ctx;
    counts[thread]++;
    if (thread == 0) counts[MOST] = n;
}

/* workers fall asleep between regions and wake again */
static void test_sleeping_workers_wake(void)
{
    long counts[MOST + 1] = {0};
    ouro_pool *p = ouro_pool_new(3);
    for (int i = 0; i < 20; i++) {
        ouro_pool_run(p, count_region, counts);
        if (i % 4 == 0) sleep_ms(5);
    }
    EXPECT(counts[0] == 20 && counts[1] == 20 && counts[2] == 20 && counts[MOST] == 3, "%ld %ld %ld runs on %ld",
           counts[0], counts[1], counts[2], counts[MOST]);
    ouro_pool_free(p);
}

static double processor_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* a pool that has nothing to do uses no processor */
static void test_idle_costs_nothing(void)
{
    long counts[MOST + 1] = {0};
    ouro_pool *p = ouro_pool_new(4);
    ouro_pool_run(p, count_region, counts);
    sleep_ms(50);
    double before = processor_seconds();
    sleep_ms(300);
    double used = processor_seconds() - before;
    EXPECT(used < 0.1, "%.3f s of processor time in 0.3 s of idling", used);
    ouro_pool_free(p);
}

static void test_sizes(void)
{
    EXPECT(ouro_pool_new(-1) == NULL && strstr(ouro_last_error(), "-1"), "%s", ouro_last_error());
    EXPECT(ouro_pool_new(100000) == NULL, "a pool of 100000 threads");
    ouro_pool *p = ouro_pool_new(0);
    EXPECT(ouro_pool_threads(p) == ouro_cpu_count(), "%d threads, %d processors", ouro_pool_threads(p), ouro_cpu_count());
    EXPECT(ouro_pool_run(p, NULL, NULL) == OURO_ERR_ARGUMENT, "a region without a function");
    ouro_pool_free(p);                   /* never ran: no thread to end */
    ouro_pool_free(NULL);
}

static void mode_region(void *ctx, int thread, int n)
{
    (void)n;
    volatile float tiny = 1e-38f, tenth = 0.1f;
    ((float *)ctx)[thread] = tiny * tenth;
}

static void test_denormals_are_flushed_inside_only(void)
{
    float product[MOST];
    for (int t = 0; t < MOST; t++) product[t] = 7.0f;
    ouro_pool *p = ouro_pool_new(3);
    ouro_pool_run(p, mode_region, product);
    EXPECT(product[0] == 0.0f && product[1] == 0.0f && product[2] == 0.0f, "%g %g %g", (double)product[0],
           (double)product[1], (double)product[2]);
    mode_region(product, 0, 1);
    EXPECT(product[0] > 0.0f, "the caller's mode was not restored");
    ouro_pool_free(p);
}

/* ---- several callers ------------------------------------------------------------------------------------------ */

typedef struct callers { ouro_pool *pool; long total; int inside, overlaps; } callers;

static void exclusive_region(void *ctx, int thread, int n)
{
    callers *c = ctx;
    (void)n;
    if (thread != 0) return;
    c->overlaps += c->inside++;          /* plain on purpose: the pool's turn is what protects them */
    c->total++;
    c->inside--;
}

static void *call_often(void *ctx)
{
    callers *c = ctx;
    for (int i = 0; i < 200; i++) ouro_pool_run(c->pool, exclusive_region, c);
    return NULL;
}

static void test_callers_take_turns(void)
{
    callers c = {.pool = ouro_pool_new(2)};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, call_often, &c);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    EXPECT(c.total == 800 && c.overlaps == 0, "%ld regions of 800, %d overlaps", c.total, c.overlaps);
    ouro_pool_free(c.pool);
}

/* ---- fork ------------------------------------------------------------------------------------------------------ */

/* Exit code of a child that runs `regions` regions and frees the pool; 99 when it hung for ten seconds. */
static int child_runs(ouro_pool *p, int regions)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(30);
        long counts[MOST + 1] = {0};
        for (int i = 0; i < regions; i++)
            if (ouro_pool_run(p, count_region, counts) != OURO_OK) _exit(2);
        for (int t = 0; t < ouro_pool_threads(p); t++)
            if (counts[t] != regions) _exit(3);
        ouro_pool_free(p);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

static void test_fork(void)
{
    for (int threads = 1; threads <= 3; threads++) {
        long counts[MOST + 1] = {0};
        ouro_pool *p = ouro_pool_new(threads);
        EXPECT(child_runs(p, 3) == 0, "fork before the first region, %d threads", threads);
        ouro_pool_run(p, count_region, counts);
        EXPECT(child_runs(p, 50) == 0, "fork after a region, %d threads", threads);
        EXPECT(child_runs(p, 0) == 0, "a child that only frees, %d threads", threads);
        ouro_pool_run(p, count_region, counts);
        EXPECT(counts[threads - 1] == 2, "the parent goes on: %ld runs", counts[threads - 1]);
        ouro_pool_free(p);
    }
}

/* fork while another thread is inside of a region: the child's lock must not stay taken */
static void test_fork_during_a_region(void)
{
    callers c = {.pool = ouro_pool_new(2)};
    pthread_t other;
    int failures = 0;
    pthread_create(&other, NULL, call_often, &c);
    for (int i = 0; i < 10; i++) failures += child_runs(c.pool, 2) != 0;
    pthread_join(other, NULL);
    EXPECT(failures == 0, "%d of 10 children failed", failures);
    ouro_pool_free(c.pool);
}

/* ---- work ------------------------------------------------------------------------------------------------------ */

typedef struct deal {
    ouro_pool *pool;
    ouro_work work;
    int units, chunk, slow;      /* thread `slow` dawdles, so that the others steal from it */
    int times[3000];             /* plain: each unit must be one thread's own */
    long steals[MOST];
} deal;

static void deal_region(void *ctx, int thread, int n)
{
    deal *d = ctx;
    int begin, end;
    ouro_work_init_own(&d->work, d->units, thread, n);
    ouro_pool_barrier(d->pool, thread);
    while (ouro_work_next(&d->work, thread, n, d->chunk, &begin, &end)) {
        if (end - begin < 1 || end - begin > d->chunk) d->steals[thread] = -1000000;
        for (int u = begin; u < end; u++) d->times[u]++;
        d->steals[thread] += (long)begin * n / (d->units ? d->units : 1) != thread;
        if (thread == d->slow) sleep_ms(1);
    }
}

static void test_work_once_each(void)
{
    static const int units[] = {0, 1, 2, 3, 7, 64, 1000, 2999}, chunks[] = {1, 2, 5, 64};
    static deal d;
    for (int threads = 1; threads <= 5; threads++) {
        ouro_pool *p = ouro_pool_new(threads);
        for (size_t i = 0; i < sizeof units / sizeof *units * (sizeof chunks / sizeof *chunks); i++) {
            memset(&d, 0, sizeof d);
            d.pool = p, d.units = units[i / 4], d.chunk = chunks[i % 4];
            d.slow = d.units / d.chunk > 200 ? -1 : 0;
            ouro_pool_run(p, deal_region, &d);
            int wrong = 0;
            for (int u = 0; u < 3000; u++) wrong += d.times[u] != (u < d.units);
            long least = 0;
            for (int t = 0; t < MOST; t++) least = d.steals[t] < least ? d.steals[t] : least;
            EXPECT(wrong == 0 && least == 0, "%d units by %d on %d threads: %d not done once", d.units, d.chunk, threads, wrong);
        }
        ouro_pool_free(p);
    }
}

/* the quick thread ends up with much of the slow one's share */
static void test_work_is_stolen(void)
{
    static deal d;
    d.pool = ouro_pool_new(2), d.units = 200, d.chunk = 1, d.slow = 0;
    ouro_pool_run(d.pool, deal_region, &d);
    EXPECT(d.steals[1] > 10, "thread 1 took %ld units of thread 0", d.steals[1]);
    ouro_pool_free(d.pool);
}

/* threads beyond OURO_WORK_THREADS only help; called in a row by one thread, the same code */
static void test_work_of_many_threads(void)
{
    static ouro_work w;
    static int times[500];
    int begin, end, wrong = 0;
    for (int t = 0; t < 100; t++) ouro_work_init_own(&w, 500, t, 100);
    for (int t = 99; t >= 0; t -= 3)
        for (int i = 0; i < 20 && ouro_work_next(&w, t, 100, 3, &begin, &end); i++)
            for (int u = begin; u < end; u++) times[u]++;
    for (int u = 0; u < 500; u++) wrong += times[u] != 1;
    EXPECT(wrong == 0, "%d of 500 units not done once", wrong);
}

int main(void)
{
    long failed = harness_failed;
    RUN(test_regions_and_barriers);
    RUN(test_crowded);
    RUN(test_sleeping_workers_wake);
    RUN(test_idle_costs_nothing);
    RUN(test_sizes);
    RUN(test_denormals_are_flushed_inside_only);
    RUN(test_callers_take_turns);
    /* a child of fork() may not make threads under ThreadSanitizer, nor under qemu's user emulation */
    if (getenv("OURO_TEST_NO_FORK")) {
        printf("fork: skipped as OURO_TEST_NO_FORK asks\n");
    } else {
        RUN(test_fork);
        RUN(test_fork_during_a_region);
    }
    RUN(test_work_once_each);
    RUN(test_work_is_stolen);
    RUN(test_work_of_many_threads);
    return harness_failed != failed;
}
