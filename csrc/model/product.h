/* product.h - a matrix product of a pass: own kernels, or BLAS where the model allows it; see product.c. */
#ifndef OURO_MODEL_PRODUCT_H
#define OURO_MODEL_PRODUCT_H

#include "model/workspace.h"

/* out[i * stride + 16 tile + r] for lanes [0, n), tiles [tile0, tile1) of w */
void ouro_product(ouro_workspace *ws, int thread, const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x,
                  int n, float *out, size_t stride);

/* silu(gate) * up of ws->x_model into ws->x_mlp (float computes) or ws->mlp (integer computes), pairs [pair0, pair1) */
void ouro_product_swiglu(ouro_workspace *ws, int thread, const ouro_matrix *w, int pair0, int pair1, int n);

#endif
