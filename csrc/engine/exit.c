/* exit.c - the exit rules; see exit.h. */
#include "engine/exit.h"

#include <math.h>
#include <stddef.h>

#include "kernels/math.h"
#include "ouro_status.h"

int ouro_exit_needs(const ouro_exit_rule *r)
{
    switch (r->kind) {
    case OURO_EXIT_STATE_DELTA: case OURO_EXIT_STATE_RELATIVE: case OURO_EXIT_ACCELERATION: return OURO_NEED_STATES;
    case OURO_EXIT_TOP1: case OURO_EXIT_ENTROPY: case OURO_EXIT_CONFIDENCE: return OURO_NEED_READOUT;
    case OURO_EXIT_KL: return OURO_NEED_READOUT | OURO_NEED_LOGITS;
    case OURO_EXIT_CUSTOM: return OURO_NEED_STATES | OURO_NEED_READOUT | OURO_NEED_LOGITS;
    default: return 0;
    }
}

int ouro_exit_check(const ouro_exit_rule *r)
{
    if ((unsigned)r->kind >= OURO_N_EXIT_KINDS) return ouro_fail(OURO_ERR_ARGUMENT, "unknown exit rule %d", (int)r->kind);
    if (r->kind == OURO_EXIT_Q && !(r->threshold >= 0.0f && r->threshold <= 1.0f))
        return ouro_fail(OURO_ERR_ARGUMENT, "exit_threshold is %g, expected 0 to 1", (double)r->threshold);
    if (isnan(r->threshold)) return ouro_fail(OURO_ERR_ARGUMENT, "the exit rule's threshold is not a number");
    if (r->min_steps < 0 || r->delay < 0)
        return ouro_fail(OURO_ERR_ARGUMENT, "min_steps is %d and delay %d, expected 0 or more", r->min_steps, r->delay);
    if (r->kind == OURO_EXIT_CUSTOM && !r->custom) return ouro_fail(OURO_ERR_ARGUMENT, "a custom exit rule needs a function");
    return OURO_OK;
}

void ouro_exit_begin(ouro_exit_track *t) { *t = (ouro_exit_track){1.0f, 0.0f, -1}; }

void ouro_exit_gate(ouro_exit_track *t, float gate_logit, int step, int n_steps, ouro_exit_signal *s)
{
    int last = step == n_steps - 1;
    s->step = step;
    s->n_steps = n_steps;
    s->exit_lambda = ouro_sigmoidf(gate_logit);
    s->exit_pdf = last ? t->survival : s->exit_lambda * t->survival;
    t->survival *= 1.0f - s->exit_lambda;
    t->cdf += s->exit_pdf;
    s->exit_cdf = last ? 1.0f : t->cdf;
}

static int says_leave(const ouro_exit_rule *r, const ouro_exit_signal *s)
{
    switch (r->kind) {
    case OURO_EXIT_Q: return r->threshold < 1.0f && s->exit_cdf >= r->threshold;
    case OURO_EXIT_STATE_DELTA: return s->state_delta < r->threshold;          /* false for NaN: the first step */
    case OURO_EXIT_STATE_RELATIVE: return s->state_relative < r->threshold;
    case OURO_EXIT_ACCELERATION: return s->acceleration < r->threshold;
    case OURO_EXIT_KL: return s->kl < r->threshold;
    case OURO_EXIT_TOP1: return s->step > 0 && s->top_token == s->previous_top_token;
    case OURO_EXIT_ENTROPY: return s->entropy < r->threshold;
    case OURO_EXIT_CONFIDENCE: return s->confidence > r->threshold;
    case OURO_EXIT_CUSTOM: return r->custom(r->custom_arg, s);
    default: return 0;
    }
}

int ouro_exit_ask(const ouro_exit_rule *r, ouro_exit_track *t, const ouro_exit_signal *s)
{
    if (t->fired < 0 && s->step + 1 >= r->min_steps) {
        int leave = says_leave(r, s);
        if (leave < 0) return leave;
        if (leave) t->fired = s->step;
    }
    return s->step == s->n_steps - 1 || (t->fired >= 0 && s->step >= t->fired + r->delay);
}
