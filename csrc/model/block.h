/* block.h - one shared layer over the lanes of a pass; see block.c. */
#ifndef OURO_MODEL_BLOCK_H
#define OURO_MODEL_BLOCK_H

#include "model/crew.h"

/* cos and sin of every lane's position, into ws->rope */
void ouro_block_angles(crew *c, const ouro_lane *lanes, int n);

/* h += what the layer before left in ws->y (layer > 0), then the whole of `layer` but its last addition */
void ouro_block(crew *c, const ouro_lane *lanes, int n, int n_spans, int layer);

/* h += what layer `layer` left in ws->y, for one lane */
void ouro_block_close(ouro_workspace *ws, const ouro_lane *lane, int i, int layer);

/* one row x [n] f32 in the form its product multiplies */
void ouro_prepare(const ouro_kernels *k, ouro_acts *x, int lane, const float *row, int n);

#endif
