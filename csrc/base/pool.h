/* pool.h - threads that run one region together (single program, many threads), a barrier, and a divider of work.
 *
 * A region is fn(ctx, thread, n_threads) on every thread at once; the caller is thread 0. Threads are made by the
 * first region, spin a little between regions and at barriers, then sleep, so idle cores are free and a region that
 * follows soon starts within a microsecond. With more threads than processors nobody spins for long.
 * A child of fork() finds a pool without threads and makes new ones with its first region.
 */
#ifndef OURO_BASE_POOL_H
#define OURO_BASE_POOL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct ouro_pool ouro_pool;
typedef void (*ouro_region_fn)(void *ctx, int thread, int n_threads);

/* n_threads 0: as many as the affinity mask has processors. NULL when memory is out or n_threads is outside 0..1024. */
ouro_pool *ouro_pool_new(int n_threads);
void ouro_pool_free(ouro_pool *p);
int ouro_pool_threads(const ouro_pool *p);

/* Runs one region and returns when every thread has left it. Callers on several threads take turns. Denormals are
 * flushed inside. OURO_ERR_SYSTEM when a thread can not be made. */
int ouro_pool_run(ouro_pool *p, ouro_region_fn fn, void *ctx);

/* Inside a region: returns when all threads have come here. */
void ouro_pool_barrier(ouro_pool *p, int thread);

/* Units 0..n-1 dealt out to threads: each owns a contiguous share, takes from its front in chunks, and when it is done
 * takes from the back of whoever has most left. Which thread works on a unit never shows in a result. */
#define OURO_WORK_THREADS 64             /* threads beyond this own no share and only help the others */
typedef struct ouro_work {
    struct { _Alignas(64) _Atomic uint64_t range; } own[OURO_WORK_THREADS];     /* begin in the low half, end above */
} ouro_work;

/* Each thread lays out its own share; a barrier must follow before anyone takes. */
void ouro_work_init_own(ouro_work *w, int n_units, int thread, int n_threads);
/* False when nothing is left; else units [*begin, *end), at most `chunk` of them. */
bool ouro_work_next(ouro_work *w, int thread, int n_threads, int chunk, int *begin, int *end);

#endif
