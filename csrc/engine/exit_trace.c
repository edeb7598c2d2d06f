/* exit_trace.c - see exit_trace.h. Positions go in slabs whose readouts fit one sweep of the head. */
#include "engine/exit_trace.h"

#include <stdlib.h>

#include "engine/signals.h"
#include "ouro_status.h"

typedef struct slab {
    float *logits;                   /* [rows][d_vocab]; NULL: the rule needs no readout */
    float *scalars;                  /* [rows][2] entropy, log_z */
    int32_t *argmax;                 /* [rows] */
    ouro_readout *readouts;          /* [rows], row = position in the slab * n_steps + step */
    float *z_before;                 /* [d_vocab] */
} slab;

static int slab_init(slab *s, int rows, int d_vocab)
{
    *s = (slab){.logits = malloc((size_t)rows * (size_t)d_vocab * sizeof(float)), .scalars = calloc((size_t)rows, 2 * sizeof(float)),
                .argmax = calloc((size_t)rows, sizeof(int32_t)), .readouts = calloc((size_t)rows, sizeof(ouro_readout)),
                .z_before = malloc((size_t)d_vocab * sizeof(float))};
    return s->logits && s->scalars && s->argmax && s->readouts && s->z_before ? OURO_OK
           : ouro_fail(OURO_ERR_MEMORY, "no memory for %d readouts of %d tokens", rows, d_vocab);
}

static void slab_fini(slab *s)
{
    free(s->logits);
    free(s->scalars);
    free(s->argmax);
    free(s->readouts);
    free(s->z_before);
}

static const float *state_of(const ouro_workspace *ws, const ouro_exit_trace *x, int step, int i)
{
    return x->states + ((size_t)step * (size_t)x->n + (size_t)i) * (size_t)ws->model->config.d_model;
}

static int read_slab(ouro_workspace *ws, const ouro_exit_trace *x, slab *s, int first, int count, ouro_poll_fn poll, void *arg)
{
    size_t v = (size_t)ws->model->config.d_vocab;
    int rows = 0;
    for (int i = first; i < first + count; i++)
        for (int t = 0; t < x->n_steps; t++, rows++)
            s->readouts[rows] = (ouro_readout){.state = state_of(ws, x, t, i), .logits = s->logits + (size_t)rows * v,
                                               .entropy = s->scalars + 2 * rows, .log_z = s->scalars + 2 * rows + 1,
                                               .argmax = s->argmax + rows};
    return ouro_read_out(ws, s->readouts, rows, poll, arg);
}

/* One position through its steps; reads: its readouts [n_steps] or NULL. */
static int walk(const ouro_workspace *ws, const ouro_exit_rule *rule, const ouro_exit_trace *x, int i, const ouro_readout *reads,
                float *z_before)
{
    const ouro_config *c = &ws->model->config;
    int needs = ouro_exit_needs(rule), answer = 0;
    ouro_exit_track track;
    ouro_exit_signal signal = {.top_token = -1};
    double log_z_before = 0.0;
    ouro_exit_begin(&track);
    for (int t = 0; answer == 0 && t < x->n_steps; t++) {
        ouro_signal_begin(&signal);
        ouro_exit_gate(&track, x->gate_logit[(size_t)t * (size_t)x->n + (size_t)i], t, x->n_steps, &signal);
        if (needs & OURO_NEED_STATES)
            ouro_signal_states(&signal, state_of(ws, x, t, i), state_of(ws, x, t > 0 ? t - 1 : 0, i),
                               state_of(ws, x, t > 1 ? t - 2 : 0, i), c->d_model);
        if (reads) ouro_signal_readout(&signal, &reads[t], needs & OURO_NEED_LOGITS ? z_before : NULL, &log_z_before, c->d_vocab);
        answer = ouro_exit_ask(rule, &track, &signal);
        x->exit_step[i] = t;
    }
    return answer < 0 ? ouro_fail(OURO_ERR_STATE, "the custom exit rule failed at position %d", i) : OURO_OK;
}

int ouro_exit_trace_run(ouro_workspace *ws, const ouro_exit_rule *rule, const ouro_exit_trace *x, ouro_poll_fn poll,
                        void *poll_arg)
{
    if (!ws || !rule || !x || !x->states || !x->gate_logit || !x->exit_step || x->n < 0)
        return ouro_fail(OURO_ERR_ARGUMENT, "an exit trace needs a workspace, a rule, states, gate logits and room for its steps");
    if (x->n_steps < 1 || x->n_steps > OURO_MAX_STEPS)
        return ouro_fail(OURO_ERR_ARGUMENT, "n_steps is %d, expected 1 to %d", x->n_steps, OURO_MAX_STEPS);
    bool reads = ouro_exit_needs(rule) & OURO_NEED_READOUT;
    int status = ouro_exit_check(rule), count = reads ? OURO_READOUT_ROWS / x->n_steps : x->n;
    slab s = {0};
    if (count < 1) count = 1;
    if (status == OURO_OK && reads) status = slab_init(&s, count * x->n_steps, ws->model->config.d_vocab);
    for (int first = 0; status == OURO_OK && first < x->n; first += count) {
        int here = x->n - first < count ? x->n - first : count;
        if (reads) status = read_slab(ws, x, &s, first, here, poll, poll_arg);
        for (int i = 0; status == OURO_OK && i < here; i++)
            status = walk(ws, rule, x, first + i, reads ? s.readouts + (size_t)i * (size_t)x->n_steps : NULL, s.z_before);
    }
    slab_fini(&s);
    return status;
}
