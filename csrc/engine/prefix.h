/* prefix.h - blocks of 64 positions that requests with the same beginning share, least recently used first to go.
 *
 *   key of a block    the block before it, and its own 64 tokens: so all tokens up to its end, compared, not only hashed
 *   content           one page per step 0..n_steps-1. Keys and values at step t depend on the tokens and on steps < t
 *                     only, so a block serves every request that runs at most n_steps steps
 *
 * Only blocks whose positions have run all their steps come here, and nothing writes them afterwards. A block is always
 * more recently used than the ones that follow it, so the oldest has no followers and can go alone.
 */
#ifndef OURO_ENGINE_PREFIX_H
#define OURO_ENGINE_PREFIX_H

#include "engine/cache.h"

typedef struct ouro_prefix_block ouro_prefix_block;

typedef struct ouro_prefix {
    ouro_page_budget *budget;
    size_t bytes, limit;                 /* of the pages held, shared with requests or not; limit 0: off */
    ouro_prefix_block **buckets;         /* [n_buckets], a power of two */
    size_t n_buckets, n_blocks;
    ouro_prefix_block *newest, *oldest;
} ouro_prefix;

void ouro_prefix_init(ouro_prefix *p, ouro_page_budget *budget, size_t limit);
void ouro_prefix_fini(ouro_prefix *p);

/* Gives an empty or adopting sequence the blocks that are here, behind the ones it has, at most up to n_positions;
 * returns how many positions it has now. */
int ouro_prefix_adopt(ouro_prefix *p, ouro_sequence *s, int n_positions);
/* Keeps the first n_blocks blocks of a sequence, as far as the limit allows. */
void ouro_prefix_keep(ouro_prefix *p, const ouro_sequence *s, int n_blocks);
/* Drops the oldest blocks until the budget has `bytes` free; false when that can not be. */
bool ouro_prefix_make_room(ouro_prefix *p, size_t bytes);

#endif
