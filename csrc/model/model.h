/* model.h - the weights of a looped model, packed once, read only afterwards.
 *
 * One layer:   h += RMS(Attn(RMS(h; ln1)); ln1_post);   h += RMS(FFN(RMS(h; ln2)); ln2_post)
 * One step:    all layers, then h = RMS(h; norm).  The same weights serve every step.
 *
 * `compute` decides how a product is done: the format of the packed weights and the kind of activations.
 */
#ifndef OURO_MODEL_MODEL_H
#define OURO_MODEL_MODEL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "base/blas.h"
#include "base/mapping.h"
#include "kernels/kernels.h"
#include "model/config.h"

typedef enum ouro_compute { OURO_FLOAT32 = 0, OURO_BFLOAT16 = 1, OURO_COMPUTE_INT8 = 2, OURO_COMPUTE_INT4 = 3 } ouro_compute;

/* The tensors of a checkpoint, in the order of ouro_tensor_name (model/weights.c). */
typedef enum ouro_tensor {
    OURO_T_EMBED, OURO_T_HEAD, OURO_T_NORM, OURO_T_EXIT_W, OURO_T_EXIT_B,
    OURO_T_Q, OURO_T_K, OURO_T_V, OURO_T_O, OURO_T_GATE, OURO_T_UP, OURO_T_DOWN,
    OURO_T_LN1, OURO_T_LN1_POST, OURO_T_LN2, OURO_T_LN2_POST, OURO_N_TENSORS
} ouro_tensor;

typedef struct ouro_layer {
    ouro_matrix qkv;         /* heads of q, then k, then v; each head starts a tile: head_tiles tiles per head */
    ouro_matrix o;           /* [d_model] rows, cols n_heads * d_head */
    ouro_matrix gate_up;     /* tiles alternate gate, up */
    ouro_matrix down;        /* [d_model] rows, cols d_mlp */
    float *ln1, *ln1_post, *ln2, *ln2_post;    /* [d_model] f32 */
} ouro_layer;

typedef struct ouro_formats { ouro_format layers, o, down, head, embed; } ouro_formats;

typedef struct ouro_model {
    ouro_config config;
    ouro_compute compute;
    ouro_formats formats;
    ouro_act_kind act;           /* what a product multiplies */
    ouro_act_kind head_act;      /* what the readout multiplies: bf16 with a bf16 head, also in integer computes */
    ouro_format kv_format;       /* F32 or BF16: what attention multiplies */
    const ouro_kernels *kernels;
    ouro_blas *blas;             /* not NULL: exact=False; large f32 products may go there. Not owned */
    ouro_layer *layers;          /* [n_layers] */
    ouro_matrix embed, head;     /* head.data is embed.data when tied */
    float *norm, *exit_w;        /* [d_model] f32 */
    float exit_b;
    float *rope_inv_freq;        /* [d_head / 2] f32 */
    uint8_t *arena;              /* every packed matrix and vector lives here */
    size_t arena_bytes;
    ouro_map map;                /* the packed file that the arena is a part of; map.data NULL: the arena is our own */
    atomic_int *rows_seen;       /* [OURO_N_TENSORS + (n_layers - 1) * per-layer tensors] rows put so far */
    int ready;
} ouro_model;

/* Lays out and allocates a model whose weights come by ouro_model_put. Formats F32 or BF16 for the float
 * computes (F32 in float32 only), INT8 / INT4 for the integer ones, whose embedding and head are INT8 or BF16. isa NULL: the best. The caller frees with ouro_model_free. */
int ouro_model_new(const ouro_config *config, ouro_compute compute, const ouro_formats *formats, const char *isa,
                   ouro_model **out);
void ouro_model_free(ouro_model *m);

/* The two halves of ouro_model_new for weights that exist already (packed.c): everything but the arena, whose size is
 * arena_bytes; then the place of the arena, 64-byte aligned. */
int ouro_model_shape(const ouro_config *config, ouro_compute compute, const ouro_formats *formats, const char *isa,
                     ouro_model **out);
void ouro_model_place(ouro_model *m, uint8_t *arena);

/* Rows [row0, row0 + n_rows) of a tensor: data [n_rows][cols] of dtype, tightly packed. layer is ignored for the
 * tensors that no layer owns. Different rows may be put by different threads at the same time. */
int ouro_model_put(ouro_model *m, ouro_tensor tensor, int layer, ouro_dtype dtype, int row0, int n_rows,
                   const void *data);
/* The same for a matrix of a layer in INT4 that is quantised already: scales [n_rows][cols / 64, rounded up] bf16, q [n_rows][cols]. */
int ouro_model_put_int4(ouro_model *m, ouro_tensor tensor, int layer, int row0, int n_rows, const uint16_t *scales,
                        const int8_t *q);
/* The same rows back, as they are stored (dequantised): out [n_rows][cols] f32. A tied head is the embedding. */
int ouro_model_get(const ouro_model *m, ouro_tensor tensor, int layer, int row0, int n_rows, float *out);
/* Checks that every row of every tensor was put exactly as often as expected; the model is usable from here on. */
int ouro_model_finish(ouro_model *m);

/* rows and cols of a tensor as the checkpoint has it */
void ouro_tensor_shape(const ouro_config *c, ouro_tensor tensor, int *rows, int *cols);
const char *ouro_tensor_name(ouro_tensor tensor);

static inline int ouro_round_up(int n, int to) { return (n + to - 1) / to * to; }
static inline int ouro_head_tiles(const ouro_config *c) { return ouro_round_up(c->d_head, OURO_TILE) / OURO_TILE; }
/* d_head padded to whole tiles: the distance of heads in the rows of a q/k/v product */
static inline int ouro_head_pad(const ouro_config *c) { return ouro_head_tiles(c) * OURO_TILE; }

#endif
