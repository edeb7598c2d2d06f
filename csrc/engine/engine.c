/* engine.c - the schedule: which lanes ride in the next pass, and what follows from their readouts; see engine.h.
 *
 *   admit -> gather lanes -> pass -> gates -> readouts -> decide / guess -> settle -> spawn guesses
 */
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "base/memory.h"
#include "engine/request.h"
#include "kernels/math.h"
#include "ouro_status.h"

#define FREE_LANES 6             /* lanes of a pass that cost next to nothing: room for guesses */
#define MOST_GUESSES 3           /* successors of one node */

/* One lane of the pass being built, and whose it is: a node, or row `row` of a request's chunk. */
typedef struct rider { ouro_request *request; ouro_node *node; int row; } rider;

struct ouro_engine {
    ouro_workspace *ws;
    ouro_page_budget budget;
    size_t reserved;                     /* by running requests */
    bool fixed_limit;
    int max_lanes;
    int64_t last_id;
    ouro_request *requests;              /* queued and running, in order of arrival */
    ouro_sampler sampler;
    ouro_lane *lanes;                    /* [capacity] */
    rider *riders;                       /* [capacity] */
    int n_lanes, capacity;
    ouro_readout *readouts;              /* [n_readouts] and the nodes they belong to */
    ouro_node **readers;
    ouro_request **reader_requests;
    int n_readouts, readout_capacity;
    float *logits;                       /* [logit_rows][d_vocab] */
    float *log_z;                        /* [logit_rows][2]: log_z, entropy */
    int32_t *argmax;
    int logit_rows;
    ouro_event *events;
    int n_events, event_capacity;
    ouro_stats stats;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Makes *at hold at least n elements. */
static int grow(void *at, int *capacity, int n, size_t element)
{
    if (n <= *capacity) return OURO_OK;
    int more = n > 2 * *capacity ? n : 2 * *capacity;
    void *p;
    memcpy(&p, at, sizeof p);
    p = realloc(p, (size_t)more * element);
    if (!p) return ouro_fail(OURO_ERR_MEMORY, "no memory for %d rows of an engine", n);
    memcpy(at, &p, sizeof p);
    *capacity = more;
    return OURO_OK;
}

int ouro_engine_new(ouro_workspace *ws, int max_lanes, size_t max_cache_bytes, ouro_engine **out)
{
    if (!ws || !out) return ouro_fail(OURO_ERR_ARGUMENT, "workspace and out must not be NULL");
    if (max_lanes < 1 || max_lanes > 1 << 16)
        return ouro_fail(OURO_ERR_ARGUMENT, "max_lanes is %d, expected 1 to %d", max_lanes, 1 << 16);
    ouro_engine *e = calloc(1, sizeof *e);
    if (!e) return ouro_fail(OURO_ERR_MEMORY, "no memory for an engine");
    e->ws = ws;
    e->max_lanes = max_lanes;
    e->fixed_limit = max_cache_bytes > 0;
    e->budget = (ouro_page_budget){.layout = &ws->kv, .limit = max_cache_bytes};
    int status = ouro_sampler_init(&e->sampler, ws->model->config.d_vocab);
    if (status != OURO_OK) {
        free(e);
        return status;
    }
    *out = e;
    return OURO_OK;
}

void ouro_engine_free(ouro_engine *e)
{
    if (!e) return;
    while (e->requests) {
        ouro_request *r = e->requests;
        e->requests = r->next;
        ouro_request_free(r);
    }
    ouro_sampler_fini(&e->sampler);
    free(e->lanes);
    free(e->riders);
    free(e->readouts);
    free(e->readers);
    free(e->reader_requests);
    free(e->logits);
    free(e->log_z);
    free(e->argmax);
    free(e->events);
    free(e);
}

/* ---- requests ------------------------------------------------------------------------------------------------ */

static int check_params(const ouro_engine *e, const int32_t *tokens, int n, const ouro_request_params *p)
{
    const ouro_config *c = &e->ws->model->config;
    if (n < 1) return ouro_fail(OURO_ERR_ARGUMENT, "a prompt needs at least one token");
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->d_vocab)
            return ouro_fail(OURO_ERR_ARGUMENT, "token %d at position %d is outside of the vocabulary of %d",
                             (int)tokens[i], i, (int)c->d_vocab);
    if (p->max_new_tokens < 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "max_new_tokens is %d, expected 1 or more", p->max_new_tokens);
    if ((int64_t)n + p->max_new_tokens > c->n_ctx)
        return ouro_fail(OURO_ERR_CONTEXT, "%d prompt tokens and %d new ones exceed the context of %d", n,
                         p->max_new_tokens, (int)c->n_ctx);
    if (p->n_steps < 1 || p->n_steps > OURO_MAX_STEPS)
        return ouro_fail(OURO_ERR_ARGUMENT, "n_steps is %d, expected 1 to %d", p->n_steps, OURO_MAX_STEPS);
    if (p->exit_at_step < -1 || p->exit_at_step >= p->n_steps)
        return ouro_fail(OURO_ERR_ARGUMENT, "exit_at_step is %d, expected 0 to %d", p->exit_at_step, p->n_steps - 1);
    if (p->weighted_exit + (p->exit.kind != OURO_EXIT_NEVER) + (p->exit_at_step >= 0) > 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "exit_at_step, an exit rule and weighted_exit exclude each other");
    if (p->n_top < 0 || p->n_top > OURO_MAX_TOP || p->n_top > c->d_vocab)
        return ouro_fail(OURO_ERR_ARGUMENT, "logprobs is %d, expected 0 to %d", p->n_top,
                         c->d_vocab < OURO_MAX_TOP ? (int)c->d_vocab : OURO_MAX_TOP);
    if (p->n_stop_ids < 0 || (p->n_stop_ids && !p->stop_ids)) return ouro_fail(OURO_ERR_ARGUMENT, "stop_ids is NULL");
    int status = ouro_exit_check(&p->exit);
    return status == OURO_OK ? ouro_sampling_check(&p->sampling) : status;
}

static size_t cache_limit(const ouro_engine *e)
{
    if (e->fixed_limit) return e->budget.limit;
    return e->budget.bytes + ouro_available_memory() / 10 * 9;
}

int ouro_engine_submit(ouro_engine *e, const int32_t *tokens, int n, const ouro_request_params *p, int64_t *id)
{
    if (!e || !tokens || !p || !id) return ouro_fail(OURO_ERR_ARGUMENT, "engine, tokens, params and id must not be NULL");
    int status = check_params(e, tokens, n, p);
    if (status != OURO_OK) return status;
    ouro_request *r;
    status = ouro_request_new(&e->budget, e->last_id + 1, tokens, n, p, &r);
    if (status != OURO_OK) return status;
    size_t limit = cache_limit(e);
    if (r->reserved > limit) {
        status = ouro_fail(OURO_ERR_MEMORY, "the key/value cache of %d positions at %d steps needs %zu bytes, %zu are allowed",
                           n + p->max_new_tokens, r->depth, r->reserved, limit);
        ouro_request_free(r);
        return status;
    }
    *id = r->id = ++e->last_id;
    r->stats.prompt_tokens = n;
    ouro_request **end = &e->requests;
    while (*end) end = &(*end)->next;
    *end = r;
    return OURO_OK;
}

static ouro_request *find(const ouro_engine *e, int64_t id)
{
    for (ouro_request *r = e->requests; r; r = r->next)
        if (r->id == id) return r;
    return NULL;
}

void ouro_engine_cancel(ouro_engine *e, int64_t id)
{
    ouro_request *r = find(e, id);
    if (r) r->cancelled = true;
}

int ouro_engine_pending(const ouro_engine *e)
{
    int n = 0;
    for (const ouro_request *r = e->requests; r; r = r->next) n++;
    return n;
}

const ouro_stats *ouro_engine_stats(const ouro_engine *e) { return &e->stats; }
size_t ouro_engine_cache_bytes(const ouro_engine *e) { return e->budget.bytes; }

/* ---- events -------------------------------------------------------------------------------------------------- */

static ouro_event *add_event(ouro_engine *e, const ouro_event *from)
{
    if (grow(&e->events, &e->event_capacity, e->n_events + 1, sizeof *e->events) != OURO_OK) return NULL;
    e->events[e->n_events] = *from;
    return &e->events[e->n_events++];
}

static void remove_request(ouro_engine *e, ouro_request *r)
{
    for (ouro_request **at = &e->requests; *at; at = &(*at)->next)
        if (*at == r) {
            *at = r->next;
            break;
        }
    if (r->running) e->reserved -= r->reserved;
    ouro_request_free(r);
}

static void end_request(ouro_engine *e, ouro_request *r, ouro_finish finish, int status)
{
    ouro_event last = {.request = r->id, .token = -1, .exit_step = -1, .finish = finish, .status = status,
                       .stats = r->stats};
    add_event(e, &last);
    remove_request(e, r);
}

/* ---- lanes --------------------------------------------------------------------------------------------------- */

static void admit(ouro_engine *e)
{
    int lanes = 0;
    size_t limit = cache_limit(e);
    for (ouro_request *r = e->requests; r; r = r->next) lanes += r->running;
    for (ouro_request *r = e->requests, *next; r; r = next) {
        next = r->next;
        if (r->cancelled) {
            end_request(e, r, OURO_FINISH_CANCELLED, OURO_OK);
            continue;
        }
        if (r->running) continue;
        /* first come, first served: a large request is not overtaken for ever by small ones */
        if (lanes >= e->max_lanes || e->reserved + r->reserved > limit) break;
        r->running = true;
        e->reserved += r->reserved;
        lanes++;
    }
    e->budget.limit = limit > e->budget.bytes ? limit : e->budget.bytes;
}

static int add_lane(ouro_engine *e, ouro_request *r, ouro_node *n, int row, int pos, int step, float *h)
{
    int capacity = e->capacity;
    int status = grow(&e->lanes, &capacity, e->n_lanes + 1, sizeof *e->lanes);
    if (status == OURO_OK) status = grow(&e->riders, &e->capacity, e->n_lanes + 1, sizeof *e->riders);
    if (status != OURO_OK) return status;
    e->lanes[e->n_lanes] = (ouro_lane){.pos = pos, .step = step, .h = h, .pages = ouro_sequence_pages(&r->seq, step),
                                       .side = n && n->speculative ? &n->side[step] : NULL};
    e->riders[e->n_lanes++] = (rider){r, n, row};
    return OURO_OK;
}

static void remember_states(ouro_node *n, int d)
{
    if (!n->before || n->step == 0) return;
    memcpy(n->before2, n->before, (size_t)d * sizeof(float));
    memcpy(n->before, n->h, (size_t)d * sizeof(float));
}

static int gather_request(ouro_engine *e, ouro_request *r)
{
    int d = e->ws->model->config.d_model, status = OURO_OK;
    for (int i = 0; status == OURO_OK && i < r->chunk.n; i++)
        status = add_lane(e, r, NULL, i, r->chunk.pos + i, r->chunk.step, r->chunk.h + (size_t)i * (size_t)d);
    for (ouro_node *n = r->nodes; status == OURO_OK && n; n = n->next) {
        if (n->step >= r->depth) continue;
        remember_states(n, d);
        status = add_lane(e, r, n, 0, n->pos, n->step, n->h);
    }
    return status;
}

/* Lanes of all running requests; prompts that wait get what decoding leaves of max_lanes. */
static int gather(ouro_engine *e)
{
    int lanes = 0;
    e->n_lanes = 0;
    for (ouro_request *r = e->requests; r; r = r->next) lanes += r->running ? ouro_request_lanes(r) : 0;
    for (ouro_request *r = e->requests, *next; r; r = next) {
        next = r->next;
        if (!r->running) continue;
        int before = ouro_request_lanes(r);
        int status = ouro_request_advance(r, e->ws->model, e->max_lanes - lanes > 1 ? e->max_lanes - lanes - 1 : lanes == 0);
        lanes += ouro_request_lanes(r) - before;
        if (status != OURO_OK) end_request(e, r, OURO_FINISH_FAILED, status);
        else if ((status = gather_request(e, r)) != OURO_OK) return status;
    }
    return OURO_OK;
}

/* ---- gates and readouts ---------------------------------------------------------------------------------------- */

static double distance(const float *a, const float *b, int d)
{
    double s = 0.0;
    for (int i = 0; i < d; i++) s += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(s);
}

static double length(const float *a, int d)
{
    double s = 0.0;
    for (int i = 0; i < d; i++) s += (double)a[i] * (double)a[i];
    return sqrt(s);
}

/* The signal's part that comes from states (the node's h is that of step - 1 = t). */
static void signal_states(ouro_node *n, int d)
{
    ouro_exit_signal *s = &n->signal;
    s->state_delta = s->state_relative = s->acceleration = NAN;
    if (!n->before || s->step < 1) return;
    double delta = distance(n->h, n->before, d);
    s->state_delta = (float)delta;
    s->state_relative = (float)(delta / length(n->before, d));
    if (s->step < 2) return;
    double bend = 0.0;
    for (int i = 0; i < d; i++) {
        double x = (double)n->h[i] - 2.0 * (double)n->before[i] + (double)n->before2[i];
        bend += x * x;
    }
    s->acceleration = (float)(sqrt(bend) / length(n->h, d));
}

/* KL(p || q), nats, of softmax(a) against softmax(b) */
static double divergence(const float *a, double log_za, const float *b, double log_zb, int n)
{
    double kl = 0.0;
    for (int i = 0; i < n; i++) {
        double la = (double)a[i] - log_za, lb = (double)b[i] - log_zb;
        kl += exp(la) * (la - lb);
    }
    return kl > 0.0 ? kl : 0.0;
}

static bool guessing(const ouro_request *r) { return r->params.speculate != OURO_SPECULATE_OFF && r->pace.on; }

static void ask_rule(ouro_request *r, ouro_node *n)
{
    int answer = ouro_exit_ask(&r->params.exit, &n->track, &n->signal);
    n->leaves = answer > 0 || n->step == r->depth;
    r->failed |= answer < 0;
}

static int add_readout(ouro_engine *e, ouro_request *r, ouro_node *n)
{
    int capacity = e->readout_capacity, second = capacity;
    int status = grow(&e->readouts, &capacity, e->n_readouts + 1, sizeof *e->readouts);
    if (status == OURO_OK) status = grow(&e->readers, &second, e->n_readouts + 1, sizeof *e->readers);
    if (status == OURO_OK)
        status = grow(&e->reader_requests, &e->readout_capacity, e->n_readouts + 1, sizeof *e->reader_requests);
    if (status != OURO_OK) return status;
    e->readouts[e->n_readouts] = (ouro_readout){.state = n->h};
    e->readers[e->n_readouts] = n;
    e->reader_requests[e->n_readouts++] = r;
    return OURO_OK;
}

/* Counts the step, records the gate, asks the rules that need no readout, and notes who needs one. */
static int after_pass(ouro_engine *e)
{
    int d = e->ws->model->config.d_model, status = OURO_OK;
    e->n_readouts = 0;
    for (int i = 0; status == OURO_OK && i < e->n_lanes; i++) {
        ouro_request *r = e->riders[i].request;
        ouro_node *n = e->riders[i].node;
        if (!n) {
            r->chunk.step += e->riders[i].row == 0;
            continue;
        }
        n->signal = (ouro_exit_signal){.kl = NAN, .entropy = NAN, .confidence = NAN, .top_token = -1,
                                       .previous_top_token = n->signal.top_token};
        ouro_exit_gate(&n->track, e->lanes[i].gate, n->step, r->params.n_steps, &n->signal);
        n->exit_pdf[n->step] = n->signal.exit_pdf;
        n->step++;
        signal_states(n, d);
        if (n->decided) continue;
        bool reads = r->params.weighted_exit || (r->exit_needs & OURO_NEED_READOUT) || guessing(r);
        if (!(r->exit_needs & OURO_NEED_READOUT)) ask_rule(r, n);
        if (reads || n->leaves) status = add_readout(e, r, n);
    }
    return status;
}

static int run_readouts(ouro_engine *e, ouro_poll_fn poll, void *arg)
{
    size_t v = (size_t)e->ws->model->config.d_vocab;
    if (e->n_readouts > e->logit_rows) {
        int a = e->logit_rows, b = a;
        int status = grow(&e->logits, &a, e->n_readouts, v * sizeof(float));
        if (status == OURO_OK) status = grow(&e->log_z, &b, e->n_readouts, 2 * sizeof(float));
        if (status == OURO_OK) status = grow(&e->argmax, &e->logit_rows, e->n_readouts, sizeof(int32_t));
        if (status != OURO_OK) return status;
    }
    for (int i = 0; i < e->n_readouts; i++) {
        e->readouts[i].logits = e->logits + (size_t)i * v;
        e->readouts[i].log_z = e->log_z + 2 * i;
        e->readouts[i].entropy = e->log_z + 2 * i + 1;
        e->readouts[i].argmax = e->argmax + i;
    }
    return ouro_read_out(e->ws, e->readouts, e->n_readouts, poll, arg);
}

/* ---- decisions --------------------------------------------------------------------------------------------------- */

static int32_t choose(ouro_engine *e, ouro_request *r, const ouro_node *n, const float *logits)
{
    const int32_t *history = ouro_node_history(r, n);
    return ouro_sample(&e->sampler, &r->params.sampling, logits, history, n->pos + 1, n->pos + 1);
}

static void decide(ouro_engine *e, ouro_request *r, ouro_node *n, const float *logits, double log_z)
{
    ouro_event *v = &n->event;
    n->decided = true;
    v->request = r->id;
    v->token = choose(e, r, n, logits);
    v->logprob = (float)((double)logits[v->token] - log_z);
    v->exit_step = n->step - 1;
    v->n_top = r->params.n_top;
    ouro_top_k(logits, e->ws->model->config.d_vocab, v->n_top, v->top_ids, v->top_logprobs);
    for (int i = 0; i < v->n_top; i++) v->top_logprobs[i] = (float)((double)v->top_logprobs[i] - log_z);
    memcpy(v->exit_pdf, n->exit_pdf, sizeof v->exit_pdf);
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

static void signal_readout(ouro_request *r, ouro_node *n, const ouro_readout *read, int v)
{
    ouro_exit_signal *s = &n->signal;
    s->entropy = *read->entropy;
    s->top_token = *read->argmax;
    s->confidence = (float)exp((double)read->logits[s->top_token] - (double)*read->log_z);
    if (!(r->exit_needs & OURO_NEED_LOGITS)) return;
    if (s->step > 0) s->kl = (float)divergence(n->z_before, n->log_z_before, read->logits, (double)*read->log_z, v);
    memcpy(n->z_before, read->logits, (size_t)v * sizeof(float));
    n->log_z_before = (double)*read->log_z;
}

/* What the readout of one node means: leave, or a guess at what follows. */
static void after_readout(ouro_engine *e, ouro_request *r, ouro_node *n, const ouro_readout *read)
{
    int v = e->ws->model->config.d_vocab;
    signal_readout(r, n, read, v);
    if (r->exit_needs & OURO_NEED_READOUT) ask_rule(r, n);
    if (n->mixed)
        for (int i = 0; i < v; i++) n->mixed[i] = n->mixed[i] + n->signal.exit_pdf * read->logits[i];
    const float *logits = n->mixed && n->leaves ? n->mixed : read->logits;
    double log_z = n->mixed && n->leaves ? log_z_of(e, n->mixed) : (double)*read->log_z;
    if (n->leaves) decide(e, r, n, logits, log_z);
    else if (guessing(r)) n->guess[n->step - 1] = choose(e, r, n, logits);
}

static bool stops(const ouro_request *r, int32_t token)
{
    for (int i = 0; i < r->params.n_stop_ids; i++)
        if (r->stop_ids[i] == token) return true;
    return false;
}

static void count_guesses(ouro_stats *s, const ouro_node *n, int32_t token)
{
    if (n->guess[0] < 0) return;
    s->first_tried++;
    s->first_right += n->guess[0] == token;
    if (n->guess[0] == token || n->guess[1] < 0) return;
    s->second_tried++;
    s->second_right += n->guess[1] == token;
}

/* The decided lead becomes history; the guess that was right, or a new node, leads on. False when the request ended
 * and is gone. */
static bool settle_lead(ouro_engine *e, ouro_request *r)
{
    ouro_node *old = r->lead;
    ouro_event *v = add_event(e, &old->event);
    if (!v) {
        end_request(e, r, OURO_FINISH_FAILED, OURO_ERR_MEMORY);
        return false;
    }
    r->produced++;
    r->stats.tokens++;
    count_guesses(&r->stats, old, v->token);
    int status = ouro_sequence_append(&r->seq, v->token);
    v->finish = stops(r, v->token) ? OURO_FINISH_STOP : r->produced == r->params.max_new_tokens ? OURO_FINISH_LENGTH
                                                                                                : OURO_RUNNING;
    if (v->finish != OURO_RUNNING) {
        v->stats = r->stats;
        remove_request(e, r);
        return false;
    }
    ouro_node *next = ouro_node_child(r, old, v->token);
    if (next) {
        ouro_node_commit(r, next);
        r->stats.kept++;
    }
    ouro_request_prune(r, next);
    if (!next && status == OURO_OK)
        status = ouro_node_new(r, e->ws->model, r->seq.n_tokens - 1, v->token, NULL, false, &next);
    if (status != OURO_OK) {
        end_request(e, r, OURO_FINISH_FAILED, status);
        return false;
    }
    r->lead = next;
    ouro_request_retire(r);
    return true;
}

/* ---- speculation ------------------------------------------------------------------------------------------------- */

/* Bytes that a pass reads: the shared layers, and the head. */
static double sweep_cost(const ouro_model *m, double *head)
{
    double bytes = 0.0;
    const ouro_layer *y = m->layers;
    bytes = (double)(ouro_matrix_bytes(&y->qkv) + ouro_matrix_bytes(&y->o) + ouro_matrix_bytes(&y->gate_up)
                     + ouro_matrix_bytes(&y->down)) * (double)m->config.n_layers;
    *head = (double)ouro_matrix_bytes(&m->head);
    return bytes;
}

/* Auto: speculation stays on while the passes it needed cost less than plain decoding would have; after a loss it
 * rests, then tries again for a few tokens. A trial that fails costs a few heads in some forty tokens: below 1 %. */
static void keep_pace(const ouro_model *m, ouro_request *r, int passes)
{
    const int trial = 6, rest = 48;
    ouro_pace *p = &r->pace;
    if (r->params.speculate != OURO_SPECULATE_AUTO) return;
    p->tokens++;
    p->passes += passes;
    if (!p->on) {
        if (p->tokens < p->rest) return;
        *p = (ouro_pace){.on = true, .rest = p->rest};
    } else if (p->tokens >= trial) {
        double head, sweep = sweep_cost(m, &head);
        double plain = (double)p->tokens * (r->depth * sweep + head), with = (double)p->passes * (sweep + head);
        if (with < 0.99 * plain) p->tokens /= 2, p->passes /= 2, p->rest = rest;
        else *p = (ouro_pace){.on = false, .rest = p->rest && p->rest < 4 * rest ? 2 * p->rest : rest};
    }
}

static int total_lanes(const ouro_engine *e)
{
    int lanes = 0;
    for (const ouro_request *r = e->requests; r; r = r->next) lanes += r->running ? ouro_request_lanes(r) : 0;
    return lanes;
}

/* New guesses behind the nodes of a request, oldest first, while lanes are free. */
static void spawn(ouro_engine *e, ouro_request *r, int *lanes)
{
    int limit = r->n_prompt + r->params.max_new_tokens - 2;      /* the last position that is ever run */
    for (ouro_node *n = r->nodes; n && *lanes < FREE_LANES; n = n->next) {
        if ((n != r->lead && !n->speculative) || n->step == 0 || n->pos >= limit) continue;
        int32_t token = n->decided ? n->event.token : n->guess[n->step - 1];
        if (token < 0 || ouro_node_child(r, n, token) || ouro_node_children(r, n) >= MOST_GUESSES) continue;
        ouro_node *child;
        if (ouro_node_new(r, e->ws->model, n->pos + 1, token, n, true, &child) != OURO_OK) return;
        r->stats.guesses++;
        (*lanes)++;
    }
}

/* ---- the step ------------------------------------------------------------------------------------------------------ */

static void settle_request(ouro_engine *e, ouro_request *r, double seconds)
{
    r->stats.passes++;
    r->since_token++;
    *(r->produced == 0 ? &r->stats.prefill_seconds : &r->stats.decode_seconds) += seconds;
    if (r->chunk.n && r->chunk.step == r->depth) {
        free(r->chunk.h);
        r->chunk = (ouro_chunk){0};
    }
    if (r->failed) {
        end_request(e, r, OURO_FINISH_FAILED, OURO_ERR_STATE);
        return;
    }
    while (r->lead && r->lead->decided) {
        if (!settle_lead(e, r)) return;
        if (r->produced > 1) keep_pace(e->ws->model, r, r->since_token);
        r->since_token = 0;
    }
    ouro_request_retire(r);
}

static void settle(ouro_engine *e, double seconds)
{
    for (ouro_request *r = e->requests, *next; r; r = next) {
        next = r->next;
        if (r->running) settle_request(e, r, seconds);
    }
}

static void fail_running(ouro_engine *e, int status)
{
    for (ouro_request *r = e->requests, *next; r; r = next) {
        next = r->next;
        if (r->running) end_request(e, r, status == OURO_ERR_CANCELLED ? OURO_FINISH_CANCELLED : OURO_FINISH_FAILED, status);
    }
}

int ouro_engine_step(ouro_engine *e, ouro_poll_fn poll, void *poll_arg, const ouro_event **events, int *n_events)
{
    if (!e || !events || !n_events) return ouro_fail(OURO_ERR_ARGUMENT, "engine, events and n_events must not be NULL");
    double begin = now();
    e->n_events = 0;
    admit(e);
    int status = gather(e);
    if (status == OURO_OK) status = ouro_pass(e->ws, e->lanes, e->n_lanes, poll, poll_arg);
    if (status == OURO_OK) status = after_pass(e);
    if (status == OURO_OK) status = run_readouts(e, poll, poll_arg);
    if (status != OURO_OK) {
        fail_running(e, status);
    } else {
        for (int i = 0; i < e->n_readouts; i++) after_readout(e, e->reader_requests[i], e->readers[i], &e->readouts[i]);
        e->stats.passes += e->n_lanes > 0;
        e->stats.lanes += e->n_lanes;
        settle(e, now() - begin);
        int lanes = total_lanes(e);
        for (ouro_request *r = e->requests; r; r = r->next)
            if (r->running && guessing(r)) spawn(e, r, &lanes);
    }
    *events = e->events;
    *n_events = e->n_events;
    return status;
}
