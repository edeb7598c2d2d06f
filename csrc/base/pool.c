/* pool.c - see pool.h. Linux sleeps on a futex; elsewhere a waiting thread yields. */
#include "base/pool.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/cpu.h"
#include "ouro_status.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#define SPIN_ALONE 4000          /* pauses before sleeping when every thread has a processor: some 50 us */
#define SPIN_CROWDED 50          /* and when processors are shared */
#define REBUILDING ((pid_t)-1)

struct ouro_pool {
    int n_threads, spin;
    _Atomic pid_t pid;           /* the process the pool belongs to; REBUILDING while a child takes it over */
    pthread_t *threads;          /* [n_threads - 1] */
    pthread_mutex_t turn;        /* held during a region */
    bool started;                /* the threads exist; under `turn` */
    ouro_region_fn fn;
    void *ctx;
    bool stop;
    _Alignas(64) _Atomic uint32_t epoch;         /* grows by one for each region */
    _Alignas(64) _Atomic uint32_t arrived;       /* at the current barrier */
    _Alignas(64) _Atomic uint32_t generation;    /* grows by one for each barrier */
    _Alignas(64) _Atomic uint32_t sleepers;
};

typedef struct worker { ouro_pool *pool; int thread; } worker;

/* ---- waiting ------------------------------------------------------------------------------------------------- */

static inline void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns once *word is no longer `old`: spins, then sleeps. */
static void wait_change(ouro_pool *p, _Atomic uint32_t *word, uint32_t old)
{
    for (int i = 0; i < p->spin; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        pause_cpu();
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(word) == old) {
#if defined(__linux__)
        syscall(SYS_futex, (uint32_t *)(void *)word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&p->sleepers, 1);
}

static void change(ouro_pool *p, _Atomic uint32_t *word)
{
    atomic_fetch_add(word, 1);
#if defined(__linux__)
    if (atomic_load(&p->sleepers)) syscall(SYS_futex, (uint32_t *)(void *)word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#else
    (void)p;
#endif
}

void ouro_pool_barrier(ouro_pool *p, int thread)
{
    (void)thread;
    if (p->n_threads == 1) return;
    uint32_t generation = atomic_load(&p->generation);
    if (atomic_fetch_add(&p->arrived, 1) + 1 == (uint32_t)p->n_threads) {
        atomic_store(&p->arrived, 0);
        change(p, &p->generation);
    } else {
        wait_change(p, &p->generation, generation);
    }
}

/* ---- threads ------------------------------------------------------------------------------------------------- */

/* "ouro-3" in a debugger or in top; the process itself keeps its name */
static void name_thread(int thread)
{
#if defined(__linux__)
    char name[16];
    snprintf(name, sizeof name, "ouro-%d", thread);
    pthread_setname_np(pthread_self(), name);
#else
    (void)thread;
#endif
}

static void *work_loop(void *arg)
{
    worker w = *(worker *)arg;
    ouro_pool *p = w.pool;
    free(arg);
    uint32_t epoch = 0;
    name_thread(w.thread);
    ouro_ftz_enter();
    for (;;) {
        wait_change(p, &p->epoch, epoch);
        epoch++;
        if (p->stop) return NULL;
        p->fn(p->ctx, w.thread, p->n_threads);
        ouro_pool_barrier(p, w.thread);
    }
}

/* Makes the threads, all signals blocked, so that Ctrl-C reaches the caller. On failure those made are ended. */
static int start(ouro_pool *p)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int made = 1, failed = 0;
    for (; made < p->n_threads && !failed; made += !failed) {
        worker *w = malloc(sizeof *w);
        if (w) *w = (worker){p, made};
        failed = !w || pthread_create(&p->threads[made - 1], NULL, work_loop, w) != 0;
        if (failed) free(w);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    p->started = !failed;
    if (!failed) return OURO_OK;
    p->stop = true;
    change(p, &p->epoch);
    for (int i = 1; i < made; i++) pthread_join(p->threads[i - 1], NULL);
    p->stop = false;
    atomic_store(&p->epoch, 0);
    return ouro_fail(OURO_ERR_SYSTEM, "could start only %d of %d threads", made, p->n_threads);
}

/* After fork the child has the structure but no threads; whatever state a region was in, and whoever held the turn, is
 * gone with them. Of several threads of the child that find this out together one does it and the others wait. */
static void adopt(ouro_pool *p)
{
    pid_t self = getpid(), owner = atomic_load(&p->pid);
    while (owner != self) {
        if (owner == REBUILDING || !atomic_compare_exchange_strong(&p->pid, &owner, REBUILDING)) {
            sched_yield();
            owner = atomic_load(&p->pid);
            continue;
        }
        pthread_mutex_init(&p->turn, NULL);
        p->started = p->stop = false;
        atomic_store(&p->epoch, 0);
        atomic_store(&p->arrived, 0);
        atomic_store(&p->generation, 0);
        atomic_store(&p->sleepers, 0);
        atomic_store(&p->pid, self);
        return;
    }
}

ouro_pool *ouro_pool_new(int n_threads)
{
    if (n_threads < 0 || n_threads > 1024) {
        ouro_fail(OURO_ERR_ARGUMENT, "threads is %d, expected 0 to 1024", n_threads);
        return NULL;
    }
    void *at = NULL;
    if (posix_memalign(&at, 64, sizeof(ouro_pool)) != 0) return NULL;
    ouro_pool *p = at;
    int processors = ouro_cpu_count();
    *p = (ouro_pool){.n_threads = n_threads ? n_threads : processors};
    atomic_store(&p->pid, getpid());
    p->spin = p->n_threads > processors ? SPIN_CROWDED : SPIN_ALONE;
    p->threads = calloc((size_t)p->n_threads, sizeof *p->threads);
    if (!p->threads) {
        free(p);
        return NULL;
    }
    pthread_mutex_init(&p->turn, NULL);
    return p;
}

int ouro_pool_threads(const ouro_pool *p) { return p->n_threads; }

void ouro_pool_free(ouro_pool *p)
{
    if (!p) return;
    if (atomic_load(&p->pid) == getpid()) {
        p->stop = true;
        if (p->started) change(p, &p->epoch);
        for (int i = 1; p->started && i < p->n_threads; i++) pthread_join(p->threads[i - 1], NULL);
        pthread_mutex_destroy(&p->turn);
    }
    free(p->threads);
    free(p);
}

int ouro_pool_run(ouro_pool *p, ouro_region_fn fn, void *ctx)
{
    if (!p || !fn) return ouro_fail(OURO_ERR_ARGUMENT, "pool and fn must not be NULL");
    adopt(p);
    pthread_mutex_lock(&p->turn);
    int status = p->n_threads > 1 && !p->started ? start(p) : OURO_OK;
    if (status == OURO_OK) {
        unsigned mode = ouro_ftz_enter();
        p->fn = fn;
        p->ctx = ctx;
        if (p->n_threads > 1) change(p, &p->epoch);
        fn(ctx, 0, p->n_threads);
        ouro_pool_barrier(p, 0);
        ouro_ftz_leave(mode);
    }
    pthread_mutex_unlock(&p->turn);
    return status;
}

/* ---- work ---------------------------------------------------------------------------------------------------- */

static uint64_t range_of(uint32_t begin, uint32_t end) { return (uint64_t)end << 32 | begin; }

void ouro_work_init_own(ouro_work *w, int n_units, int thread, int n_threads)
{
    int owners = n_threads < OURO_WORK_THREADS ? n_threads : OURO_WORK_THREADS;
    if (thread >= owners) return;
    int64_t n = n_units;
    atomic_store_explicit(&w->own[thread].range,
                          range_of((uint32_t)(n * thread / owners), (uint32_t)(n * (thread + 1) / owners)),
                          memory_order_relaxed);
}

/* What to take of `left` units: a chunk, but towards the end of a share a quarter of it, down to a quarter of a chunk, so
 * that the threads finish together. */
static uint32_t portion(uint32_t left, uint32_t chunk)
{
    uint32_t least = chunk / 4 > 1 ? chunk / 4 : 1, take = left / 4;
    if (take > chunk) take = chunk;
    if (take < least) take = least;
    return take < left ? take : left;
}

static bool take_front(_Atomic uint64_t *range, int chunk, int *begin, int *end)
{
    uint64_t r = atomic_load_explicit(range, memory_order_relaxed);
    for (;;) {
        uint32_t b = (uint32_t)r, e = (uint32_t)(r >> 32);
        if (b >= e) return false;
        uint32_t take = b + portion(e - b, (uint32_t)chunk);
        if (atomic_compare_exchange_weak(range, &r, range_of(take, e))) {
            *begin = (int)b;
            *end = (int)take;
            return true;
        }
    }
}

static bool take_back(_Atomic uint64_t *range, int chunk, int *begin, int *end)
{
    uint64_t r = atomic_load_explicit(range, memory_order_relaxed);
    for (;;) {
        uint32_t b = (uint32_t)r, e = (uint32_t)(r >> 32);
        if (b >= e) return false;
        uint32_t from = e - portion(e - b, (uint32_t)chunk);
        if (atomic_compare_exchange_weak(range, &r, range_of(b, from))) {
            *begin = (int)from;
            *end = (int)e;
            return true;
        }
    }
}

bool ouro_work_next(ouro_work *w, int thread, int n_threads, int chunk, int *begin, int *end)
{
    int owners = n_threads < OURO_WORK_THREADS ? n_threads : OURO_WORK_THREADS;
    if (thread < owners && take_front(&w->own[thread].range, chunk, begin, end)) return true;
    for (;;) {
        int victim = -1;
        uint32_t most = 0;
        for (int i = 0; i < owners; i++) {
            uint64_t r = atomic_load_explicit(&w->own[i].range, memory_order_relaxed);
            uint32_t b = (uint32_t)r, e = (uint32_t)(r >> 32), left = e > b ? e - b : 0;
            if (left > most) most = left, victim = i;
        }
        if (victim < 0) return false;
        if (take_back(&w->own[victim].range, chunk, begin, end)) return true;
    }
}
