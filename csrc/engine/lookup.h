/* lookup.h - guesses from a sequence's own repeats (prompt lookup): what followed the last time the same tokens stood at the end.
 *
 * It costs no pass and no readout, so every token that comes is compared with what would have been guessed. As long as that keeps
 * being right, tokens may be guessed before anything of their predecessor is known: one more ahead with every right one.
 */
#ifndef OURO_ENGINE_LOOKUP_H
#define OURO_ENGINE_LOOKUP_H

#include <stdint.h>

/* The token behind the latest earlier place in tokens [n] at which the longest stretch of its end stands too; -1 when fewer than
 * OURO_LOOKUP_LEAST tokens agree everywhere. */
#define OURO_LOOKUP_LEAST 3
int32_t ouro_lookup(const int32_t *tokens, int n);

/* How many tokens may be guessed so, after `in_a_row` were right. */
static inline int ouro_lookup_ahead(int in_a_row) { return in_a_row > 2 ? in_a_row - 2 : 0; }

#endif
