/* cache.h - the tokens of one sequence and the pages that hold its keys and values.
 *
 * One page is 64 positions of one step (kv.h). A sequence has a row of pages for every step it runs; rows grow a page at
 * a time and nothing is ever copied. Pages are counted references, so sequences with the same beginning can share them.
 * A cache policy (policy.h) may leave one row that serves all steps.
 */
#ifndef OURO_ENGINE_CACHE_H
#define OURO_ENGINE_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/stock.h"
#include "model/kv.h"

/* Counts the bytes of live pages against a limit. Used from one thread at a time; the stock serves all budgets of a model. */
typedef struct ouro_page_budget {
    const ouro_kv_layout *layout;
    ouro_stock *stock;               /* where pages come from and go to */
    size_t bytes, peak, limit;
    bool (*make_room)(void *arg, size_t bytes);  /* frees pages that nobody needs until `bytes` fit, or says no; may be NULL */
    void *make_room_arg;
} ouro_page_budget;

typedef struct ouro_page {
    int refs;
    uint8_t *data;                   /* [page_bytes], zero when new */
} ouro_page;

typedef struct ouro_sequence {
    ouro_page_budget *budget;
    int n_rows;                      /* rows of pages: one per step, or one that serves all */
    int n_blocks, block_capacity;    /* pages in each row */
    ouro_page **page;                /* [n_rows][block_capacity] */
    uint8_t **data;                  /* the same, the bare pointers that lanes read */
    int32_t *tokens;                 /* [token_capacity], n_tokens in use */
    int n_tokens, token_capacity;
} ouro_sequence;

ouro_page *ouro_page_share(ouro_page *p);
void ouro_page_release(ouro_page_budget *b, ouro_page *p);

int ouro_sequence_init(ouro_sequence *s, ouro_page_budget *b, int n_steps, const int32_t *tokens, int n);
void ouro_sequence_fini(ouro_sequence *s);
/* Pages for positions 0..n-1 at every step, and room for as many tokens. OURO_ERR_MEMORY with the numbers when the budget or
 * the system has none. */
int ouro_sequence_reserve(ouro_sequence *s, int n);
int ouro_sequence_append(ouro_sequence *s, int32_t token);
/* The next block, at every step, from pages [n_steps] that already hold its positions: shared, and not written again. */
int ouro_sequence_share(ouro_sequence *s, ouro_page *const *pages);

static inline ouro_page *ouro_sequence_page(const ouro_sequence *s, int step, int block)
{
    return s->page[(size_t)step * (size_t)s->block_capacity + (size_t)block];
}

/* The pages that lanes of `step` read, [n_blocks]. */
static inline uint8_t *const *ouro_sequence_pages(const ouro_sequence *s, int step)
{
    return (uint8_t *const *)(s->data + (s->n_rows > 1 ? (size_t)step * (size_t)s->block_capacity : 0));
}

/* Releases all rows but one, which serves every step from here on. */
void ouro_sequence_keep_row(ouro_sequence *s, int row);
/* Makes page `block` of a row this sequence's own, by an empty new one when it is shared. */
int ouro_sequence_own(ouro_sequence *s, int row, int block);
/* A side row (kv.h, all layers) to position `pos` of the pages of `step`. */
void ouro_sequence_put(ouro_sequence *s, int step, int pos, const uint8_t *side);

/* Bytes of pages for n positions at n_steps steps. */
size_t ouro_cache_bytes(const ouro_kv_layout *y, int n, int n_steps);

#endif
