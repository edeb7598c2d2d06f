/* block.h - one shared layer over the lanes of a pass; see block.c. */
#ifndef OURO_MODEL_BLOCK_H
#define OURO_MODEL_BLOCK_H

#include "model/crew.h"

/* A place in a sweep: which layer's weights, whose keys and values in the pages, and the layer that ran before (-1: none). */
typedef struct ouro_place { int layer, slot, before; } ouro_place;

/* cos and sin of every lane's position, into ws->rope */
void ouro_block_angles(crew *c, const ouro_lane *lanes, int n);

/* h += what the layer before left in ws->y (for lanes that ran it), then keys and values of all n lanes, and of the first
 * n_states, which are n_spans spans, the whole of the layer but its last addition */
void ouro_block(crew *c, const ouro_lane *lanes, int n, int n_states, int n_spans, ouro_place at);

/* h += what layer `layer` left in ws->y, for one lane */
void ouro_block_close(ouro_workspace *ws, const ouro_lane *lane, int i, int layer);

/* one row x [n] f32 in the form its product multiplies */
void ouro_prepare(const ouro_kernels *k, ouro_acts *x, int lane, const float *row, int n);

/* ---- parts that block_seen.c shares ---- */

/* rotates head `head` of q/k of lane i; puts keys and values of kv head `head` where the lanes keep them */
void ouro_block_rope(ouro_workspace *ws, int i, int head);
void ouro_block_store(ouro_workspace *ws, const ouro_lane *lanes, int n, int slot, int head);
/* phases: rows [n][stride] prepared into x; out [n][stride] = m x */
void ouro_block_prepare(crew *c, ouro_acts *x, const float *rows, size_t stride, int cols, int n);
void ouro_block_product(crew *c, const ouro_matrix *m, const ouro_acts *x, int n, float *out, size_t stride);

#endif
