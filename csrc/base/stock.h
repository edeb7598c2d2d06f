/* stock.h - blocks of one size that are kept when they are freed, for whoever needs one next.
 *
 * New memory is dear: the system clears each page when it is first touched, and a virtual machine may have to ask its host
 * for it. A kept block only has to be cleared. What is kept and what is out together never exceed what was once out, and
 * no more than `limit` is kept. Any thread may call at any time.
 */
#ifndef OURO_BASE_STOCK_H
#define OURO_BASE_STOCK_H

#include <pthread.h>
#include <stddef.h>

typedef struct ouro_stock {
    pthread_mutex_t lock;
    size_t block_bytes, limit;
    size_t kept;                 /* bytes */
    void *first;                 /* of the kept blocks; each begins with the address of the next */
} ouro_stock;

/* OURO_OK or OURO_ERR_SYSTEM; nothing is allocated. */
int ouro_stock_init(ouro_stock *s, size_t block_bytes, size_t limit);
/* Gives back what is kept. */
void ouro_stock_fini(ouro_stock *s);

/* A block of zeros, as of ouro_big_alloc; NULL when there is no memory. */
void *ouro_stock_take(ouro_stock *s);
/* A block back, p not NULL: kept, or to the system when enough is kept. */
void ouro_stock_give(ouro_stock *s, void *p);

/* Makes and touches blocks beforehand until `bytes` are kept, or as many as the limit and the system allow; the bytes that are kept. */
size_t ouro_stock_fill(ouro_stock *s, size_t bytes);

size_t ouro_stock_kept(ouro_stock *s);
/* Gives back to the system what is kept; its bytes. */
size_t ouro_stock_empty(ouro_stock *s);

#endif
