/* speculate.c - guesses: when they pay, where they start, how often they were right; see engine.h. */
#include "engine/inside.h"

#include "ouro_status.h"

#define FREE_LANES 6             /* lanes of a pass that cost next to nothing: room for guesses */
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
void ouro_keep_pace(const ouro_model *m, ouro_request *r, int passes)
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

void ouro_spawn(ouro_engine *e)
{
    int lanes = total_lanes(e);
    for (ouro_request *r = e->requests; r; r = r->next)
        if (r->running && ouro_guessing(r)) spawn(e, r, &lanes);
}
