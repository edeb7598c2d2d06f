/* admit.c - how a request comes, waits and goes: checks, the queue, admission, the events of its end; see engine.h. */
#include "engine/inside.h"

#include <stdio.h>
#include <stdlib.h>

#include "ouro_status.h"

ouro_event *ouro_add_event(ouro_engine *e, const ouro_event *from)
{
    if (ouro_grow(&e->events, &e->event_capacity, e->n_events + 1, sizeof *e->events) != OURO_OK) return NULL;
    e->events[e->n_events] = *from;
    return &e->events[e->n_events++];
}

void ouro_rest_request(ouro_engine *e, ouro_request *r)
{
    if (ouro_request_unfolded(r)) return;
    size_t rest = ouro_policy_rest_bytes(r->policy, &e->ws->kv, r->n_prompt + r->params.max_new_tokens, r->depth);
    e->reserved -= r->reserved - rest;
    r->reserved = rest;
}

static void add_stats(ouro_stats *to, const ouro_stats *s)
{
    to->tokens += s->tokens, to->prompt_tokens += s->prompt_tokens, to->prefix_tokens += s->prefix_tokens;
    to->guesses += s->guesses, to->kept += s->kept, to->dropped += s->dropped;
    to->lookups += s->lookups, to->lookups_kept += s->lookups_kept;
    to->first_tried += s->first_tried, to->first_right += s->first_right;
    to->second_tried += s->second_tried, to->second_right += s->second_right;
    to->prefill_seconds += s->prefill_seconds, to->decode_seconds += s->decode_seconds;
}

void ouro_remove_request(ouro_engine *e, ouro_request *r)
{
    for (ouro_request **at = &e->requests; *at; at = &(*at)->next)
        if (*at == r) {
            *at = r->next;
            break;
        }
    if (r->running) e->reserved -= r->reserved;
    pthread_mutex_lock(&e->door);
    e->pending--;
    e->waiting -= !r->running;
    pthread_mutex_unlock(&e->door);
    add_stats(&e->stats, &r->stats);
    ouro_request_free(r);
}

void ouro_end_request(ouro_engine *e, ouro_request *r, ouro_finish finish, int status)
{
    ouro_event last = {.request = r->id, .token = -1, .exit_step = -1, .finish = finish, .status = status,
                       .stats = ouro_request_stats(r)};
    if (status != OURO_OK) snprintf(last.detail, sizeof last.detail, "%s", ouro_last_error());
    ouro_add_event(e, &last);
    ouro_remove_request(e, r);
}

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
    if (p->weighted_exit + ouro_exit_is_on(&p->exit) + (p->exit_at_step >= 0) > 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "exit_at_step, an exit rule and weighted_exit exclude each other");
    if (p->n_top < 0 || p->n_top > OURO_MAX_TOP || p->n_top > c->d_vocab)
        return ouro_fail(OURO_ERR_ARGUMENT, "logprobs is %d, expected 0 to %d", p->n_top,
                         c->d_vocab < OURO_MAX_TOP ? (int)c->d_vocab : OURO_MAX_TOP);
    if (p->n_follow < 0 || (p->n_follow && !p->follow)) return ouro_fail(OURO_ERR_ARGUMENT, "follow is NULL");
    for (int i = 0; i < p->n_follow; i++)
        if (p->follow[i] < 0 || p->follow[i] >= c->d_vocab)
            return ouro_fail(OURO_ERR_ARGUMENT, "token %d at place %d of follow is outside of the vocabulary of %d",
                             (int)p->follow[i], i, (int)c->d_vocab);
    if (p->n_stop_ids < 0 || (p->n_stop_ids && !p->stop_ids)) return ouro_fail(OURO_ERR_ARGUMENT, "stop_ids is NULL");
    if ((unsigned)p->kv_policy >= OURO_N_POLICIES)
        return ouro_fail(OURO_ERR_ARGUMENT, "unknown kv_policy %d", (int)p->kv_policy);
    if (ouro_policy_waits(p->kv_policy) && p->speculate == OURO_SPECULATE_ON)
        return ouro_fail(OURO_ERR_ARGUMENT, "speculation is not possible under a kv_policy whose entries are known only "
                                            "after a token's last step");
    int status = ouro_exit_check(&p->exit);
    return status == OURO_OK ? ouro_sampling_check(&p->sampling) : status;
}

int ouro_engine_submit(ouro_engine *e, const int32_t *tokens, int n, const ouro_request_params *p, int64_t *id)
{
    if (!e || !tokens || !p || !id) return ouro_fail(OURO_ERR_ARGUMENT, "engine, tokens, params and id must not be NULL");
    int status = check_params(e, tokens, n, p);
    if (status != OURO_OK) return status;
    ouro_request *r;
    status = ouro_request_new(&e->budget, 0, tokens, n, p, &r);
    if (status != OURO_OK) return status;
    r->stats.prompt_tokens = n;
    if (r->reserved > e->options.max_cache_bytes) {
        status = ouro_fail(OURO_ERR_MEMORY,
                           "the key/value cache of %d positions at %d steps needs %zu bytes, %zu are allowed",
                           n + p->max_new_tokens, r->depth, r->reserved, e->options.max_cache_bytes);
        ouro_request_free(r);
        return status;
    }
    pthread_mutex_lock(&e->door);
    bool full = e->options.max_queue > 0 && e->waiting >= e->options.max_queue;
    if (!full) {
        *id = r->id = ++e->last_id;
        *e->arrived_end = r;
        e->arrived_end = &r->next;
        e->pending++;
        e->waiting++;
    }
    pthread_mutex_unlock(&e->door);
    if (!full) return OURO_OK;
    ouro_request_free(r);
    return ouro_fail(OURO_ERR_BUSY, "%d requests are waiting already, which is max_queue", e->options.max_queue);
}

int ouro_engine_cancel(ouro_engine *e, int64_t id)
{
    pthread_mutex_lock(&e->door);
    int status = ouro_grow(&e->cancels, &e->cancel_capacity, e->n_cancels + 1, sizeof *e->cancels);
    if (status == OURO_OK) e->cancels[e->n_cancels++] = id;
    pthread_mutex_unlock(&e->door);
    return status;
}

int ouro_engine_pending(ouro_engine *e)
{
    pthread_mutex_lock(&e->door);
    int n = e->pending;
    pthread_mutex_unlock(&e->door);
    return n;
}

/* What other threads left at the door. */
static int take_in(ouro_engine *e)
{
    ouro_request **end = &e->requests;
    while (*end) end = &(*end)->next;
    pthread_mutex_lock(&e->door);
    ouro_request *first = e->arrived;
    *end = first;
    e->arrived = NULL;
    e->arrived_end = &e->arrived;
    for (int i = 0; i < e->n_cancels; i++)
        for (ouro_request *r = e->requests; r; r = r->next)
            if (r->id == e->cancels[i]) r->cancelled = true;
    e->n_cancels = 0;
    pthread_mutex_unlock(&e->door);
    int status = OURO_OK;
    for (ouro_request *r = first; status == OURO_OK && r; r = r->next)
        status = ouro_note(e, OURO_LINE_ARRIVE, r->id, r->n_prompt, r->depth, -1);
    return status;
}

static int drop_cancelled(ouro_engine *e)
{
    int status = OURO_OK;
    for (ouro_request *r = e->requests, *next; r; r = next) {
        next = r->next;
        if (!r->cancelled) continue;
        if (status == OURO_OK) status = ouro_note(e, OURO_LINE_CANCEL, r->id, r->seq.n_tokens, -1, -1);
        ouro_end_request(e, r, OURO_FINISH_CANCELLED, OURO_OK);
    }
    return status;
}

int ouro_admit(ouro_engine *e)
{
    int running = 0, started = 0, status = take_in(e);
    if (status == OURO_OK) status = drop_cancelled(e);
    for (ouro_request *r = e->requests; r; r = r->next) running += r->running;
    for (ouro_request *r = e->requests; status == OURO_OK && r; r = r->next) {
        if (r->running) continue;
        /* first come, first served: a large request is not overtaken for ever by small ones */
        if (running >= e->options.max_lanes || r->reserved > e->options.max_cache_bytes - e->reserved) break;
        r->running = true;
        r->turn = ++e->turn;
        e->reserved += r->reserved;
        running++, started++;
        status = ouro_note(e, OURO_LINE_START, r->id, -1, -1, -1);
    }
    pthread_mutex_lock(&e->door);
    e->waiting -= started;
    pthread_mutex_unlock(&e->door);
    return status;
}
