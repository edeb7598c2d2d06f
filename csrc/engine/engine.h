/* engine.h - requests that share passes: prefill, decoding, early exit and speculation over steps.
 *
 *   submit -> queue -> running -> events -> finished
 *
 * ouro_engine_step runs one pass over the lanes of all running requests, each lane at its own step, then decides what
 * their readouts mean. Which requests share a pass never shows in a result. One engine is driven by one thread at a
 * time; its workspace belongs to it while it steps.
 *
 * Early exit (MODEL section 3, "exact"): when a token leaves at step k its successor starts at once, and its own deeper
 * steps ride along in later passes, so every key and value exists as if nothing had been saved.
 *
 * Speculation over steps ("wavefront"): a token that is still on its way may already have successors, guessed from its
 * early readouts. They run ahead with keys and values outside the pages; when the token is decided the successor that
 * was guessed right becomes real and the others are dropped.
 *
 * Both are exact under kv_policy full. Another policy (policy.h) changes what a new token leaves in the cache; results are
 * then exact relative to that policy, whatever shares the passes.
 */
#ifndef OURO_ENGINE_ENGINE_H
#define OURO_ENGINE_ENGINE_H

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
    ouro_exit_rule exit;
    ouro_kv_policy kv_policy;
    ouro_sampling sampling;
    const int32_t *stop_ids;         /* [n_stop_ids], copied */
    int n_stop_ids;
    int n_top;                       /* alternatives to report per token, 0..OURO_MAX_TOP */
    ouro_speculate speculate;
} ouro_request_params;

typedef enum ouro_finish {
    OURO_RUNNING = 0, OURO_FINISH_STOP = 1, OURO_FINISH_LENGTH = 2, OURO_FINISH_CANCELLED = 3, OURO_FINISH_FAILED = 4
} ouro_finish;

typedef struct ouro_stats {
    int64_t passes, lanes;           /* lanes: rows of work in all passes */
    int64_t tokens, prompt_tokens;
    int64_t guesses, kept, dropped;  /* speculative positions started, confirmed, thrown away */
    int64_t first_tried, first_right;    /* step-0 readouts compared with the decided token: p1 */
    int64_t second_tried, second_right;  /* step-1 readouts, where step 0 was wrong: p2 */
    double prefill_seconds, decode_seconds;
} ouro_stats;

/* One decided token of one request. */
typedef struct ouro_event {
    int64_t request;
    int32_t token;                   /* -1: no token, only the finish */
    float logprob;                   /* of the token under the unfiltered softmax, nats */
    int exit_step;                   /* the step whose readout decided it */
    ouro_finish finish;              /* not RUNNING: the last event of the request */
    int status;                      /* FINISH_FAILED: why */
    float exit_pdf[OURO_MAX_STEPS];  /* [n_steps]; NaN for steps behind exit_step, which need not have run */
    int n_top;
    int32_t top_ids[OURO_MAX_TOP];
    float top_logprobs[OURO_MAX_TOP];
    ouro_stats stats;                /* of the request, with its last event */
} ouro_event;

typedef struct ouro_engine ouro_engine;

/* max_lanes: most rows in one pass (prefill chunks fill up what decoding leaves). max_cache_bytes 0: 90 % of the memory
 * that is available when a request asks. */
int ouro_engine_new(ouro_workspace *ws, int max_lanes, size_t max_cache_bytes, ouro_engine **out);
void ouro_engine_free(ouro_engine *e);

/* Queues a request; tokens [n] are copied. Refused with the numbers when it exceeds the context, or would not fit into
 * the cache even alone. */
int ouro_engine_submit(ouro_engine *e, const int32_t *tokens, int n, const ouro_request_params *p, int64_t *id);
/* Ends a request; its finish event follows. Unknown or finished ids are ignored. */
void ouro_engine_cancel(ouro_engine *e, int64_t id);
/* Requests that are queued or running. */
int ouro_engine_pending(const ouro_engine *e);

/* One pass. Events stay valid until the next call. OURO_ERR_CANCELLED: poll asked to stop; every running request is
 * failed, the engine stays usable. */
int ouro_engine_step(ouro_engine *e, ouro_poll_fn poll, void *poll_arg, const ouro_event **events, int *n_events);

const ouro_stats *ouro_engine_stats(const ouro_engine *e);               /* of the engine's life */
size_t ouro_engine_cache_bytes(const ouro_engine *e);

#endif
