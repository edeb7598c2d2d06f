/* engine.c - the step, and what ties its parts together; see engine.h and inside.h. */
#include "engine/inside.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/memory.h"
#include "ouro_status.h"

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Makes *at hold at least n elements. */
int ouro_grow(void *at, int *capacity, int n, size_t element)
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

static bool make_room(void *arg, size_t bytes) { return ouro_prefix_make_room(arg, bytes); }

static int check_options(const ouro_engine_options *o)
{
    if (o->max_lanes < 1 || o->max_lanes > 1 << 16)
        return ouro_fail(OURO_ERR_ARGUMENT, "max_lanes is %d, expected 1 to %d", o->max_lanes, 1 << 16);
    if (o->prefill_lanes < 0 || o->prefill_lanes > 1 << 16)
        return ouro_fail(OURO_ERR_ARGUMENT, "prefill_lanes is %d, expected 0 to %d", o->prefill_lanes, 1 << 16);
    if (o->max_queue < 0) return ouro_fail(OURO_ERR_ARGUMENT, "max_queue is %d, expected 0 or more", o->max_queue);
    return OURO_OK;
}

/* What other threads may see of the engine. */
static void publish(ouro_engine *e)
{
    pthread_mutex_lock(&e->door);
    e->looked = (ouro_engine_status){.stats = e->stats, .cache_bytes = e->budget.bytes, .cache_peak = e->budget.peak,
                                     .cache_limit = e->budget.limit, .prefix_bytes = e->prefix.bytes,
                                     .prefix_limit = e->prefix.limit};
    pthread_mutex_unlock(&e->door);
}

int ouro_engine_new(ouro_workspace *ws, const ouro_engine_options *options, ouro_engine **out)
{
    if (!ws || !options || !out) return ouro_fail(OURO_ERR_ARGUMENT, "workspace, options and out must not be NULL");
    int status = check_options(options);
    if (status != OURO_OK) return status;
    ouro_engine *e = calloc(1, sizeof *e);
    if (!e) return ouro_fail(OURO_ERR_MEMORY, "no memory for an engine");
    e->ws = ws;
    e->options = *options;
    e->arrived_end = &e->arrived;
    if (!e->options.max_cache_bytes) e->options.max_cache_bytes = (ouro_available_memory() + ouro_stock_kept(&ws->pages)) / 10 * 9;
    if (!e->options.prefill_lanes) e->options.prefill_lanes = 8;
    e->budget = (ouro_page_budget){.layout = &ws->kv, .stock = &ws->pages, .limit = e->options.max_cache_bytes,
                                   .make_room = make_room, .make_room_arg = &e->prefix};
    ouro_prefix_init(&e->prefix, &e->budget, e->options.prefix_cache_bytes);
    status = ouro_sampler_init(&e->sampler, ws->model->config.d_vocab);
    if (status == OURO_OK && pthread_mutex_init(&e->door, NULL)) {
        ouro_sampler_fini(&e->sampler);
        status = ouro_fail(OURO_ERR_SYSTEM, "no mutex for an engine");
    }
    if (status != OURO_OK) {
        free(e);
        return status;
    }
    publish(e);
    *out = e;
    return OURO_OK;
}

static void free_requests(ouro_request *r)
{
    while (r) {
        ouro_request *next = r->next;
        ouro_request_free(r);
        r = next;
    }
}

void ouro_engine_free(ouro_engine *e)
{
    if (!e) return;
    free_requests(e->requests);
    free_requests(e->arrived);
    ouro_prefix_fini(&e->prefix);
    ouro_sampler_fini(&e->sampler);
    pthread_mutex_destroy(&e->door);
    free(e->cancels);
    free(e->lanes);
    free(e->riders);
    free(e->readouts);
    free(e->readers);
    free(e->reader_requests);
    free(e->logits);
    free(e->log_z);
    free(e->argmax);
    free(e->events);
    free(e->lines);
    free(e);
}

void ouro_engine_look(ouro_engine *e, ouro_engine_status *out)
{
    pthread_mutex_lock(&e->door);
    *out = e->looked;
    out->waiting = e->waiting;
    out->running = e->pending - e->waiting;
    pthread_mutex_unlock(&e->door);
}

const ouro_line *ouro_engine_record(const ouro_engine *e, int *n_lines)
{
    *n_lines = e->n_lines;
    return e->lines;
}

static bool stops(const ouro_request *r, int32_t token)
{
    for (int i = 0; i < r->params.n_stop_ids; i++)
        if (r->stop_ids[i] == token) return true;
    return false;
}

/* The decided lead becomes history; the guess that was right, or a new node, leads on. False when the request ended
 * and is gone. */
static bool settle_lead(ouro_engine *e, ouro_request *r)
{
    ouro_node *old = r->lead;
    ouro_event *v = ouro_add_event(e, &old->event);
    if (!v) {
        ouro_end_request(e, r, OURO_FINISH_FAILED, OURO_ERR_MEMORY);
        return false;
    }
    r->produced++;
    r->stats.tokens++;
    ouro_count_guesses(&r->stats, old, v->token);
    ouro_count_lookup(r, v->token);
    int status = ouro_sequence_append(&r->seq, v->token);
    v->finish = stops(r, v->token) ? OURO_FINISH_STOP : r->produced == r->params.max_new_tokens ? OURO_FINISH_LENGTH
                                                                                                : OURO_RUNNING;
    if (v->finish != OURO_RUNNING) {
        v->stats = ouro_request_stats(r);
        ouro_remove_request(e, r);
        return false;
    }
    if (status == OURO_OK) status = ouro_node_leave(r, old);
    ouro_rest_request(e, r);
    ouro_node *next = ouro_node_child(r, old, v->token);
    if (next) {
        ouro_node_commit(r, next);
        r->stats.kept++;
        r->stats.lookups_kept += next->looked_up;
    }
    ouro_request_prune(r, next);
    if (!next && status == OURO_OK)
        status = ouro_node_new(r, e->ws->model, r->seq.n_tokens - 1, v->token, NULL, false, &next);
    if (status != OURO_OK) {
        ouro_end_request(e, r, OURO_FINISH_FAILED, status);
        return false;
    }
    r->lead = next;
    ouro_request_retire(r);
    return true;
}

/* Gives blocks that are finished to prompts to come. */
static void keep_prefix(ouro_engine *e, ouro_request *r)
{
    int blocks = ouro_request_shareable(r);
    if (blocks <= r->kept) return;
    ouro_prefix_keep(&e->prefix, &r->seq, blocks);
    r->kept = blocks;
}

static void settle_request(ouro_engine *e, ouro_request *r, double seconds)
{
    *(r->produced == 0 ? &r->stats.prefill_seconds : &r->stats.decode_seconds) += seconds;
    if (r->chunk.n && r->chunk.step == r->depth) {
        free(r->chunk.h);
        r->chunk = (ouro_chunk){0};
    }
    keep_prefix(e, r);
    if (r->failed_pos >= 0) {
        int status = ouro_fail(OURO_ERR_STATE, "the custom exit rule of request %lld failed at position %d", (long long)r->id, r->failed_pos);
        ouro_end_request(e, r, OURO_FINISH_FAILED, status);
        return;
    }
    while (r->lead && r->lead->decided && !(ouro_request_unfolded(r) && (r->lead->step < r->depth || r->chunk.n))) {
        int steps = r->lead->event.exit_step + 1;
        if (!settle_lead(e, r)) return;
        if (r->produced > 1) ouro_keep_pace(e, r, steps);
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
        if (r->running) ouro_end_request(e, r, status == OURO_ERR_CANCELLED ? OURO_FINISH_CANCELLED : OURO_FINISH_FAILED, status);
    }
}

/* The pass and the readouts behind it, with their cost noted. */
static int run_pass(ouro_engine *e, ouro_poll_fn poll, void *poll_arg)
{
    int status = ouro_admit(e);
    if (status == OURO_OK) status = ouro_map_check(&e->ws->model->map);
    if (status == OURO_OK) status = ouro_gather(e);
    if (status != OURO_OK) return status;
    double begin = now();
    ouro_count_pass(e);
    status = ouro_pass(e->ws, e->lanes, e->n_lanes, poll, poll_arg);
    double middle = now();
    if (status == OURO_OK) ouro_note_states(e);
    if (status == OURO_OK) status = ouro_after_pass(e);
    if (status == OURO_OK) status = ouro_run_readouts(e, poll, poll_arg);
    if (status != OURO_OK) return status;
    if (e->options.record) return OURO_OK;       /* a schedule that can be replayed goes by counts, not by a clock */
    ouro_cost_saw_pass(&e->cost, e->n_lanes, middle - begin);
    if (e->n_readouts) ouro_cost_saw_readout(&e->cost, now() - middle);
    return OURO_OK;
}

int ouro_engine_step(ouro_engine *e, ouro_poll_fn poll, void *poll_arg, const ouro_event **events, int *n_events)
{
    if (!e || !events || !n_events) return ouro_fail(OURO_ERR_ARGUMENT, "engine, events and n_events must not be NULL");
    double begin = now();
    e->n_events = e->n_lines = 0;
    int status = run_pass(e, poll, poll_arg);
    if (status != OURO_OK) {
        fail_running(e, status);
    } else {
        for (int i = 0; i < e->n_readouts; i++)
            ouro_after_readout(e, e->reader_requests[i], e->readers[i], &e->readouts[i]);
        e->stats.passes += e->n_lanes > 0;
        e->stats.lanes += e->n_lanes;
        settle(e, now() - begin);
        ouro_spawn(e);
    }
    publish(e);
    *events = e->events;
    *n_events = e->n_events;
    return status;
}
