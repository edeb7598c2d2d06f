/* trace.c - a trace is prefill whose states are kept: chunks of positions, each through all steps; see trace.h.
 *
 * The residual row of a lane is its row of the states array, so the core writes the result in place.
 */
#include "engine/trace.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "engine/cache.h"
#include "ouro_status.h"

typedef struct place { int row, pos; } place;        /* position `pos` of sequence `row` */

typedef struct trace_run {
    ouro_workspace *ws;
    const ouro_trace *t;
    ouro_page_budget budget;
    ouro_sequence *sequences;            /* [batch] */
    place *places;                       /* [n_places] all positions of all sequences, in order */
    int n_places;
    ouro_lane *lanes;                    /* [max_lanes] */
    ouro_readout *readouts;              /* [max_lanes] */
    ouro_poll_fn poll;
    void *poll_arg;
} trace_run;

size_t ouro_trace_cache_bytes(const ouro_workspace *ws, const ouro_trace *t)
{
    size_t bytes = 0;
    for (int b = 0; b < t->batch; b++) bytes += ouro_cache_bytes(&ws->kv, t->lengths[b], t->n_steps);
    return bytes;
}

static size_t row_of(const trace_run *x, int step, place p)
{
    const ouro_trace *t = x->t;
    return ((size_t)step * (size_t)t->batch + (size_t)p.row) * (size_t)t->pos + (size_t)p.pos;
}

static int check(const ouro_workspace *ws, const ouro_trace *t)
{
    const ouro_config *c = &ws->model->config;
    if (t->batch < 1 || t->n_steps < 1 || t->n_steps > OURO_MAX_STEPS || t->max_lanes < 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "batch is %d, n_steps %d, expected at least 1 and 1 to %d", t->batch,
                         t->n_steps, OURO_MAX_STEPS);
    if (!t->tokens || !t->lengths || !t->states || !t->gate_logit)
        return ouro_fail(OURO_ERR_ARGUMENT, "tokens, lengths, states and gate_logit must not be NULL");
    for (int b = 0; b < t->batch; b++) {
        if (t->lengths[b] < 1 || t->lengths[b] > t->pos)
            return ouro_fail(OURO_ERR_SHAPE, "sequence %d has %d tokens, expected 1 to %d", b, (int)t->lengths[b], t->pos);
        if (t->lengths[b] > c->n_ctx)
            return ouro_fail(OURO_ERR_CONTEXT, "sequence %d has %d tokens, the context is %d", b, (int)t->lengths[b],
                             (int)c->n_ctx);
        for (int i = 0; i < t->lengths[b]; i++)
            if (t->tokens[b][i] < 0 || t->tokens[b][i] >= c->d_vocab)
                return ouro_fail(OURO_ERR_ARGUMENT, "token %d at position %d of sequence %d is outside of the vocabulary of %d",
                                 (int)t->tokens[b][i], i, b, (int)c->d_vocab);
    }
    return OURO_OK;
}

static int open_run(trace_run *x)
{
    const ouro_trace *t = x->t;
    size_t need = ouro_trace_cache_bytes(x->ws, t), available = ouro_available_memory();
    if (need > available)
        return ouro_fail(OURO_ERR_MEMORY, "the key/value cache of this trace needs %zu bytes, %zu are available", need, available);
    x->budget = (ouro_page_budget){.layout = &x->ws->kv, .limit = need};
    size_t batch = t->batch > 0 ? (size_t)t->batch : 1;
    for (int b = 0; b < t->batch; b++) x->n_places += t->lengths[b];
    x->sequences = calloc(batch, sizeof *x->sequences);
    x->places = malloc((size_t)x->n_places * sizeof *x->places);
    x->lanes = malloc((size_t)t->max_lanes * sizeof *x->lanes);
    x->readouts = calloc((size_t)t->max_lanes, sizeof *x->readouts);
    if (!x->sequences || !x->places || !x->lanes || !x->readouts) return ouro_fail(OURO_ERR_MEMORY, "no memory for a trace");
    for (int b = 0, at = 0; b < t->batch; b++) {
        int status = ouro_sequence_init(&x->sequences[b], &x->budget, t->n_steps, t->tokens[b], t->lengths[b]);
        if (status == OURO_OK) status = ouro_sequence_reserve(&x->sequences[b], t->lengths[b]);
        if (status != OURO_OK) return status;
        for (int i = 0; i < t->lengths[b]; i++) x->places[at++] = (place){b, i};
    }
    return OURO_OK;
}

static void close_run(trace_run *x)
{
    for (int b = 0; x->sequences && b < x->t->batch; b++)
        if (x->sequences[b].budget) ouro_sequence_fini(&x->sequences[b]);
    free(x->sequences);
    free(x->places);
    free(x->lanes);
    free(x->readouts);
}

/* The input of a step is the state of the one before, or the embedding. */
static void set_lane(trace_run *x, int i, place p, int step)
{
    const ouro_trace *t = x->t;
    size_t d = (size_t)x->ws->model->config.d_model;
    float *h = t->states + row_of(x, step, p) * d;
    if (step == 0) ouro_embed(x->ws->model, t->tokens[p.row][p.pos], h);
    else memcpy(h, t->states + row_of(x, step - 1, p) * d, d * sizeof *h);
    x->lanes[i] = (ouro_lane){.pos = p.pos, .step = step, .h = h, .pages = ouro_sequence_pages(&x->sequences[p.row], step)};
}

static int run_step(trace_run *x, const place *places, int n, int step)
{
    const ouro_trace *t = x->t;
    size_t v = (size_t)x->ws->model->config.d_vocab;
    for (int i = 0; i < n; i++) set_lane(x, i, places[i], step);
    int status = ouro_pass(x->ws, x->lanes, n, x->poll, x->poll_arg);
    if (status != OURO_OK) return status;
    for (int i = 0; i < n; i++) t->gate_logit[row_of(x, step, places[i])] = x->lanes[i].gate;
    if (!t->logits || (!t->all_logits && step != t->n_steps - 1)) return OURO_OK;
    for (int i = 0; i < n; i++)
        x->readouts[i] = (ouro_readout){.state = x->lanes[i].h,
                                        .logits = t->logits + row_of(x, t->all_logits ? step : 0, places[i]) * v};
    return ouro_read_out(x->ws, x->readouts, n, x->poll, x->poll_arg);
}

int ouro_trace_run(ouro_workspace *ws, const ouro_trace *t, ouro_poll_fn poll, void *poll_arg)
{
    if (!ws || !t) return ouro_fail(OURO_ERR_ARGUMENT, "workspace and trace must not be NULL");
    int status = check(ws, t);
    if (status == OURO_OK) status = ouro_map_check(&ws->model->map);
    if (status != OURO_OK) return status;
    trace_run x = {.ws = ws, .t = t, .poll = poll, .poll_arg = poll_arg};
    status = open_run(&x);
    for (int at = 0; status == OURO_OK && at < x.n_places; at += t->max_lanes) {
        int n = x.n_places - at < t->max_lanes ? x.n_places - at : t->max_lanes;
        for (int step = 0; status == OURO_OK && step < t->n_steps; step++) status = run_step(&x, x.places + at, n, step);
    }
    close_run(&x);
    return status;
}
