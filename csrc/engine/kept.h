/* kept.h - keys and values of one sequence that stay from trace to trace, so that what it grows by is all that is run.
 *
 * An engine keeps pages by step; a trace may run any program of passes, and has a row of pages for each of them. A trace
 * with kept pages runs the positions behind those that the trace before it has run, and leaves all of them there.
 */
#ifndef OURO_ENGINE_KEPT_H
#define OURO_ENGINE_KEPT_H

#include "engine/cache.h"
#include "model/workspace.h"

typedef struct ouro_kept {
    ouro_page_budget budget;
    ouro_sequence sequence;          /* a row of pages for each pass */
    int most, done;                  /* positions: at most, and those that have been run */
} ouro_kept;

/* For a sequence of at most n positions, n_turns passes. OURO_ERR_MEMORY with the numbers when that would not fit. */
int ouro_kept_new(ouro_workspace *ws, int n, int n_turns, ouro_kept **out);
void ouro_kept_free(ouro_kept *k);

#endif
