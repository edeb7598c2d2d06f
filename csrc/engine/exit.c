/* exit.c - the exit rules; see exit.h. */
#include "engine/exit.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "kernels/math.h"
#include "ouro_status.h"

/* ---- the rules: a line of the table for each, and what it says of one step (1 leave, 0 stay). A comparison with NaN, a number
 * that has no meaning yet, is false: stay. --------------------------------------------------------------------------- */

#define RULE(name) static int name(const ouro_exit_rule *r, const ouro_exit_signal *s)

RULE(q) { return r->threshold < 1.0f && s->exit_cdf >= r->threshold; }   /* 1: all steps, also when the cdf is rounded to 1 */
RULE(state_delta) { return s->state_delta < r->threshold; }
RULE(state_relative) { return s->state_relative < r->threshold; }
RULE(acceleration) { return s->acceleration < r->threshold; }
RULE(kl) { return s->kl < r->threshold; }
RULE(top1) { (void)r; return s->step > 0 && s->top_token == s->previous_top_token; }
RULE(entropy) { return s->entropy < r->threshold; }
RULE(confidence) { return s->confidence > r->threshold; }
RULE(custom) { return r->custom(r->custom_arg, s); }

typedef struct rule {
    const char *name;
    int needs;
    int (*leaves)(const ouro_exit_rule *r, const ouro_exit_signal *s);
} rule;

static const rule RULES[] = {
    {"never", 0, NULL},
    {"q", 0, q},
    {"state_delta", OURO_NEED_STATES, state_delta},
    {"state_relative", OURO_NEED_STATES, state_relative},
    {"acceleration", OURO_NEED_STATES, acceleration},
    {"kl", OURO_NEED_READOUT | OURO_NEED_LOGITS, kl},
    {"top1", OURO_NEED_READOUT, top1},
    {"entropy", OURO_NEED_READOUT, entropy},
    {"confidence", OURO_NEED_READOUT, confidence},
    {"custom", OURO_NEED_STATES | OURO_NEED_READOUT | OURO_NEED_LOGITS, custom},
};
enum { N_RULES = sizeof RULES / sizeof *RULES };

/* NULL: there is none. Most names come from the table itself. */
static const rule *find(const char *name)
{
    if (!name) name = "never";
    for (int i = 0; i < N_RULES; i++)
        if (RULES[i].name == name || !strcmp(RULES[i].name, name)) return &RULES[i];
    return NULL;
}

const char *ouro_exit_known(const char *name)
{
    const rule *known = find(name);
    return known ? known->name : NULL;
}

bool ouro_exit_is_on(const ouro_exit_rule *r)
{
    const rule *known = find(r->name);
    return known && known->leaves;
}

int ouro_exit_needs(const ouro_exit_rule *r)
{
    const rule *known = find(r->name);
    return known ? known->needs : 0;
}

static int unknown(const char *name)
{
    char known[256] = "";
    for (int i = 0, at = 0; i < N_RULES && at < (int)sizeof known; i++)
        at += snprintf(known + at, sizeof known - (size_t)at, "%s%s", i ? ", " : "", RULES[i].name);
    return ouro_fail(OURO_ERR_ARGUMENT, "there is no exit rule '%.80s', expected one of %s", name, known);
}

int ouro_exit_check(const ouro_exit_rule *r)
{
    const rule *known = find(r->name);
    if (!known) return unknown(r->name);
    if (known->leaves == q && !(r->threshold >= 0.0f && r->threshold <= 1.0f))
        return ouro_fail(OURO_ERR_ARGUMENT, "exit_threshold is %g, expected 0 to 1", (double)r->threshold);
    if (isnan(r->threshold)) return ouro_fail(OURO_ERR_ARGUMENT, "the exit rule's threshold is not a number");
    if (r->min_steps < 0 || r->delay < 0)
        return ouro_fail(OURO_ERR_ARGUMENT, "min_steps is %d and delay %d, expected 0 or more", r->min_steps, r->delay);
    if (known->leaves == custom && !r->custom) return ouro_fail(OURO_ERR_ARGUMENT, "a custom exit rule needs a function");
    return OURO_OK;
}

/* ---- one token's way through the steps ------------------------------------------------------------------------------ */

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

int ouro_exit_ask(const ouro_exit_rule *r, ouro_exit_track *t, const ouro_exit_signal *s)
{
    const rule *known = find(r->name);
    if (known && known->leaves && t->fired < 0 && s->step + 1 >= r->min_steps) {
        int leave = known->leaves(r, s);
        if (leave < 0) return leave;
        if (leave) t->fired = s->step;
    }
    return s->step == s->n_steps - 1 || (t->fired >= 0 && s->step >= t->fired + r->delay);
}
