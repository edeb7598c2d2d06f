/* limits.c - see limits.h. The loops are in loops.c; here threads run them side by side against the clock on the wall. */
#include "bench/limits.h"

#include "base/memory.h"
#include "ouro_status.h"

#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define ROUND_SECONDS 0.03

static _Atomic uint64_t sink;                    /* results go here, so that none of the work is dropped */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct measurement {
    ouro_pool *pool;
    const ouro_extent *extents;                  /* read: [n_extents] */
    int n_extents;
    ouro_read_loop read;
    double seconds;
    int rounds;                                  /* peak: [rounds] */
    double *rates;
    ouro_peak_loop loop;
    int64_t turns;
} measurement;

/* where the part of a thread begins, and its bytes; both are multiples of 512 */
static size_t own_part(size_t all, int thread, int n_threads, size_t *bytes)
{
    size_t units = all / 512, begin = units * (size_t)thread / (size_t)n_threads;
    size_t end = units * ((size_t)thread + 1) / (size_t)n_threads;
    *bytes = (end - begin) * 512;
    return begin * 512;
}

/* each thread touches its own part first */
typedef struct buffer { uint8_t *data; size_t bytes; } buffer;

static void touch_region(void *context, int thread, int n_threads)
{
    const buffer *b = context;
    size_t bytes, at = own_part(b->bytes, thread, n_threads, &bytes);
    memset(b->data + at, thread + 1, bytes);
}

static void read_region(void *context, int thread, int n_threads)
{
    measurement *m = context;
    uint64_t of_all = 0;
    ouro_pool_barrier(m->pool, thread);
    double begin = now();
    for (int i = 0; i < m->n_extents; i++) {
        size_t bytes, at = own_part(m->extents[i].bytes, thread, n_threads, &bytes);
        of_all ^= m->read(m->extents[i].data + at, bytes);
    }
    atomic_fetch_xor(&sink, of_all);
    ouro_pool_barrier(m->pool, thread);
    if (thread == 0) m->seconds = now() - begin;
}

static void peak_region(void *context, int thread, int n_threads)
{
    measurement *m = context;
    for (int r = 0; r < m->rounds; r++) {
        ouro_pool_barrier(m->pool, thread);
        double begin = now();
        atomic_fetch_xor(&sink, m->loop.run(m->turns));
        ouro_pool_barrier(m->pool, thread);
        if (thread == 0) m->rates[r] = m->loop.operations * (double)m->turns * n_threads / (now() - begin);
    }
}

int ouro_measure_extents(ouro_pool *pool, const ouro_extent *extents, int n, double *seconds)
{
    measurement m = {.pool = pool, .extents = extents, .n_extents = n, .read = ouro_read_loop_of_machine()};
    int status = ouro_pool_run(pool, read_region, &m);
    *seconds = m.seconds;
    return status;
}

int ouro_measure_read(ouro_pool *pool, size_t bytes, int rounds, double *rates)
{
    buffer b = {.bytes = bytes / 512 * 512};
    if (rounds < 1 || b.bytes == 0)
        return ouro_fail(OURO_ERR_ARGUMENT, "expected at least 512 bytes and 1 round, got %zu and %d", bytes, rounds);
    b.data = bytes <= ouro_available_memory() ? ouro_big_alloc(b.bytes) : NULL;
    if (!b.data) return ouro_fail(OURO_ERR_MEMORY, "no memory for a buffer of %zu bytes to read", bytes);
    int status = ouro_pool_run(pool, touch_region, &b);
    for (int r = 0; status == OURO_OK && r < rounds; r++) {
        double seconds;
        status = ouro_measure_extents(pool, &(ouro_extent){b.data, b.bytes}, 1, &seconds);
        rates[r] = (double)b.bytes / seconds;
    }
    ouro_big_free(b.data, b.bytes);
    return status;
}

int ouro_measure_peak(ouro_pool *pool, ouro_unit unit, int rounds, double *rates)
{
    if (rounds < 1) return ouro_fail(OURO_ERR_ARGUMENT, "expected at least 1 round, got %d", rounds);
    measurement m = {.pool = pool, .rounds = 1, .rates = rates, .loop = ouro_peak_loop_of(unit), .turns = 1000};
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
