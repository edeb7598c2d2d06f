/* exit.h - when a token is done: exit rules, all in the table of exit.c. To add one: a line there.
 *
 * After each step the engine hands a rule the numbers of that step; the rule answers leave or stay. A rule never sees
 * logits or caches, only what `needs` asked for, so the same rule serves generation and traces.
 */
#ifndef OURO_ENGINE_EXIT_H
#define OURO_ENGINE_EXIT_H

#include <stdbool.h>
#include <stdint.h>

/* What a rule may look at, of one token after step `step` (0-based) of n_steps. NaN where it has no meaning yet (no
 * step before) or was not asked for. */
typedef struct ouro_exit_signal {
    int step, n_steps;
    float exit_lambda, exit_pdf, exit_cdf;
    float state_delta, state_relative, acceleration;
    float kl, entropy, confidence;
    int32_t top_token, previous_top_token;       /* -1: not known */
} ouro_exit_signal;

typedef int (*ouro_exit_custom)(void *arg, const ouro_exit_signal *s);   /* 1 leave, 0 stay, negative: failure */

typedef struct ouro_exit_rule {
    const char *name;            /* of a rule in exit.c; NULL: "never", which is never before the last step */
    float threshold;
    int min_steps;               /* no exit before this many steps have run (at least 1) */
    int delay;                   /* steps to run on after the rule first says leave */
    ouro_exit_custom custom;
    void *custom_arg;
} ouro_exit_rule;

/* exit.c's own copy of a rule's name, which lives for ever; NULL: there is no such rule. What each compares is there, and in words in
 * ouro/exits.py. */
const char *ouro_exit_known(const char *name);
bool ouro_exit_is_on(const ouro_exit_rule *r);       /* it may let a token leave before the last step */

enum { OURO_NEED_STATES = 1, OURO_NEED_READOUT = 2, OURO_NEED_LOGITS = 4 };   /* LOGITS: of two successive steps */
int ouro_exit_needs(const ouro_exit_rule *r);
int ouro_exit_check(const ouro_exit_rule *r);        /* OURO_OK or OURO_ERR_ARGUMENT with a detail */

/* One token's way through the gate, step by step: lambda, pdf, cdf of MODEL section 3. */
typedef struct ouro_exit_track {
    float survival;              /* prod (1 - lambda_j) so far */
    float cdf;
    int fired;                   /* step at which the rule first said leave, -1 before */
} ouro_exit_track;
void ouro_exit_begin(ouro_exit_track *t);
/* Fills the gate's part of the signal from its logit. */
void ouro_exit_gate(ouro_exit_track *t, float gate_logit, int step, int n_steps, ouro_exit_signal *s);
/* 1: the token leaves after this step; 0: it stays; negative: the custom rule failed. The last step always leaves. */
int ouro_exit_ask(const ouro_exit_rule *r, ouro_exit_track *t, const ouro_exit_signal *s);

#endif
