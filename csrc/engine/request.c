/* request.c - lifetimes of requests, prompt chunks and nodes; see request.h and node.h. No arithmetic, no schedule. */
#include "engine/request.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ouro_status.h"

int ouro_request_new(ouro_page_budget *budget, int64_t id, const int32_t *tokens, int n, const ouro_request_params *p,
                     ouro_request **out)
{
    ouro_request *r = calloc(1, sizeof *r);
    if (!r) return ouro_fail(OURO_ERR_MEMORY, "no memory for a request");
    r->id = id;
    r->params = *p;
    r->n_prompt = n;
    r->failed_pos = -1;
    r->depth = p->exit_at_step >= 0 ? p->exit_at_step + 1 : p->n_steps;
    r->params.exit.name = ouro_exit_known(p->exit.name);
    r->exit_needs = ouro_exit_needs(&p->exit);
    r->policy = r->depth > 1 ? p->kv_policy : OURO_POLICY_FULL;
    r->shares = r->policy != OURO_POLICY_AVERAGE;        /* which would need its own copy of every page to fold them */
    r->shares = r->shares && !p->observer;
    if (p->observer && p->observer->meet) r->params.speculate = OURO_SPECULATE_OFF;
    if (ouro_policy_waits(r->policy)) r->params.speculate = OURO_SPECULATE_OFF;
    r->pace.on = r->params.speculate != OURO_SPECULATE_OFF;
    r->reserved = ouro_policy_peak_bytes(r->policy, budget->layout, n, n + p->max_new_tokens, r->depth);
    r->stop_ids = malloc(((size_t)p->n_stop_ids + 1) * sizeof *r->stop_ids);
    r->follow = malloc(((size_t)p->n_follow + 1) * sizeof *r->follow);
    int status = r->stop_ids && r->follow ? ouro_sequence_init(&r->seq, budget, r->depth, tokens, n)
                             : ouro_fail(OURO_ERR_MEMORY, "no memory for a request");
    if (status != OURO_OK) {
        ouro_request_free(r);
        return status;
    }
    if (p->n_stop_ids) memcpy(r->stop_ids, p->stop_ids, (size_t)p->n_stop_ids * sizeof *r->stop_ids);
    if (p->n_follow) memcpy(r->follow, p->follow, (size_t)p->n_follow * sizeof *r->follow);
    r->params.stop_ids = r->stop_ids;
    r->params.follow = r->follow;
    *out = r;
    return OURO_OK;
}

static void node_free(ouro_node *n)
{
    free(n->h);
    free(n->before);
    free(n->before2);
    free(n->z_before);
    free(n->mixed);
    free(n->rows);
    free(n);
}

void ouro_request_free(ouro_request *r)
{
    while (r->nodes) {
        ouro_node *n = r->nodes;
        r->nodes = n->next;
        node_free(n);
    }
    free(r->chunk.h);
    free(r->stop_ids);
    free(r->follow);
    ouro_sequence_fini(&r->seq);
    free(r);
}

ouro_stats ouro_request_stats(const ouro_request *r)
{
    ouro_stats s = r->stats;
    int blocks = r->seq.n_blocks - (int)(s.prefix_tokens / OURO_BLOCK);
    s.cache_bytes = (int64_t)blocks * r->seq.n_rows * (int64_t)r->seq.budget->layout->page_bytes;
    return s;
}

int ouro_request_advance(ouro_request *r, const ouro_model *m, int most)
{
    int left = r->n_prompt - 1 - r->prefilled, n = left < most ? left : most;
    if (r->lead || r->chunk.n || (left > 0 && n <= 0)) return OURO_OK;
    int status = ouro_sequence_reserve(&r->seq, r->prefilled + n);
    if (status != OURO_OK) return status;
    if (n > 0) {
        size_t d = (size_t)m->config.d_model;
        r->chunk.h = malloc((size_t)n * d * sizeof(float));
        if (!r->chunk.h) return ouro_fail(OURO_ERR_MEMORY, "no memory for a chunk of %d positions", n);
        r->chunk.pos = r->prefilled;
        r->chunk.n = n;
        r->chunk.step = 0;
        for (int i = 0; i < n; i++) ouro_embed(m, r->seq.tokens[r->prefilled + i], r->chunk.h + (size_t)i * d);
        r->prefilled += n;
    }
    if (r->prefilled < r->n_prompt - 1) return OURO_OK;
    return ouro_node_new(r, m, r->n_prompt - 1, r->seq.tokens[r->n_prompt - 1], NULL, false, &r->lead);
}

/* ---- nodes --------------------------------------------------------------------------------------------------- */

/* Whether a node's keys and values must stay out of the pages. A guess may write to the slot behind a parent that is in
 * the pages itself, as long as no other guess holds that slot: nothing but its own successors looks there, and when it is
 * dropped the slot is written again before it is read. */
static bool stays_aside(const ouro_request *r, const ouro_node *n, const ouro_node *parent)
{
    if (r->policy != OURO_POLICY_FULL && n->pos >= r->n_prompt) return true;
    if (!n->speculative) return false;
    if (parent->rows) return true;
    for (const ouro_node *other = r->nodes; other; other = other->next)
        if (other->pos == n->pos && !other->rows) return true;
    return false;
}

static int node_buffers(ouro_node *n, const ouro_request *r, const ouro_model *m, bool aside)
{
    size_t d = (size_t)m->config.d_model * sizeof(float), v = (size_t)m->config.d_vocab * sizeof(float);
    int states = r->exit_needs & OURO_NEED_STATES, logits = r->exit_needs & OURO_NEED_LOGITS;
    n->h = malloc(d);
    if (states) n->before = malloc(d), n->before2 = malloc(d);
    if (logits) n->z_before = malloc(v);
    if (r->params.weighted_exit) n->mixed = calloc(1, v);
    if (aside) n->rows = malloc((size_t)r->depth * r->seq.budget->layout->side_bytes);
    return n->h && (!states || (n->before && n->before2)) && (!logits || n->z_before)
           && (!r->params.weighted_exit || n->mixed) && (!aside || n->rows);
}

int ouro_node_new(ouro_request *r, const ouro_model *m, int pos, int32_t token, ouro_node *parent, bool speculative,
                  ouro_node **out)
{
    int status = ouro_sequence_reserve(&r->seq, pos + 1);
    if (status != OURO_OK) return status;
    ouro_node *n = calloc(1, sizeof *n);
    if (n) n->speculative = speculative, n->pos = pos;
    if (!n || !node_buffers(n, r, m, stays_aside(r, n, parent))) {
        if (n) node_free(n);
        return ouro_fail(OURO_ERR_MEMORY, "no memory for a position");
    }
    n->token = token;
    n->parent = parent;
    ouro_embed(m, token, n->h);
    ouro_exit_begin(&n->track);
    n->signal.top_token = -1;
    for (int t = 0; t < OURO_MAX_STEPS; t++) {
        n->guess[t] = -1;
        n->exit_pdf[t] = NAN;
        if (!n->rows || t >= r->depth) continue;
        n->side[t].pos = pos;
        n->side[t].rows = n->rows + (size_t)t * r->seq.budget->layout->side_bytes;
        n->side[t].parent = parent && parent->rows ? &parent->side[ouro_policy_visible(r->policy, t)] : NULL;
    }
    ouro_node **end = &r->nodes;
    while (*end) end = &(*end)->next;
    *end = n;
    *out = n;
    return OURO_OK;
}

/* The node's keys and values are in the pages now: its side rows go, and its successors look there. */
static void drop_rows(ouro_request *r, ouro_node *n)
{
    free(n->rows);
    n->rows = NULL;
    for (ouro_node *c = r->nodes; c; c = c->next)
        for (int t = 0; c->parent == n && t < r->depth; t++) c->side[t].parent = NULL;
}

void ouro_node_commit(ouro_request *r, ouro_node *n)
{
    n->speculative = false;
    n->parent = NULL;
    if (r->policy != OURO_POLICY_FULL || !n->rows) return;
    for (int t = 0; t < n->step; t++) ouro_sequence_put(&r->seq, t, n->pos, n->side[t].rows);
    drop_rows(r, n);
}

void ouro_node_stop(ouro_request *r, ouro_node *n)
{
    if (r->policy == OURO_POLICY_FULL || !n->rows) return;     /* a prompt's last token runs all its steps */
    int ran = n->step;
    for (int t = ran; t < r->depth; t++) n->side[t].rows = n->side[ran - 1].rows;      /* what successors see there */
    n->step = r->depth;
}

int ouro_node_leave(ouro_request *r, ouro_node *n)
{
    if (ouro_request_unfolded(r)) return ouro_policy_fold(r->policy, &r->seq);
    if (!n->rows) return OURO_OK;
    uint8_t *sides[OURO_MAX_STEPS];
    for (int t = 0; t < r->depth; t++) sides[t] = n->side[t].rows;
    ouro_policy_keep(r->policy, &r->seq, n->pos, sides, n->event.exit_step + 1, r->depth);
    drop_rows(r, n);
    return OURO_OK;
}

ouro_node *ouro_node_child(const ouro_request *r, const ouro_node *parent, int32_t token)
{
    for (ouro_node *n = r->nodes; n; n = n->next)
        if (n->parent == parent && n->speculative && n->token == token) return n;
    return NULL;
}

int ouro_node_children(const ouro_request *r, const ouro_node *parent)
{
    int count = 0;
    for (const ouro_node *n = r->nodes; n; n = n->next) count += n->parent == parent && n->speculative;
    return count;
}

static void remove_doomed(ouro_request *r)
{
    for (ouro_node **at = &r->nodes; *at;) {
        ouro_node *n = *at;
        if (!n->doomed) {
            at = &n->next;
            continue;
        }
        *at = n->next;
        node_free(n);
    }
}

void ouro_request_prune(ouro_request *r, const ouro_node *keep)
{
    for (ouro_node *n = r->nodes; n; n = n->next) {
        if (!n->speculative || n == keep) continue;
        /* parents stand before children, so a parent's fate is known */
        n->doomed = !n->parent || n->parent->doomed || !(n->parent == keep || n->parent->speculative);
        r->stats.dropped += n->doomed;
    }
    remove_doomed(r);
}

void ouro_request_retire(ouro_request *r)
{
    for (ouro_node *n = r->nodes; n; n = n->next) n->doomed = !n->speculative && n != r->lead && n->step >= r->depth;
    remove_doomed(r);
}

int ouro_request_complete(const ouro_request *r)
{
    int n = r->lead ? r->lead->pos + (r->lead->step >= r->depth) : r->prefilled;
    if (r->chunk.n && r->chunk.pos < n) n = r->chunk.pos;
    for (const ouro_node *a = r->nodes; a; a = a->next)
        if (!a->speculative && a->step < r->depth && a->pos < n) n = a->pos;
    return n;
}

int ouro_request_shareable(const ouro_request *r)
{
    int blocks = ouro_request_complete(r) / OURO_BLOCK, prompt = r->n_prompt / OURO_BLOCK;
    if (!r->shares || r->seq.n_rows != r->depth) return 0;
    return r->policy == OURO_POLICY_FULL || blocks < prompt ? blocks : prompt;
}

int ouro_request_lanes(const ouro_request *r)
{
    int count = r->chunk.n;
    for (const ouro_node *n = r->nodes; n; n = n->next) count += n->step < r->depth;
    return count;
}

int ouro_request_guesses(const ouro_request *r)
{
    int count = 0;
    for (const ouro_node *n = r->nodes; n; n = n->next) count += n->speculative && n->step < r->depth;
    return count;
}

const int32_t *ouro_node_history(ouro_request *r, const ouro_node *n)
{
    /* guesses go behind the real tokens, where nothing lives yet; room was made when the sequence began */
    for (const ouro_node *a = n; a && a->speculative; a = a->parent)
        r->seq.tokens[a->pos] = a->token;
    return r->seq.tokens;
}
