/* request.h - one generation inside an engine: its sequence, the prompt chunk on its way, and its tree of nodes. */
#ifndef OURO_ENGINE_REQUEST_H
#define OURO_ENGINE_REQUEST_H

#include "engine/node.h"

/* A run of prompt positions that move through the steps together. n == 0: none. */
typedef struct ouro_chunk {
    int pos, n, step;
    float *h;                            /* [n][d_model] */
} ouro_chunk;

/* Whether speculation pays, measured: what its passes cost while it is on against what plain decoding would cost, in sweeps of a
 * pass without guesses (cost.h). */
typedef struct ouro_pace {
    bool on;
    int tokens, rest;                    /* tokens since it was last switched; those it rests before the next trial */
    double cost, plain;                  /* of the passes since then; of plain decoding of those tokens */
    double lost;                         /* what speculation has cost more than plain decoding, in all; little of a gain is kept */
    double all;                          /* of plain decoding of the whole request */
} ouro_pace;

typedef struct ouro_request {
    struct ouro_request *next;
    int64_t id;
    ouro_request_params params;
    int32_t *stop_ids, *follow;          /* owned copies */
    ouro_sequence seq;
    int n_prompt, depth;                 /* depth: steps that really run */
    ouro_kv_policy policy;               /* full when depth is 1: then all are the same */
    int prefilled;                       /* prompt positions that have been put into chunks */
    int produced;
    bool running, cancelled;
    int failed_pos;                      /* the position at which a custom exit rule failed; -1: none did */
    bool shares;                         /* takes blocks from others and gives its own */
    bool began, waits;                   /* a chunk of its own has begun; an older request computes what it wants */
    int64_t turn;                        /* prompts: the one with the smallest is next */
    int kept;                            /* blocks given to the prefix cache */
    size_t reserved;                     /* cache bytes set aside for the whole length */
    ouro_chunk chunk;
    ouro_node *nodes, *lead;
    int exit_needs;
    ouro_pace pace;
    int looked_right;                    /* tokens in a row that the sequence's repeats would have given (lookup.h) */
    ouro_stats stats;
} ouro_request;

int ouro_request_new(ouro_page_budget *budget, int64_t id, const int32_t *tokens, int n, const ouro_request_params *p,
                     ouro_request **out);
void ouro_request_free(ouro_request *r);

/* What the request has cost so far, with the pages it holds now. */
ouro_stats ouro_request_stats(const ouro_request *r);

/* The next piece of the prompt, at most `most` positions; and the lead node once all before it are on their way. */
int ouro_request_advance(ouro_request *r, const ouro_model *m, int most);

/* A node for `token` at `pos`; speculative when it follows a guess of `parent`. */
int ouro_node_new(ouro_request *r, const ouro_model *m, int pos, int32_t token, ouro_node *parent, bool speculative,
                  ouro_node **out);
/* The guessed node becomes real: what it computed goes to the pages (under kv_policy full). */
void ouro_node_commit(ouro_request *r, ouro_node *n);
/* Under another policy: the decided node runs no deeper step. */
void ouro_node_stop(ouro_request *r, ouro_node *n);
/* The decided lead becomes history: under another policy, what it leaves goes to the pages, and a finished prompt's rows
 * are folded. */
int ouro_node_leave(ouro_request *r, ouro_node *n);
/* The lead is the prompt's last token and the policy wants the prompt in full before anything follows. */
static inline bool ouro_request_unfolded(const ouro_request *r) { return ouro_policy_folds(r->policy) && r->seq.n_rows > 1; }
ouro_node *ouro_node_child(const ouro_request *r, const ouro_node *parent, int32_t token);
int ouro_node_children(const ouro_request *r, const ouro_node *parent);
/* Drops every speculative node that does not descend from `keep` (NULL: all of them). */
void ouro_request_prune(ouro_request *r, const ouro_node *keep);
/* Frees real nodes other than the lead that have run all their steps. */
void ouro_request_retire(ouro_request *r);
int ouro_request_lanes(const ouro_request *r);
/* How many positions, from the first, have run all their steps. */
int ouro_request_complete(const ouro_request *r);
/* Blocks, from the first, that hold what any request with these tokens would compute: under a cache policy the prompt's. */
int ouro_request_shareable(const ouro_request *r);
/* Of them, guesses. */
int ouro_request_guesses(const ouro_request *r);

/* The tokens before a node's successor: history of [pos + 1] tokens, guesses of its ancestors laid over the end. */
const int32_t *ouro_node_history(ouro_request *r, const ouro_node *n);

#endif
