/* cost.c - see cost.h. */
#include "engine/cost.h"

/* Moves to what is seen by an eighth, so that one disturbed pass decides nothing. */
static void smooth(double *x, double seen)
{
    if (*x == 0.0) *x = seen;
    else *x += ((seen > 2.0 * *x ? 2.0 * *x : seen) - *x) / 8.0;
}

static int bin(int lanes) { return lanes < 1 ? 1 : lanes < OURO_COST_LANES ? lanes : OURO_COST_LANES; }

void ouro_cost_saw_pass(ouro_cost *c, int lanes, double seconds)
{
    if (lanes >= 1 && lanes <= OURO_COST_LANES) smooth(&c->pass[lanes], seconds);
}

void ouro_cost_saw_readout(ouro_cost *c, double seconds) { smooth(&c->readout, seconds); }

double ouro_cost_lanes(const ouro_cost *c, int lanes, int without)
{
    double with = c->pass[bin(lanes)], base = c->pass[bin(without)];
    return with > 0.0 && base > 0.0 ? with / base : 1.0;
}

double ouro_cost_readout(const ouro_cost *c, const ouro_model *m)
{
    if (c->pass[1] > 0.0 && c->readout > 0.0) return c->readout / c->pass[1];
    const ouro_layer *y = m->layers;
    size_t layer = ouro_matrix_bytes(&y->qkv) + ouro_matrix_bytes(&y->o) + ouro_matrix_bytes(&y->gate_up) + ouro_matrix_bytes(&y->down);
    return (double)ouro_matrix_bytes(&m->head) / ((double)layer * (double)m->config.n_layers);
}
