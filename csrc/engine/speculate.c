/* speculate.c - guesses: when they pay, where they start, how often they were right; see engine.h. */
#include "engine/inside.h"

#include "engine/lookup.h"
#include "ouro_status.h"

#define FREE_LANES 6             /* lanes of a pass that cost next to nothing: room for guesses */
#define CHEAP_LANES 12           /* up to here a lane costs less than a guess brings that is mostly right */
#define MOST_GUESSES 3           /* successors of one node */

bool ouro_guessing(const ouro_request *r)
{
    return r->params.speculate != OURO_SPECULATE_OFF && r->pace.on && !ouro_request_unfolded(r);
}

void ouro_count_guesses(ouro_stats *s, const ouro_node *n, int32_t token)
{
    if (n->guess[0] < 0) return;
    s->first_tried++;
    s->first_right += n->guess[0] == token;
    if (n->guess[0] == token || n->guess[1] < 0) return;
    s->second_tried++;
    s->second_right += n->guess[1] == token;
}

/* Auto: speculation stays on while its passes cost less than plain decoding would have; after a loss it rests, then tries
 * again. A trial ends after three tokens when none of them came early, so that one without any gain costs a few readouts; and
 * whatever trials cost in all stays below half a token and a fiftieth of the text, so guesses that are never right cost no more. */
void ouro_keep_pace(const ouro_engine *e, ouro_request *r, int steps)
{
    const int short_trial = 3, trial = 6, rest = 24, longest_rest = 192;
    ouro_pace *p = &r->pace;
    if (r->params.speculate != OURO_SPECULATE_AUTO) return;
    int reads = r->params.weighted_exit || (r->exit_needs & OURO_NEED_READOUT) ? steps : 1;
    double plain = steps + reads * ouro_cost_readout(&e->cost, e->ws->model), spare = 0.5 * plain + 0.02 * p->all;
    p->tokens++;
    p->plain += plain;
    p->all += plain;
    double lost = p->lost + p->cost - p->plain;
    if (!p->on) {
        if (p->tokens >= p->rest && p->lost < spare) *p = (ouro_pace){.on = true, .rest = p->rest, .lost = p->lost, .all = p->all};
    } else if (lost > spare || (p->tokens == short_trial ? p->cost >= p->plain : p->tokens >= trial && p->cost >= 0.99 * p->plain)) {
        int next = p->rest == 0 ? rest : p->rest < longest_rest ? 2 * p->rest : longest_rest;
        *p = (ouro_pace){.rest = next, .lost = lost, .all = p->all};
    } else if (p->tokens >= trial) {
        p->lost = p->lost < 0.0 ? p->lost : 0.0;             /* it gains: what trials have cost is paid back */
        p->tokens /= 2, p->cost /= 2, p->plain /= 2, p->rest = 0;
    }
}

void ouro_count_pass(ouro_engine *e)
{
    int lanes = 0, guesses = 0, chunks = 0;
    for (const ouro_request *r = e->requests; r; r = r->next) {
        if (!r->running) continue;
        lanes += ouro_request_lanes(r);
        guesses += ouro_request_guesses(r);
        chunks += r->chunk.n > 0;
    }
    double cost = chunks ? 1.0 : ouro_cost_lanes(&e->cost, lanes, lanes - guesses);
    for (ouro_request *r = e->requests; r; r = r->next)
        if (r->running && r->produced) r->pace.cost += cost + ouro_cost_readout(&e->cost, e->ws->model);
}

/* Rows of decoding in the next pass. Those of a prompt do not count: they are many, and a few guesses more cost little. */
static int decoding_lanes(const ouro_engine *e)
{
    int lanes = 0;
    for (const ouro_request *r = e->requests; r; r = r->next) lanes += r->running ? ouro_request_lanes(r) - r->chunk.n : 0;
    return lanes;
}

/* Up to how many decoding lanes a pass gets guesses of a request: more when its step-0 readouts have been right three times of five. */
static int most_lanes(const ouro_request *r)
{
    int64_t tried = r->stats.first_tried, right = r->stats.first_right;
    return tried >= 8 && 5 * right >= 3 * tried ? CHEAP_LANES : FREE_LANES;
}

int ouro_lanes_to_come(const ouro_engine *e)
{
    int lanes = 0;
    for (const ouro_request *r = e->requests; r; r = r->next) {
        if (!r->running) continue;
        for (const ouro_node *n = r->nodes; n; n = n->next) lanes += n->step + 1 < r->depth;
        lanes += r->lead && r->lead->step + 1 >= r->depth;       /* another takes its place */
    }
    return lanes;
}

bool ouro_reads_to_guess(const ouro_request *r, int lanes) { return lanes < most_lanes(r) && ouro_guessing(r); }

/* The node's parent has changed its mind since it made this guess. */
static bool is_stale(const ouro_node *n)
{
    const ouro_node *p = n->parent;
    return n->speculative && p && !p->decided && p->step > 0 && p->guess[p->step - 1] >= 0 && p->guess[p->step - 1] != n->token;
}

void ouro_count_lookup(ouro_request *r, int32_t token)
{
    int32_t expected = ouro_guessing(r) ? ouro_lookup(r->seq.tokens, r->seq.n_tokens) : -1;
    r->looked_right = expected == token ? r->looked_right + 1 : 0;
}

/* What may follow a node: the choice of its last readout; of a node that has not run a step, what the repeats say, as many in a row
 * as they are trusted with. -1: nothing. */
static int32_t guess_behind(ouro_request *r, const ouro_node *n)
{
    if (n->decided) return n->event.token;
    if (n->step > 0) return n->guess[n->step - 1];
    int in_a_row = 0;
    for (const ouro_node *a = n; a && a->looked_up; a = a->parent) in_a_row++;
    if (in_a_row >= ouro_lookup_ahead(r->looked_right)) return -1;
    return ouro_lookup(ouro_node_history(r, n), n->pos + 1);
}

/* New guesses behind the nodes of a request, oldest first, while lanes are free. A guess that has been superseded runs on,
 * because it may have been right, but nothing new follows it. */
static void spawn(ouro_engine *e, ouro_request *r, int *lanes)
{
    int limit = r->n_prompt + r->params.max_new_tokens - 2, most = most_lanes(r);    /* limit: the last position that is ever run */
    for (ouro_node *n = r->nodes; n && *lanes < most; n = n->next) {
        if ((n != r->lead && !n->speculative) || n->pos >= limit || is_stale(n)) continue;
        bool looks_up = n->step == 0 && !n->decided;
        int32_t token = guess_behind(r, n);
        if (token < 0 || ouro_node_child(r, n, token) || ouro_node_children(r, n) >= MOST_GUESSES) continue;
        ouro_node *child;
        if (ouro_node_new(r, e->ws->model, n->pos + 1, token, n, true, &child) != OURO_OK) return;
        child->looked_up = looks_up;
        r->stats.guesses++;
        r->stats.lookups += looks_up;
        (*lanes)++;
    }
}

void ouro_spawn(ouro_engine *e)
{
    int lanes = decoding_lanes(e);
    for (ouro_request *r = e->requests; r; r = r->next)
        if (r->running && ouro_guessing(r)) spawn(e, r, &lanes);
}
