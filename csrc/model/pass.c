/* pass.c - one sweep of the shared layers over lanes at mixed steps, and the boundary behind it.
 *
 *   for each layer: block;   h = RMS(h; norm)  (the state of the step);   gate = w_gate . h + b_gate
 *
 * and, on its own because only some lanes want it, the readout z = W_head h.
 */
#include <math.h>
#include <string.h>

#include "base/cpu.h"
#include "kernels/math.h"
#include "model/attention.h"
#include "model/block.h"
#include "model/block_seen.h"
#include "model/seen.h"
#include "ouro_status.h"

/* ---- the pass ------------------------------------------------------------------------------------------------ */

typedef struct pass_run {
    ouro_workspace *ws;
    const ouro_sweep *sweep;
    ouro_lane *lanes;
    int n, n_spans;
    int n_states;                    /* lanes whose state is wanted: the first of them */
    ouro_poll_fn poll;
    void *poll_arg;
} pass_run;

/* Thread 0 asks whether to go on. The others see the answer behind the next barrier. */
static void ask(ouro_workspace *ws, int thread, ouro_poll_fn poll, void *arg)
{
    if (thread == 0 && poll && poll(arg)) atomic_store(&ws->cancelled, 1);
}

static void boundary(crew *c, const ouro_sweep *sweep, ouro_lane *lanes, int n, int last)
{
    int begin, end;
    const ouro_model *m = c->ws->model;
    const ouro_config *g = &m->config;
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) {
            if (last >= 0) ouro_block_close(c->ws, &lanes[i], i, last);
            if (!sweep->closes) continue;
            m->kernels->rmsnorm(lanes[i].h, m->norm, g->eps, g->d_model, lanes[i].h);
            lanes[i].gate = m->kernels->dot(lanes[i].h, m->exit_w, g->d_model) + m->exit_b;
        }
}

static void pass_thread(void *arg, int thread, int n_threads)
{
    pass_run *run = arg;
    ouro_workspace *ws = run->ws;
    const ouro_sweep *sweep = run->sweep;
    int n = 0, last = -1;
    crew c = {ws, thread, n_threads, 0};
    ouro_block_angles(&c, run->lanes, run->n);
    if (ws->want) ouro_seen_open(&c, sweep, run->lanes, run->n);
    for (int k = 0; k < sweep->n_layers; k++) {
        ask(ws, thread, run->poll, run->poll_arg);
        ouro_pool_barrier(ws->pool, thread);
        if (atomic_load(&ws->cancelled)) return;
        while (n < run->n && run->lanes[n].first_layer <= k) n++;
        if (n == 0) continue;
        int states = k == sweep->n_layers - 1 && run->n_states < n ? run->n_states : n, spans = 0;
        while (spans < run->n_spans && ws->spans[spans].end <= states) spans++;
        ouro_block(&c, run->lanes, n, states, spans, (ouro_place){sweep->layers[k], k, last});
        last = sweep->layers[k];
    }
    uint64_t want = ouro_wanted(ws, ws->model->config.n_layers) | (last >= 0 ? ouro_wanted(ws, last) & OURO_SEES_CLOSE : 0);
    if (want) ouro_seen_boundary(&c, sweep, run->lanes, run->n_states, last);
    else boundary(&c, sweep, run->lanes, run->n_states, last);
}

static int check_lanes(const ouro_sweep *sweep, const ouro_config *g, const ouro_lane *lanes, int n)
{
    if (sweep->n_layers < 0 || sweep->n_layers > g->n_layers)
        return ouro_fail(OURO_ERR_ARGUMENT, "a sweep has %d layers, expected 0 to %d", sweep->n_layers, (int)g->n_layers);
    for (int k = 0; k < sweep->n_layers; k++)
        if (sweep->layers[k] < 0 || sweep->layers[k] >= g->n_layers)
            return ouro_fail(OURO_ERR_ARGUMENT, "layer %d of a sweep is outside of 0 to %d", sweep->layers[k], (int)g->n_layers - 1);
    for (int i = 0; i < n; i++)
        if (lanes[i].first_layer < (i ? lanes[i - 1].first_layer : 0) || (lanes[i].first_layer && lanes[i].first_layer >= sweep->n_layers))
            return ouro_fail(OURO_ERR_ARGUMENT, "lane %d joins at layer %d: expected ascending places below %d", i,
                             lanes[i].first_layer, sweep->n_layers);
    for (int i = 0; i < n; i++)
        if (lanes[i].keys_only ? lanes[i].observer != NULL : i && lanes[i - 1].keys_only)
            return ouro_fail(OURO_ERR_ARGUMENT, "lane %d: lanes that leave keys and values only stand last and are not observed", i);
    return OURO_OK;
}

int ouro_pass_sweep(ouro_workspace *ws, const ouro_sweep *sweep, ouro_lane *lanes, int n, ouro_poll_fn poll, void *poll_arg)
{
    if (n == 0) return OURO_OK;
    if (!ws || !lanes || n < 0) return ouro_fail(OURO_ERR_ARGUMENT, "a pass needs a workspace and lanes");
    const ouro_config *g = &ws->model->config;
    ouro_sweep all = {ws->all_layers, g->n_layers, true, true, true};
    if (!sweep) sweep = &all;
    int status = ouro_map_check(&ws->model->map);
    if (status == OURO_OK) status = check_lanes(sweep, g, lanes, n);
    if (status == OURO_OK) status = ouro_workspace_reserve(ws, n);
    if (status == OURO_OK) status = ouro_seen_begin(ws, lanes, n);
    if (status != OURO_OK) return status;
    int n_spans = ouro_attention_spans(lanes, n, g->n_heads / g->n_kv_heads, ws->spans), n_states = n;
    while (n_states > 0 && lanes[n_states - 1].keys_only) n_states--;
    pass_run run = {ws, sweep, lanes, n, n_spans, n_states, poll, poll_arg};
    atomic_store(&ws->cancelled, 0);
    for (int h = 0; h < g->n_kv_heads; h++) atomic_store(&ws->half_done[h], 0);     /* a fork may have left some */
    status = ouro_pool_run(ws->pool, pass_thread, &run);
    ws->want = NULL;
    if (status != OURO_OK) return status;
    return atomic_load(&ws->cancelled) ? ouro_fail(OURO_ERR_CANCELLED, "the pass was cancelled") : OURO_OK;
}

int ouro_pass(ouro_workspace *ws, ouro_lane *lanes, int n, ouro_poll_fn poll, void *poll_arg)
{
    return ouro_pass_sweep(ws, NULL, lanes, n, poll, poll_arg);
}

/* ---- readouts ------------------------------------------------------------------------------------------------ */

typedef struct readout_run {
    ouro_workspace *ws;
    const ouro_readout *rows;
    int n;
    ouro_poll_fn poll;
    void *poll_arg;
} readout_run;

/* entropy, log_z and argmax of the logits z, those of them that are wanted */
static void measure_row(const ouro_model *m, const ouro_readout *r, const float *z)
{
    int best;
    float top, s, u;
    if (!r->entropy && !r->log_z && !r->argmax) return;
    m->kernels->softmax_stats(z, m->config.d_vocab, &top, &best, &s, &u);
    double log_s = ouro_log((double)s);
    if (r->entropy) *r->entropy = (float)(log_s - (double)u / (double)s);
    if (r->log_z) *r->log_z = (float)((double)top + log_s);
    if (r->argmax) *r->argmax = best;
}

static void finish_row(ouro_workspace *ws, const ouro_readout *r, const float *z)
{
    if (r->logits) memcpy(r->logits, z, (size_t)ws->model->config.d_vocab * sizeof *z);
    measure_row(ws->model, r, z);
}

void ouro_readout_again(const ouro_model *m, const ouro_readout *r)
{
    unsigned mode = ouro_ftz_enter();
    measure_row(m, r, r->logits);
    ouro_ftz_leave(mode);
}

static void readout_chunk(crew *c, const ouro_readout *rows, int n)
{
    int begin, end;
    ouro_workspace *ws = c->ws;
    const ouro_model *m = ws->model;
    size_t stride = ouro_logits_stride(&m->config);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 2, &begin, &end);)
        for (int i = begin; i < end; i++) ouro_prepare(m->kernels, &ws->x_state, i, rows[i].state, m->config.d_model);
    ouro_block_product(c, &m->head, &ws->x_state, n, ws->logits, stride);
    for (ouro_work *w = crew_phase(c, n); crew_take(c, w, 1, &begin, &end);)
        for (int i = begin; i < end; i++) finish_row(ws, &rows[i], ws->logits + (size_t)i * stride);
}

static void readout_thread(void *arg, int thread, int n_threads)
{
    readout_run *run = arg;
    crew c = {run->ws, thread, n_threads, 0};
    for (int i = 0; i < run->n; i += OURO_READOUT_ROWS) {
        ask(run->ws, thread, run->poll, run->poll_arg);
        ouro_pool_barrier(run->ws->pool, thread);
        if (atomic_load(&run->ws->cancelled)) return;
        readout_chunk(&c, run->rows + i, run->n - i < OURO_READOUT_ROWS ? run->n - i : OURO_READOUT_ROWS);
    }
}

int ouro_read_out(ouro_workspace *ws, const ouro_readout *rows, int n, ouro_poll_fn poll, void *poll_arg)
{
    if (n == 0) return OURO_OK;
    if (!ws || !rows || n < 0) return ouro_fail(OURO_ERR_ARGUMENT, "a readout needs a workspace and states");
    int status = ouro_map_check(&ws->model->map);
    if (status == OURO_OK) status = ouro_workspace_reserve(ws, n < OURO_READOUT_ROWS ? n : OURO_READOUT_ROWS);
    if (status == OURO_OK) status = ouro_workspace_reserve_logits(ws);
    if (status != OURO_OK) return status;
    readout_run run = {ws, rows, n, poll, poll_arg};
    atomic_store(&ws->cancelled, 0);
    status = ouro_pool_run(ws->pool, readout_thread, &run);
    if (status != OURO_OK) return status;
    return atomic_load(&ws->cancelled) ? ouro_fail(OURO_ERR_CANCELLED, "the readout was cancelled") : OURO_OK;
}

void ouro_embed(const ouro_model *m, int32_t token, float *h) { ouro_matrix_get_row(&m->embed, token, h); }
