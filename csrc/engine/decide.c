/* decide.c - what a pass means: gates, exit rules, readouts, and the choice of a token or a guess; see engine.h. */
#include "engine/inside.h"
#include "engine/signals.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "kernels/math.h"
#include "model/seen.h"
#include "ouro_status.h"

static void ask_rule(ouro_request *r, ouro_node *n)
{
    int answer = ouro_exit_ask(&r->params.exit, &n->track, &n->signal);
    n->leaves = answer > 0 || n->step == r->depth;
    if (answer < 0) r->failed_pos = n->pos;
}

static int add_readout(ouro_engine *e, ouro_request *r, ouro_node *n)
{
    int capacity = e->readout_capacity, second = capacity;
    int status = ouro_grow(&e->readouts, &capacity, e->n_readouts + 1, sizeof *e->readouts);
    if (status == OURO_OK) status = ouro_grow(&e->readers, &second, e->n_readouts + 1, sizeof *e->readers);
    if (status == OURO_OK)
        status = ouro_grow(&e->reader_requests, &e->readout_capacity, e->n_readouts + 1, sizeof *e->reader_requests);
    if (status != OURO_OK) return status;
    e->readouts[e->n_readouts] = (ouro_readout){.state = n->h};
    e->readers[e->n_readouts] = n;
    e->reader_requests[e->n_readouts++] = r;
    return OURO_OK;
}

/* Counts the step, records the gate, asks the rules that need no readout, and notes who needs one. */
int ouro_after_pass(ouro_engine *e)
{
    int d = e->ws->model->config.d_model, status = OURO_OK;
    int lanes = ouro_lanes_to_come(e);
    e->n_readouts = 0;
    for (int i = 0; status == OURO_OK && i < e->n_lanes; i++) {
        ouro_request *r = e->riders[i].request;
        ouro_node *n = e->riders[i].node;
        r->stats.lanes++;
        if (!n) {
            r->chunk.step += e->riders[i].row == 0;
            continue;
        }
        ouro_signal_begin(&n->signal);
        ouro_exit_gate(&n->track, e->lanes[i].gate, n->step, r->params.n_steps, &n->signal);
        n->exit_pdf[n->step] = n->signal.exit_pdf;
        n->step++;
        ouro_signal_states(&n->signal, n->h, n->before, n->before2, d);
        if (n->decided) continue;
        bool reads = r->params.weighted_exit || (r->exit_needs & OURO_NEED_READOUT) || ouro_reads_to_guess(r, lanes);
        if (!(r->exit_needs & OURO_NEED_READOUT)) ask_rule(r, n);
        if (reads || n->leaves) status = add_readout(e, r, n);
    }
    return status;
}

/* An observer sees a readout before anything is read off it. */
static int show_readout(ouro_engine *e, int i)
{
    ouro_readout *read = &e->readouts[i];
    const ouro_node *n = e->readers[i];
    const ouro_observer *o = e->reader_requests[i]->params.observer;
    if (!o || !(o->wants(o, n->step - 1, -1) & OURO_BIT(OURO_P_LOGITS))) return OURO_OK;
    int v = e->ws->model->config.d_vocab;
    uint8_t changed = 0;
    ouro_lane lane = {.pos = n->pos, .step = n->step - 1, .observer = o};
    int status = ouro_show(&lane, 1, OURO_P_LOGITS, (ouro_rows){.data = read->logits, .stride = (size_t)v, .heads = 1, .cols = v}, &changed);
    if (status == OURO_OK && changed) ouro_readout_again(e->ws->model, read);
    return status;
}

int ouro_run_readouts(ouro_engine *e, ouro_poll_fn poll, void *arg)
{
    size_t v = (size_t)e->ws->model->config.d_vocab;
    if (e->n_readouts > e->logit_rows) {
        int a = e->logit_rows, b = a;
        int status = ouro_grow(&e->logits, &a, e->n_readouts, v * sizeof(float));
        if (status == OURO_OK) status = ouro_grow(&e->log_z, &b, e->n_readouts, 2 * sizeof(float));
        if (status == OURO_OK) status = ouro_grow(&e->argmax, &e->logit_rows, e->n_readouts, sizeof(int32_t));
        if (status != OURO_OK) return status;
    }
    for (int i = 0; i < e->n_readouts; i++) {
        e->readouts[i].logits = e->logits + (size_t)i * v;
        e->readouts[i].log_z = e->log_z + 2 * i;
        e->readouts[i].entropy = e->log_z + 2 * i + 1;
        e->readouts[i].argmax = e->argmax + i;
    }
    int status = ouro_read_out(e->ws, e->readouts, e->n_readouts, poll, arg);
    for (int i = 0; status == OURO_OK && i < e->n_readouts; i++) status = show_readout(e, i);
    return status;
}

static int32_t choose(ouro_engine *e, ouro_request *r, const ouro_node *n, const float *logits, const ouro_readout *read)
{
    const ouro_sampling *s = &r->params.sampling;
    int place = n->pos + 1 - r->n_prompt;
    if (place < r->params.n_follow) return r->params.follow[place];
    if (s->temperature == 0.0f && s->repetition_penalty == 1.0f && logits == read->logits) return *read->argmax;
    const int32_t *history = ouro_node_history(r, n);
    return ouro_sample(&e->sampler, s, logits, history, n->pos + 1, n->pos + 1);
}

static void decide(ouro_engine *e, ouro_request *r, ouro_node *n, const float *logits, double log_z, const ouro_readout *read)
{
    ouro_event *v = &n->event;
    n->decided = true;
    v->request = r->id;
    v->token = choose(e, r, n, logits, read);
    v->logprob = (float)((double)logits[v->token] - log_z);
    v->exit_step = n->step - 1;
    v->n_top = r->params.n_top;
    ouro_top_k(logits, e->ws->model->config.d_vocab, v->n_top, v->top_ids, v->top_logprobs);
    for (int i = 0; i < v->n_top; i++) v->top_logprobs[i] = (float)((double)v->top_logprobs[i] - log_z);
    memcpy(v->exit_pdf, n->exit_pdf, sizeof v->exit_pdf);
    ouro_node_stop(r, n);
}

static double log_z_of(const ouro_engine *e, const float *z)
{
    float m, s, u;
    int best;
    unsigned mode = ouro_ftz_enter();
    e->ws->model->kernels->softmax_stats(z, e->ws->model->config.d_vocab, &m, &best, &s, &u);
    ouro_ftz_leave(mode);
    return (double)m + ouro_log((double)s);
}

/* What the readout of one node means: leave, or a guess at what follows. */
void ouro_after_readout(ouro_engine *e, ouro_request *r, ouro_node *n, const ouro_readout *read)
{
    int v = e->ws->model->config.d_vocab;
    ouro_signal_readout(&n->signal, read, n->z_before, &n->log_z_before, v);
    if (r->exit_needs & OURO_NEED_READOUT) ask_rule(r, n);
    if (n->mixed)
        for (int i = 0; i < v; i++) n->mixed[i] = n->mixed[i] + n->signal.exit_pdf * read->logits[i];
    const float *logits = n->mixed && n->leaves ? n->mixed : read->logits;
    double log_z = n->mixed && n->leaves ? log_z_of(e, n->mixed) : (double)*read->log_z;
    if (n->leaves) decide(e, r, n, logits, log_z, read);
    else if (ouro_guessing(r)) n->guess[n->step - 1] = choose(e, r, n, logits, read);
}
