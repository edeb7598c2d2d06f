/* policy.h - cache policies: which of its keys and values a token leaves to later ones (MODEL section 4).
 *
 *   full          those of every step, in a row of pages per step; exact
 *   last_step     those of the last step it ran            \
 *   average       the mean over the steps it ran            }  one row of pages, read at every step
 *   first_step    those of its first step                  /
 *   last_exited   those of every step it ran; the last of them stands in for the deeper ones
 *
 * The prompt always runs in full; a policy that keeps one row folds the prompt's rows into it when the prompt is done.
 * Under every policy a token sees *itself* with the key and value of its own step. Until it is decided these live in side
 * rows (node.h), then ouro_policy_keep writes what the policy keeps. Under every policy but full, a token that leaves
 * early never runs its deeper steps: nothing would read them.
 */
#ifndef OURO_ENGINE_POLICY_H
#define OURO_ENGINE_POLICY_H

#include <stdbool.h>

#include "engine/cache.h"

typedef enum ouro_kv_policy {
    OURO_POLICY_FULL = 0, OURO_POLICY_LAST_STEP = 1, OURO_POLICY_AVERAGE = 2, OURO_POLICY_FIRST_STEP = 3,
    OURO_POLICY_LAST_EXITED = 4, OURO_N_POLICIES
} ouro_kv_policy;

/* One row of pages serves all steps once the prompt is done. */
static inline bool ouro_policy_folds(ouro_kv_policy p)
{
    return p == OURO_POLICY_LAST_STEP || p == OURO_POLICY_AVERAGE || p == OURO_POLICY_FIRST_STEP;
}

/* What a token leaves is known only after its last step, so no successor can start before: no speculation. */
static inline bool ouro_policy_waits(ouro_kv_policy p) { return p == OURO_POLICY_LAST_STEP || p == OURO_POLICY_AVERAGE; }

/* The step whose side row a successor sees while this token is still on its way, for a lane of `step`. */
static inline int ouro_policy_visible(ouro_kv_policy p, int step) { return p == OURO_POLICY_FIRST_STEP ? 0 : step; }

/* Bytes of pages that a sequence needs at its peak, prompt of n_prompt and n_total positions at `depth` steps; and after
 * folding. */
size_t ouro_policy_peak_bytes(ouro_kv_policy p, const ouro_kv_layout *y, int n_prompt, int n_total, int depth);
size_t ouro_policy_rest_bytes(ouro_kv_policy p, const ouro_kv_layout *y, int n_total, int depth);

/* Folds the rows of a finished prompt into one. Pages that other sequences share are left as they are. */
int ouro_policy_fold(ouro_kv_policy p, ouro_sequence *s);

/* Writes to the pages what a token at `pos` leaves, from the side rows of the steps it ran: sides [ran] of the `depth` that
 * are possible. `average` uses sides[0] as scratch. */
void ouro_policy_keep(ouro_kv_policy p, ouro_sequence *s, int pos, uint8_t *const *sides, int ran, int depth);

#endif
