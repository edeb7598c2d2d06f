/* stock.c - see stock.h. */
#include "base/stock.h"

#include <string.h>

#include "base/memory.h"
#include "ouro_status.h"

int ouro_stock_init(ouro_stock *s, size_t block_bytes, size_t limit)
{
    *s = (ouro_stock){.block_bytes = block_bytes, .limit = limit};
    return pthread_mutex_init(&s->lock, NULL) ? ouro_fail(OURO_ERR_SYSTEM, "no mutex for kept memory") : OURO_OK;
}

void ouro_stock_fini(ouro_stock *s)
{
    ouro_stock_empty(s);
    pthread_mutex_destroy(&s->lock);
}

void *ouro_stock_take(ouro_stock *s)
{
    pthread_mutex_lock(&s->lock);
    void *p = s->first;
    if (p) {
        memcpy(&s->first, p, sizeof p);
        s->kept -= s->block_bytes;
    }
    pthread_mutex_unlock(&s->lock);
    return p ? memset(p, 0, s->block_bytes) : ouro_big_alloc(s->block_bytes);
}

void ouro_stock_give(ouro_stock *s, void *p)
{
    pthread_mutex_lock(&s->lock);
    int keep = s->kept + s->block_bytes <= s->limit;
    if (keep) {
        memcpy(p, &s->first, sizeof p);
        s->first = p;
        s->kept += s->block_bytes;
    }
    pthread_mutex_unlock(&s->lock);
    if (!keep) ouro_big_free(p, s->block_bytes);
}

size_t ouro_stock_fill(ouro_stock *s, size_t bytes)
{
    if (bytes > s->limit) bytes = s->limit;
    while (ouro_stock_kept(s) + s->block_bytes <= bytes) {
        void *p = ouro_big_alloc(s->block_bytes);
        if (!p) break;
        ouro_stock_give(s, memset(p, 0, s->block_bytes));
    }
    return ouro_stock_kept(s);
}

size_t ouro_stock_kept(ouro_stock *s)
{
    pthread_mutex_lock(&s->lock);
    size_t kept = s->kept;
    pthread_mutex_unlock(&s->lock);
    return kept;
}

size_t ouro_stock_empty(ouro_stock *s)
{
    pthread_mutex_lock(&s->lock);
    void *p = s->first;
    size_t kept = s->kept;
    s->first = NULL;
    s->kept = 0;
    pthread_mutex_unlock(&s->lock);
    for (void *next; p; p = next) {
        memcpy(&next, p, sizeof next);
        ouro_big_free(p, s->block_bytes);
    }
    return kept;
}
