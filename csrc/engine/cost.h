/* cost.h - what passes cost here and now, measured: it decides whether guessing pays, and never what comes out.
 *
 * Unit: one sweep of the layers with the lanes that are there anyway.
 */
#ifndef OURO_ENGINE_COST_H
#define OURO_ENGINE_COST_H

#include "model/model.h"

#define OURO_COST_LANES 16           /* passes of more lanes count as this many */

typedef struct ouro_cost {
    double pass[OURO_COST_LANES + 1];    /* [lanes] seconds, smoothed; 0: not seen yet */
    double readout;                      /* seconds of a sweep of the head */
} ouro_cost;

void ouro_cost_saw_pass(ouro_cost *c, int lanes, double seconds);
void ouro_cost_saw_readout(ouro_cost *c, double seconds);
/* A pass of `lanes` over one of `without`; 1 as long as one of the two was not seen. */
double ouro_cost_lanes(const ouro_cost *c, int lanes, int without);
/* A readout over a pass of one lane; the bytes of both until they were seen. */
double ouro_cost_readout(const ouro_cost *c, const ouro_model *m);

#endif
