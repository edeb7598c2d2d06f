/* inside.h - what an engine holds, and the parts of a step. For the files of the engine only.
 *
 *   admit.c       a request comes, waits, goes              schedule.c   which lanes ride in the next pass
 *   decide.c      gates, exit rules, readouts, the choice   signals.c    the numbers that exit rules look at
 *   speculate.c   guesses: when, where, how good            lookup.c     guesses from repeats
 *   cost.c        what passes cost here and now
 *   engine.c      the step itself
 */
#ifndef OURO_ENGINE_INSIDE_H
#define OURO_ENGINE_INSIDE_H

#include <pthread.h>

#include "engine/cost.h"
#include "engine/prefix.h"
#include "engine/request.h"

/* One lane of the pass being built, and whose it is: a node, or row `row` of a request's chunk. */
typedef struct ouro_rider { ouro_request *request; ouro_node *node; int row; } ouro_rider;

struct ouro_engine {
    ouro_workspace *ws;
    ouro_engine_options options;
    ouro_page_budget budget;
    ouro_prefix prefix;
    size_t reserved;                     /* by running requests */
    int64_t turn;                        /* counts the chunks of prompts that have begun */
    ouro_request *requests;              /* waiting and running, in order of arrival */

    pthread_mutex_t door;                /* over what other threads touch: the fields up to `looked` */
    int64_t last_id;
    ouro_request *arrived, **arrived_end;
    int64_t *cancels;                    /* [n_cancels] ids */
    int n_cancels, cancel_capacity;
    int pending, waiting;
    ouro_engine_status looked;

    ouro_sampler sampler;
    ouro_lane *lanes;                    /* [capacity] */
    ouro_rider *riders;                  /* [capacity] */
    int n_lanes, capacity;
    ouro_readout *readouts;              /* [n_readouts] and the nodes they belong to */
    ouro_node **readers;
    ouro_request **reader_requests;
    int n_readouts, readout_capacity;
    float *logits;                       /* [logit_rows][d_vocab] */
    float *log_z;                        /* [logit_rows][2]: log_z, entropy */
    int32_t *argmax;
    int logit_rows;
    ouro_event *events;
    int n_events, event_capacity;
    ouro_line *lines;
    int n_lines, line_capacity;
    ouro_stats stats;
    ouro_cost cost;
};

/* Makes *at hold at least n elements. */
int ouro_grow(void *at, int *capacity, int n, size_t element);

/* ---- admit.c */
/* Takes in what other threads asked for, drops what was cancelled, and lets requests start, first come, first served. */
int ouro_admit(ouro_engine *e);
/* A copy of an event in the engine's list, NULL when memory is out. */
ouro_event *ouro_add_event(ouro_engine *e, const ouro_event *from);
/* A folded request gives back what it had set aside for its prompt. */
void ouro_rest_request(ouro_engine *e, ouro_request *r);
/* Frees a request; with a last event. */
void ouro_remove_request(ouro_engine *e, ouro_request *r);
void ouro_end_request(ouro_engine *e, ouro_request *r, ouro_finish finish, int status);

/* ---- schedule.c */
/* Lanes of all running requests; prompts take turns for what decoding leaves. */
int ouro_gather(ouro_engine *e);
/* A line of the schedule, when it is recorded. */
int ouro_note(ouro_engine *e, ouro_line_kind kind, int64_t request, int pos, int step, int32_t token);
/* Behind the pass: what came out, into its lines. */
void ouro_note_states(ouro_engine *e);

/* ---- decide.c */
/* Counts the step, records the gate, asks the rules that need no readout, and notes who needs one. */
int ouro_after_pass(ouro_engine *e);
int ouro_run_readouts(ouro_engine *e, ouro_poll_fn poll, void *arg);
/* What the readout of one node means: leave, or a guess at what follows. */
void ouro_after_readout(ouro_engine *e, ouro_request *r, ouro_node *n, const ouro_readout *read);

/* ---- speculate.c */
bool ouro_guessing(const ouro_request *r);
/* Lanes of decoding that the pass behind the one that has just run has anyway; before its steps are counted. */
int ouro_lanes_to_come(const ouro_engine *e);
/* Whether a request reads out only to guess, when so many lanes come. */
bool ouro_reads_to_guess(const ouro_request *r, int lanes);
/* Compares the guesses of a decided node with its token. */
void ouro_count_guesses(ouro_stats *s, const ouro_node *n, int32_t token);
/* Compares the coming token of a request with what its repeats would have given. */
void ouro_count_lookup(ouro_request *r, int32_t token);
/* Charges the coming pass to every request that decodes in it. */
void ouro_count_pass(ouro_engine *e);
/* A token has come: whether speculation goes on. */
void ouro_keep_pace(const ouro_engine *e, ouro_request *r, int steps);       /* steps: that its last token ran before it left */
/* New guesses of every request, while lanes are free. */
void ouro_spawn(ouro_engine *e);

#endif
