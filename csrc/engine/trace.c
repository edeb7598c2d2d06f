/* trace.c - a trace is prefill whose states are kept: chunks of positions, each through all steps; see trace.h.
 *
 * The residual row of a lane is its row of the states array, so the core writes the result in place.
 */
#include "engine/trace.h"

#include <stdlib.h>
#include <string.h>

#include "engine/cache.h"
#include "model/seen.h"
#include "ouro_status.h"

typedef struct place { int row, pos; } place;        /* position `pos` of sequence `row` */

typedef struct trace_run {
    ouro_workspace *ws;
    const ouro_trace *t;
    ouro_page_budget budget;
    ouro_sequence *sequences;            /* [batch] of this run, or the one that is kept */
    place *places;                       /* [n_places] all positions of all sequences, in order */
    int n_places;
    ouro_lane *lanes;                    /* [max_lanes] */
    ouro_readout *readouts;              /* [max_lanes] */
    const ouro_turn *turns;              /* [n_turns] those of the caller, or plain ones */
    ouro_turn *plain;                    /* owned */
    int n_turns;
    float *shown;                        /* [shown_rows][d_vocab] logits on their way through the observer */
    uint8_t *changed;                    /* [max_lanes] */
    ouro_poll_fn poll;
    void *poll_arg;
} trace_run;

/* Bytes of cache the trace needs while it runs. */
static size_t cache_bytes(const ouro_workspace *ws, const ouro_trace *t)
{
    size_t bytes = 0;
    int turns = t->turns ? t->n_turns : t->n_steps;
    for (int b = 0; b < t->batch; b++) bytes += ouro_cache_bytes(&ws->kv, t->lengths[b], turns);
    return bytes;
}

/* the first position that is run */
static int first_of(const ouro_trace *t) { return t->kept ? t->kept->done : 0; }

static size_t row_of(const trace_run *x, int step, place p)
{
    const ouro_trace *t = x->t;
    return ((size_t)step * (size_t)t->batch + (size_t)p.row) * (size_t)t->pos + (size_t)(p.pos - first_of(t));
}

static int check_turns(const ouro_trace *t)
{
    if (t->turns && (t->n_turns < 1 || t->n_turns > OURO_MAX_STEPS))
        return ouro_fail(OURO_ERR_ARGUMENT, "a program has %d passes, expected 1 to %d", t->n_turns, OURO_MAX_STEPS);
    for (int e = 0; t->turns && e < t->n_turns; e++)
        if (t->turns[e].step < 0 || t->turns[e].step >= t->n_steps)
            return ouro_fail(OURO_ERR_ARGUMENT, "a program names step %d, expected 0 to %d", t->turns[e].step, t->n_steps - 1);
    return OURO_OK;
}

static int check_kept(const ouro_trace *t)
{
    int turns = t->turns ? t->n_turns : t->n_steps;
    if (!t->kept) return OURO_OK;
    if (t->batch != 1 || t->lengths[0] > t->kept->most || turns != t->kept->sequence.n_rows)
        return ouro_fail(OURO_ERR_ARGUMENT, "%d sequences, %d positions and %d passes, where pages are kept for one sequence, %d and %d",
                         t->batch, (int)t->lengths[0], turns, t->kept->most, t->kept->sequence.n_rows);
    return OURO_OK;
}

static int check(const ouro_workspace *ws, const ouro_trace *t)
{
    const ouro_config *c = &ws->model->config;
    if (t->batch < 1 || t->n_steps < 1 || t->n_steps > OURO_MAX_STEPS || t->max_lanes < 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "batch is %d, n_steps %d, expected at least 1 and 1 to %d", t->batch,
                         t->n_steps, OURO_MAX_STEPS);
    if (!t->tokens || !t->lengths || !t->states || !t->gate_logit)
        return ouro_fail(OURO_ERR_ARGUMENT, "tokens, lengths, states and gate_logit must not be NULL");
    int status = check_turns(t), first = first_of(t);
    if (status == OURO_OK) status = check_kept(t);
    if (status != OURO_OK) return status;
    for (int b = 0; b < t->batch; b++) {
        if (t->lengths[b] <= first || t->lengths[b] - first > t->pos)
            return ouro_fail(OURO_ERR_SHAPE, "sequence %d has %d tokens, expected %d to %d", b, (int)t->lengths[b], first + 1, first + t->pos);
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

static int plan_turns(trace_run *x)
{
    const ouro_trace *t = x->t;
    x->n_turns = t->turns ? t->n_turns : t->n_steps;
    x->turns = t->turns;
    if (t->turns) return OURO_OK;
    x->turns = x->plain = malloc((size_t)x->n_turns * sizeof *x->plain);
    if (!x->plain) return ouro_fail(OURO_ERR_MEMORY, "no memory for a trace");
    for (int e = 0; e < x->n_turns; e++)
        x->plain[e] = (ouro_turn){e, {x->ws->all_layers, x->ws->model->config.n_layers, true, true, true}};
    return OURO_OK;
}

/* Pages for every sequence: its own, which go with the run, or the kept ones. */
static int open_sequences(trace_run *x)
{
    const ouro_trace *t = x->t;
    if (t->kept) {
        x->sequences = &t->kept->sequence;
        return ouro_sequence_reserve(x->sequences, t->lengths[0]);
    }
    size_t need = cache_bytes(x->ws, t), available = ouro_workspace_available(x->ws, need);
    if (need > available)
        return ouro_fail(OURO_ERR_MEMORY, "the key/value cache of this trace needs %zu bytes, %zu are available", need, available);
    x->budget = (ouro_page_budget){.layout = &x->ws->kv, .stock = &x->ws->pages, .limit = need};
    x->sequences = calloc((size_t)t->batch, sizeof *x->sequences);
    int status = x->sequences ? OURO_OK : ouro_fail(OURO_ERR_MEMORY, "no memory for a trace");
    for (int b = 0; status == OURO_OK && b < t->batch; b++) {
        status = ouro_sequence_init(&x->sequences[b], &x->budget, x->n_turns, t->tokens[b], t->lengths[b]);
        if (status == OURO_OK) status = ouro_sequence_reserve(&x->sequences[b], t->lengths[b]);
    }
    return status;
}

static int open_run(trace_run *x)
{
    const ouro_trace *t = x->t;
    int status = open_sequences(x);
    if (status != OURO_OK) return status;
    for (int b = 0; b < t->batch; b++) x->n_places += t->lengths[b] - first_of(t);
    x->places = malloc((size_t)x->n_places * sizeof *x->places);
    x->lanes = malloc((size_t)t->max_lanes * sizeof *x->lanes);
    x->readouts = calloc((size_t)t->max_lanes, sizeof *x->readouts);
    x->changed = calloc((size_t)t->max_lanes, 1);
    if (!x->places || !x->lanes || !x->readouts || !x->changed) return ouro_fail(OURO_ERR_MEMORY, "no memory for a trace");
    for (int b = 0, at = 0; b < t->batch; b++)
        for (int i = first_of(t); i < t->lengths[b]; i++) x->places[at++] = (place){b, i};
    return OURO_OK;
}

static void close_run(trace_run *x)
{
    for (int b = 0; x->sequences && !x->t->kept && b < x->t->batch; b++)
        if (x->sequences[b].budget) ouro_sequence_fini(&x->sequences[b]);
    if (!x->t->kept) free(x->sequences);
    free(x->places);
    free(x->lanes);
    free(x->readouts);
    free(x->plain);
    free(x->shown);
    free(x->changed);
}

/* The input of a turn is what the turn before left, or the embedding. */
static void set_lane(trace_run *x, int i, place p, int turn)
{
    const ouro_trace *t = x->t;
    size_t d = (size_t)x->ws->model->config.d_model;
    int step = x->turns[turn].step;
    float *h = t->states + row_of(x, step, p) * d;
    const float *before = turn ? t->states + row_of(x, x->turns[turn - 1].step, p) * d : NULL;
    if (!before) ouro_embed(x->ws->model, t->tokens[p.row][p.pos], h);
    else if (before != h) memcpy(h, before, d * sizeof *h);
    x->lanes[i] = (ouro_lane){.pos = p.pos, .step = step, .h = h, .pages = ouro_sequence_pages(&x->sequences[p.row], turn),
                              .observer = t->observer, .row = p.row};
}

/* where the logits of a place are kept; NULL: nowhere */
static float *logits_row(const trace_run *x, place p, int turn)
{
    const ouro_trace *t = x->t;
    if (!t->logits || (!t->all_logits && turn != x->n_turns - 1)) return NULL;
    if (t->next_only) return p.pos == t->lengths[p.row] - 1 ? t->logits + (size_t)p.row * (size_t)x->ws->model->config.d_vocab : NULL;
    return t->logits + row_of(x, t->all_logits ? x->turns[turn].step : 0, p) * (size_t)x->ws->model->config.d_vocab;
}

/* Readouts that the observer sees before they are kept, a few at a time unless all must meet. */
static int shown_readouts(trace_run *x, const place *places, int n, int turn)
{
    size_t v = (size_t)x->ws->model->config.d_vocab;
    bool meet = x->t->observer->meet, skips = x->t->next_only && !meet;
    int most = skips ? 1 : meet || n < OURO_READOUT_ROWS ? n : OURO_READOUT_ROWS, status = OURO_OK;
    free(x->shown);
    x->shown = malloc((size_t)most * v * sizeof *x->shown);
    if (!x->shown) return ouro_fail(OURO_ERR_MEMORY, "no memory for the logits of %d positions", most);
    for (int at = 0; status == OURO_OK && at < n; at += most) {
        if (skips && !logits_row(x, places[at], turn)) continue;
        int rows = n - at < most ? n - at : most;
        for (int i = 0; i < rows; i++)
            x->readouts[i] = (ouro_readout){.state = x->lanes[at + i].h, .logits = x->shown + (size_t)i * v};
        status = ouro_read_out(x->ws, x->readouts, rows, x->poll, x->poll_arg);
        if (status == OURO_OK)
            status = ouro_show(x->lanes + at, rows, OURO_P_LOGITS, (ouro_rows){.data = x->shown, .stride = v, .heads = 1, .cols = (int)v},
                               x->changed);
        for (int i = 0; status == OURO_OK && i < rows; i++) {
            float *keep = logits_row(x, places[at + i], turn);
            if (keep) memcpy(keep, x->shown + (size_t)i * v, v * sizeof *keep);
        }
    }
    return status;
}

static int run_turn(trace_run *x, const place *places, int n, int turn)
{
    const ouro_trace *t = x->t;
    const ouro_observer *o = t->observer;
    int step = x->turns[turn].step;
    for (int i = 0; i < n; i++) set_lane(x, i, places[i], turn);
    ouro_sweep sweep = x->turns[turn].sweep;
    sweep.embeds = sweep.embeds && turn == 0;
    int status = ouro_pass_sweep(x->ws, &sweep, x->lanes, n, x->poll, x->poll_arg);
    if (status != OURO_OK || !sweep.closes) return status;
    for (int i = 0; i < n; i++) t->gate_logit[row_of(x, step, places[i])] = x->lanes[i].gate;
    if (o && (o->wants(o, step, -1) & OURO_BIT(OURO_P_LOGITS))) return shown_readouts(x, places, n, turn);
    int rows = 0;
    for (int i = 0; i < n; i++) {
        float *keep = logits_row(x, places[i], turn);
        if (keep) x->readouts[rows++] = (ouro_readout){.state = x->lanes[i].h, .logits = keep};
    }
    return rows ? ouro_read_out(x->ws, x->readouts, rows, x->poll, x->poll_arg) : OURO_OK;
}

int ouro_trace_run(ouro_workspace *ws, const ouro_trace *t, ouro_poll_fn poll, void *poll_arg)
{
    if (!ws || !t) return ouro_fail(OURO_ERR_ARGUMENT, "workspace and trace must not be NULL");
    int status = check(ws, t);
    if (status == OURO_OK) status = ouro_map_check(&ws->model->map);
    if (status != OURO_OK) return status;
    trace_run x = {.ws = ws, .t = t, .poll = poll, .poll_arg = poll_arg};
    status = plan_turns(&x);
    if (status == OURO_OK) status = open_run(&x);
    for (int at = 0; status == OURO_OK && at < x.n_places; at += t->max_lanes) {
        int n = x.n_places - at < t->max_lanes ? x.n_places - at : t->max_lanes;
        for (int turn = 0; status == OURO_OK && turn < x.n_turns; turn++) status = run_turn(&x, x.places + at, n, turn);
    }
    close_run(&x);
    if (status == OURO_OK && t->kept) t->kept->done = t->lengths[0];
    return status;
}
