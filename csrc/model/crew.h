/* crew.h - how the threads of a pass share it: phases with a barrier in front, units dealt out with a balanced tail.
 *
 *   for (ouro_work *w = crew_phase(c, units); crew_take(c, w, chunk, &begin, &end);) work on units [begin, end)
 *
 * Two work objects alternate: a thread lays out its share of the next phase while others still finish this one.
 */
#ifndef OURO_MODEL_CREW_H
#define OURO_MODEL_CREW_H

#include "model/workspace.h"

typedef struct crew {
    ouro_workspace *ws;
    int thread, n_threads, turn;
} crew;

/* Waits until every thread has finished what came before, then opens a phase of `units` units. */
static inline ouro_work *crew_phase(crew *c, int units)
{
    c->turn ^= 1;
    ouro_work *w = &c->ws->work[c->turn];
    ouro_work_init_own(w, units, c->thread, c->n_threads);
    ouro_pool_barrier(c->ws->pool, c->thread);
    return w;
}

static inline bool crew_take(crew *c, ouro_work *w, int chunk, int *begin, int *end)
{
    return ouro_work_next(w, c->thread, c->n_threads, chunk, begin, end);
}

#endif
