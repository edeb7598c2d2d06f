/* schedule.c - which lanes ride in the next pass; see engine.h. No arithmetic. */
#include "engine/inside.h"

#include <string.h>

#include "ouro_status.h"

static int add_lane(ouro_engine *e, ouro_request *r, ouro_node *n, int row, int pos, int step, float *h)
{
    int capacity = e->capacity;
    int status = ouro_grow(&e->lanes, &capacity, e->n_lanes + 1, sizeof *e->lanes);
    if (status == OURO_OK) status = ouro_grow(&e->riders, &e->capacity, e->n_lanes + 1, sizeof *e->riders);
    if (status != OURO_OK) return status;
    e->lanes[e->n_lanes] = (ouro_lane){.pos = pos, .step = step, .h = h, .pages = ouro_sequence_pages(&r->seq, step),
                                       .side = n && n->rows ? &n->side[step] : NULL};
    e->riders[e->n_lanes++] = (ouro_rider){r, n, row};
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
int ouro_gather(ouro_engine *e)
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
        if (status != OURO_OK) ouro_end_request(e, r, OURO_FINISH_FAILED, status);
        else if ((status = gather_request(e, r)) != OURO_OK) return status;
    }
    return OURO_OK;
}
