/* trace.h - one forward over a ragged batch, everything by step; or over what is new of one sequence. */
#ifndef OURO_ENGINE_TRACE_H
#define OURO_ENGINE_TRACE_H

#include "engine/kept.h"

/* One pass of a trace: which step it counts as and what it runs. */
typedef struct ouro_turn { int step; ouro_sweep sweep; } ouro_turn;

/* A batch of sequences and where its results go. Positions beyond a sequence's length are not written. */
typedef struct ouro_trace {
    const int32_t *const *tokens;        /* [batch] pointers to [length] ids */
    const int32_t *lengths;              /* [batch] */
    int batch, pos, n_steps;             /* pos: the length of the arrays' pos axis, which begins behind what is kept */
    int max_lanes;                       /* rows of one pass */
    float *states;                       /* [n_steps][batch][pos][d_model], required */
    float *gate_logit;                   /* [n_steps][batch][pos], required */
    float *logits;                       /* [n_steps or 1][batch][pos][d_vocab] or NULL */
    int all_logits;                      /* 1: logits of every step; 0: of the last */
    int next_only;                       /* 1: of the last step and each sequence's last position alone: [batch][d_vocab] */
    const ouro_turn *turns;              /* [n_turns], at most OURO_MAX_STEPS; NULL: every step once, all layers */
    int n_turns;
    const ouro_observer *observer;       /* sees every lane, with row = its place in the batch; may be NULL */
    ouro_kept *kept;                     /* of a batch of 1, or NULL: its positions are not run again, and the new ones come to them */
} ouro_trace;

int ouro_trace_run(ouro_workspace *ws, const ouro_trace *t, ouro_poll_fn poll, void *poll_arg);

#endif
