/* mapping.c - see mapping.h. */
#include "base/mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/pool.h"
#include "ouro_status.h"

#define PIECE ((size_t)1 << 20)

int ouro_map_open(ouro_map *m, const char *path)
{
    struct stat st;
    *m = (ouro_map){.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (m->fd < 0) return ouro_fail(OURO_ERR_SYSTEM, "cannot open: %s", strerror(errno));
    if (fstat(m->fd, &st) == 0 && S_ISREG(st.st_mode)) {
        m->bytes = (size_t)st.st_size;
        m->modified = st.st_mtim;
        return OURO_OK;
    }
    ouro_map_close(m);
    return ouro_fail(OURO_ERR_FORMAT, "not a regular file");
}

int ouro_map_read(const ouro_map *m, size_t offset, void *dst, size_t n)
{
    uint8_t *p = dst;
    while (n) {
        ssize_t done = pread(m->fd, p, n < (size_t)1 << 30 ? n : (size_t)1 << 30, (off_t)offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return ouro_fail(OURO_ERR_SYSTEM, "cannot read: %s", strerror(errno));
        if (done == 0) return ouro_fail(OURO_ERR_FORMAT, "the file ended early (did it shrink?)");
        p += done;
        offset += (size_t)done;
        n -= (size_t)done;
    }
    return OURO_OK;
}

int ouro_map_pages(ouro_map *m)
{
    void *p = m->bytes ? mmap(NULL, m->bytes, PROT_READ, MAP_SHARED, m->fd, 0) : MAP_FAILED;
    if (p == MAP_FAILED) return ouro_fail(OURO_ERR_SYSTEM, "cannot map %zu bytes: %s", m->bytes, strerror(errno));
    m->data = p;
#ifdef MADV_HUGEPAGE
    (void)madvise(p, m->bytes, MADV_HUGEPAGE);           /* where the file system has large folios, or is memory */
#endif
    (void)madvise(p, m->bytes, MADV_WILLNEED);           /* starts reading what is not cached yet */
    return OURO_OK;
}

int ouro_map_check(const ouro_map *m)
{
    struct stat st;
    if (m->fd < 0) return OURO_OK;
    if (fstat(m->fd, &st) == 0 && (size_t)st.st_size == m->bytes && st.st_mtim.tv_sec == m->modified.tv_sec
        && st.st_mtim.tv_nsec == m->modified.tv_nsec)
        return OURO_OK;
    return ouro_fail(OURO_ERR_FORMAT, "the file of the weights was changed while they were in use: load the model again");
}

void ouro_map_close(ouro_map *m)
{
    if (m->data) munmap(m->data, m->bytes);
    if (m->fd >= 0) close(m->fd);
    m->data = NULL;
    m->fd = -1;
}

/* ---- hash ------------------------------------------------------------------------------------------------------ */

static inline uint64_t stir(uint64_t h, uint64_t word)
{
    h ^= word;
    return (h << 29 | h >> 35) * 0x9e3779b97f4a7c15u;
}

uint64_t ouro_hash(const void *data, size_t n, uint64_t seed)
{
    const uint8_t *p = data;
    uint64_t lane[8], word[8], h = stir(14695981039346656037u, seed);
    for (uint64_t i = 0; i < 8; i++) lane[i] = stir(h, i);
    size_t whole = n & ~(size_t)63, rest = n - whole;
    for (size_t at = 0; at < whole; at += 64) {
        memcpy(word, p + at, sizeof word);
        for (int i = 0; i < 8; i++) lane[i] = stir(lane[i], word[i]);
    }
    if (rest) {
        memset(word, 0, sizeof word);
        memcpy(word, p + whole, rest);
        for (int i = 0; i < 8; i++) lane[i] = stir(lane[i], word[i]);
    }
    h = stir(h, n);
    for (int i = 0; i < 8; i++) h = stir(h, lane[i]);
    return h ^ h >> 32;
}

typedef struct hash_run {
    const uint8_t *data;
    size_t n;
    int pieces;
    uint64_t *hashes;
    ouro_pool *pool;
    ouro_work work;
} hash_run;

static void hash_thread(void *arg, int thread, int n_threads)
{
    hash_run *r = arg;
    int begin, end;
    ouro_work_init_own(&r->work, r->pieces, thread, n_threads);
    ouro_pool_barrier(r->pool, thread);
    while (ouro_work_next(&r->work, thread, n_threads, 4, &begin, &end))
        for (int i = begin; i < end; i++) {
            size_t at = (size_t)i * PIECE, left = r->n - at;
            r->hashes[i] = ouro_hash(r->data + at, left < PIECE ? left : PIECE, (uint64_t)i);
        }
}

int ouro_hash_parallel(const void *data, size_t n, int n_threads, uint64_t *hash)
{
    size_t pieces = (n + PIECE - 1) / PIECE;
    if (pieces > INT32_MAX) return ouro_fail(OURO_ERR_ARGUMENT, "%zu bytes are too many to hash", n);
    hash_run *r = calloc(1, sizeof *r);
    int status = OURO_ERR_MEMORY;
    if (r) {
        *r = (hash_run){.data = data, .n = n, .pieces = (int)pieces, .hashes = calloc(pieces + 1, sizeof *r->hashes),
                        .pool = ouro_pool_new(pieces < 8 ? 1 : n_threads)};
        if (r->hashes && r->pool) status = ouro_pool_run(r->pool, hash_thread, r);
        if (status == OURO_OK) *hash = ouro_hash(r->hashes, pieces * sizeof *r->hashes, n);
        if (r->pool) ouro_pool_free(r->pool);
        free(r->hashes);
    }
    free(r);
    return status == OURO_ERR_MEMORY ? ouro_fail(status, "no memory to hash %zu bytes", n) : status;
}
