/* prefix.c - see prefix.h. */
#include "engine/prefix.h"

#include <stdlib.h>
#include <string.h>

#include "ouro_status.h"

struct ouro_prefix_block {
    ouro_prefix_block *parent;           /* NULL: the first 64 positions */
    ouro_prefix_block *chain;            /* in its bucket */
    ouro_prefix_block *newer, *older;
    size_t hash;
    int n_steps;
    int32_t tokens[OURO_BLOCK];
    ouro_page *page[];                   /* [n_steps] */
};

void ouro_prefix_init(ouro_prefix *p, ouro_page_budget *budget, size_t limit)
{
    *p = (ouro_prefix){.budget = budget, .limit = limit};
}

/* ---- the list by use ------------------------------------------------------------------------------------------- */

static void unlink_use(ouro_prefix *p, ouro_prefix_block *b)
{
    *(b->newer ? &b->newer->older : &p->newest) = b->older;
    *(b->older ? &b->older->newer : &p->oldest) = b->newer;
}

static void link_newest(ouro_prefix *p, ouro_prefix_block *b)
{
    b->newer = NULL;
    b->older = p->newest;
    *(p->newest ? &p->newest->newer : &p->oldest) = b;
    p->newest = b;
}

/* A block was used, and so was everything before it: the first block ends up as the newest. */
static void touch(ouro_prefix *p, ouro_prefix_block *b)
{
    for (; b; b = b->parent) {
        unlink_use(p, b);
        link_newest(p, b);
    }
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* FNV-1a over the tokens, from the hash of the block before */
static size_t hash_of(const ouro_prefix_block *parent, const int32_t *tokens)
{
    uint64_t h = parent ? (uint64_t)parent->hash : 14695981039346656037u;
    for (int i = 0; i < OURO_BLOCK; i++) h = (h ^ (uint32_t)tokens[i]) * 1099511628211u;
    return (size_t)(h ^ h >> 29);
}

static ouro_prefix_block *find(const ouro_prefix *p, const ouro_prefix_block *parent, const int32_t *tokens)
{
    if (!p->n_buckets) return NULL;
    size_t hash = hash_of(parent, tokens);
    ouro_prefix_block *b = p->buckets[hash & (p->n_buckets - 1)];
    while (b && (b->hash != hash || b->parent != parent || memcmp(b->tokens, tokens, sizeof b->tokens))) b = b->chain;
    return b;
}

static bool widen(ouro_prefix *p)
{
    size_t n = p->n_buckets ? 2 * p->n_buckets : 64;
    ouro_prefix_block **buckets = calloc(n, sizeof *buckets);
    if (!buckets) return false;
    for (ouro_prefix_block *b = p->newest; b; b = b->older) {
        b->chain = buckets[b->hash & (n - 1)];
        buckets[b->hash & (n - 1)] = b;
    }
    free(p->buckets);
    p->buckets = buckets;
    p->n_buckets = n;
    return true;
}

static size_t bytes_of(const ouro_prefix *p, int n_steps) { return (size_t)n_steps * p->budget->layout->page_bytes; }

/* Takes a block out of the table and the list; its pages live on in the requests that share them. */
static void drop(ouro_prefix *p, ouro_prefix_block *b)
{
    ouro_prefix_block **at = &p->buckets[b->hash & (p->n_buckets - 1)];
    while (*at != b) at = &(*at)->chain;
    *at = b->chain;
    unlink_use(p, b);
    for (int t = 0; t < b->n_steps; t++) ouro_page_release(p->budget, b->page[t]);
    p->bytes -= bytes_of(p, b->n_steps);
    p->n_blocks--;
    free(b);
}

void ouro_prefix_fini(ouro_prefix *p)
{
    while (p->oldest) drop(p, p->oldest);
    free(p->buckets);
    memset(p, 0, sizeof *p);
}

bool ouro_prefix_make_room(ouro_prefix *p, size_t bytes)
{
    const ouro_page_budget *b = p->budget;
    while (p->oldest && bytes > b->limit - b->bytes) drop(p, p->oldest);
    return bytes <= b->limit - b->bytes;
}

/* Room under the limit for n_steps more pages behind `parent`, which must stay. */
static bool make_place(ouro_prefix *p, const ouro_prefix_block *parent, int n_steps)
{
    size_t bytes = bytes_of(p, n_steps);
    while (p->oldest && p->oldest != parent && p->bytes + bytes > p->limit) drop(p, p->oldest);
    return p->bytes + bytes <= p->limit && (p->n_blocks < p->n_buckets || widen(p));
}

static ouro_prefix_block *add(ouro_prefix *p, ouro_prefix_block *parent, const ouro_sequence *s, int block)
{
    touch(p, parent);
    if (!make_place(p, parent, s->n_rows)) return NULL;
    ouro_prefix_block *b = malloc(sizeof *b + (size_t)s->n_rows * sizeof *b->page);
    if (!b) return NULL;
    const int32_t *tokens = s->tokens + block * OURO_BLOCK;
    b->parent = parent;
    b->hash = hash_of(parent, tokens);
    b->n_steps = s->n_rows;
    memcpy(b->tokens, tokens, sizeof b->tokens);
    for (int t = 0; t < s->n_rows; t++) b->page[t] = ouro_page_share(ouro_sequence_page(s, t, block));
    b->chain = p->buckets[b->hash & (p->n_buckets - 1)];
    p->buckets[b->hash & (p->n_buckets - 1)] = b;
    link_newest(p, b);
    touch(p, parent);
    p->bytes += bytes_of(p, b->n_steps);
    p->n_blocks++;
    return b;
}

/* ---- use --------------------------------------------------------------------------------------------------------- */

int ouro_prefix_adopt(ouro_prefix *p, ouro_sequence *s, int n_positions)
{
    ouro_prefix_block *at = NULL;
    int i = 0;
    for (; (i + 1) * OURO_BLOCK <= n_positions; i++) {
        ouro_prefix_block *b = find(p, at, s->tokens + i * OURO_BLOCK);
        if (!b || b->n_steps < s->n_rows) break;
        if (i == s->n_blocks && ouro_sequence_share(s, b->page) != OURO_OK) break;
        at = b;
    }
    touch(p, at);
    return s->n_blocks * OURO_BLOCK;
}

/* A block of fewer steps gives way to a deeper one, with all that follows it. */
static void drop_tree(ouro_prefix *p, ouro_prefix_block *root)
{
    for (ouro_prefix_block *b = p->oldest, *next; b; b = next) {
        const ouro_prefix_block *a = b;
        next = b->newer;
        while (a && a != root) a = a->parent;
        bool last = b == root;           /* followers are older, so root goes last */
        if (a) drop(p, b);
        if (last) return;
    }
}

void ouro_prefix_keep(ouro_prefix *p, const ouro_sequence *s, int n_blocks)
{
    if (!p->limit) return;
    ouro_prefix_block *at = NULL;
    for (int i = 0; i < n_blocks; i++) {
        ouro_prefix_block *b = find(p, at, s->tokens + i * OURO_BLOCK);
        if (b && b->n_steps < s->n_rows) {
            drop_tree(p, b);
            b = NULL;
        }
        if (!b) b = add(p, at, s, i);
        if (!b) break;
        at = b;
    }
    touch(p, at);
}
