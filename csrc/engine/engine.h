/* engine.h - requests that share passes: prefill, decoding, early exit and speculation over steps.
 *
 *   submit -> queue -> running -> events -> finished
 *
 * ouro_engine_step runs one pass over the lanes of all running requests, each lane at its own step, then decides what
 * their readouts mean. Which requests share a pass never shows in a result. One engine is driven by one thread at a
 * time; its workspace belongs to it while it steps. Other threads may submit and cancel meanwhile: what they ask for is
 * taken in by the next step.
 *
 * Admission: first come, first served. A request starts when a lane is free and the cache has room for its whole length;
 * nobody overtakes, and what runs never lacks pages. Prompts take turns, a chunk each. In a pass that also decodes they
 * get at most prefill_lanes rows, so that a pass costs a bounded multiple of one that only decodes.
 *
 * Prefix reuse (prefix.h): finished blocks of 64 positions are kept for prompts that begin with the same tokens; a prompt
 * waits for a block that an older request is just computing. Kept pages make room for running requests when needed.
 *
 * Early exit (MODEL section 3, "exact"): when a token leaves at step k its successor starts at once, and its own deeper
 * steps ride along in later passes, so every key and value exists as if nothing had been saved.
 *
 * Speculation over steps ("wavefront"): a token that is still on its way may already have successors, guessed from its
 * early readouts, or taken from the sequence's own repeats. They run ahead with keys and values outside the pages; when
 * the token is decided the successor that was guessed right becomes real and the others are dropped.
 *
 * Both are exact under kv_policy full. Another policy (policy.h) changes what a new token leaves in the cache; results are
 * then exact relative to that policy, whatever shares the passes.
 */
#ifndef OURO_ENGINE_ENGINE_H
#define OURO_ENGINE_ENGINE_H

#include <stdbool.h>

#include "engine/cache.h"
#include "engine/exit.h"
#include "engine/policy.h"
#include "engine/sampling.h"
#include "model/workspace.h"

#define OURO_MAX_TOP 64              /* most alternatives that logprobs can ask for */

typedef enum ouro_speculate { OURO_SPECULATE_OFF = 0, OURO_SPECULATE_ON = 1, OURO_SPECULATE_AUTO = 2 } ouro_speculate;

typedef struct ouro_request_params {
    int max_new_tokens;
    int n_steps;                     /* recurrent steps to run */
    int exit_at_step;                /* 0-based: every token leaves after this step, deeper ones never run; -1: off */
    int weighted_exit;               /* 1: logits averaged over steps with the exit distribution */
    ouro_exit_rule exit;             /* by name, e.g. {.name = "q", .threshold = 0.6f}; {0}: never before the last step */
    ouro_kv_policy kv_policy;
    ouro_sampling sampling;
    const int32_t *stop_ids;         /* [n_stop_ids], copied */
    int n_stop_ids;
    const int32_t *follow;           /* [n_follow], copied: the first new tokens, taken instead of chosen */
    int n_follow;
    int n_top;                       /* alternatives to report per token, 0..OURO_MAX_TOP */
    ouro_speculate speculate;
    const ouro_observer *observer;   /* sees and may change the request's lanes and readouts, as row 0; NULL: nobody. Outlives
                                      * the request, which then shares no prefix, and guesses nothing when it meets */
} ouro_request_params;

typedef enum ouro_finish {
    OURO_RUNNING = 0, OURO_FINISH_STOP = 1, OURO_FINISH_LENGTH = 2, OURO_FINISH_CANCELLED = 3, OURO_FINISH_FAILED = 4
} ouro_finish;

typedef struct ouro_stats {
    int64_t passes, lanes;           /* lanes: rows of work in all passes */
    int64_t tokens, prompt_tokens;
    int64_t prefix_tokens;           /* prompt positions that were taken from another request */
    int64_t guesses, kept, dropped;  /* speculative positions started, confirmed, thrown away */
    int64_t lookups, lookups_kept;   /* those of them taken from the sequence's own repeats */
    int64_t first_tried, first_right;    /* step-0 readouts compared with the decided token: p1 */
    int64_t second_tried, second_right;  /* step-1 readouts, where step 0 was wrong: p2 */
    double prefill_seconds, decode_seconds;
    int64_t cache_bytes;             /* of a request that has ended: pages of its own, those it took over not counted */
} ouro_stats;

/* One decided token of one request. */
typedef struct ouro_event {
    int64_t request;
    int32_t token;                   /* -1: no token, only the finish */
    float logprob;                   /* of the token under the unfiltered softmax, nats */
    int exit_step;                   /* the step whose readout decided it */
    ouro_finish finish;              /* not RUNNING: the last event of the request */
    int status;                      /* FINISH_FAILED: why */
    char detail[160];                /* and in words */
    float exit_pdf[OURO_MAX_STEPS];  /* [n_steps]; NaN for steps behind exit_step, which need not have run */
    int n_top;
    int32_t top_ids[OURO_MAX_TOP];
    float top_logprobs[OURO_MAX_TOP];
    ouro_stats stats;                /* of the request, with its last event */
} ouro_event;

typedef struct ouro_engine ouro_engine;

typedef struct ouro_engine_options {
    int max_lanes;                   /* most requests that run at once, and most rows that chunks of prompts fill up to */
    int prefill_lanes;               /* most rows of prompts in a pass that also decodes; 0: 8 */
    int max_queue;                   /* most requests that wait; 0: no limit */
    size_t max_cache_bytes;          /* keys and values; 0: 90 % of the memory that is available now */
    size_t prefix_cache_bytes;       /* of them, kept for prompts with the same beginning; 0: nothing is kept */
    bool record;                     /* keep the schedule of the last step: ouro_engine_record */
} ouro_engine_options;

int ouro_engine_new(ouro_workspace *ws, const ouro_engine_options *options, ouro_engine **out);
void ouro_engine_free(ouro_engine *e);

/* Queues a request; tokens [n] are copied. Refused with the numbers when it exceeds the context, or would not fit into
 * the cache even alone, or finds max_queue requests waiting (OURO_ERR_BUSY). Any thread. */
int ouro_engine_submit(ouro_engine *e, const int32_t *tokens, int n, const ouro_request_params *p, int64_t *id);
/* Ends a request, waiting, reading its prompt or decoding; its finish event follows. Unknown or finished ids are ignored.
 * Any thread. */
int ouro_engine_cancel(ouro_engine *e, int64_t id);

/* One pass. Events stay valid until the next call. OURO_ERR_CANCELLED: poll asked to stop; every running request is
 * failed, the engine stays usable. */
int ouro_engine_step(ouro_engine *e, ouro_poll_fn poll, void *poll_arg, const ouro_event **events, int *n_events);

/* What an engine has done and holds, as of the last step; any thread. */
typedef struct ouro_engine_status {
    ouro_stats stats;                /* passes and lanes of its life; the rest sums over requests that have ended */
    int waiting, running;            /* requests */
    size_t cache_bytes, cache_peak, cache_limit;     /* live pages */
    size_t prefix_bytes, prefix_limit;               /* of them, kept for prompts to come */
} ouro_engine_status;
void ouro_engine_look(ouro_engine *e, ouro_engine_status *out);
/* Requests that wait or run; any thread. */
int ouro_engine_pending(ouro_engine *e);

/* One line of the schedule of the last step: what was taken in, then the rows of its pass. */
typedef enum ouro_line_kind {
    OURO_LINE_ARRIVE, OURO_LINE_CANCEL, OURO_LINE_START,
    OURO_LINE_PROMPT,                /* a row of a prompt's chunk */
    OURO_LINE_LEAD,                  /* the newest decided position */
    OURO_LINE_LATE,                  /* a deeper step of a token that left early */
    OURO_LINE_GUESS                  /* a speculative position */
} ouro_line_kind;
typedef struct ouro_line {
    int64_t request;
    int32_t kind, pos, step, token;
    uint32_t state;                  /* of a row: a checksum of its state behind the pass; else 0 */
} ouro_line;
/* Lines of the last step, valid until the next; none without options.record. */
const ouro_line *ouro_engine_record(const ouro_engine *e, int *n_lines);

#endif
