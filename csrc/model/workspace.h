/* workspace.h - the scratch memory of passes, and the threads that run them. One workspace runs one pass at a time.
 *
 * Every buffer is sized for `lanes` rows and grows when a pass has more. Shapes are in the comments; a row of
 * activations is padded as kernels.h asks.
 */
#ifndef OURO_MODEL_WORKSPACE_H
#define OURO_MODEL_WORKSPACE_H

#include <stdatomic.h>

#include "base/pool.h"
#include "base/stock.h"
#include "model/lane.h"

#define OURO_ATTEND_ROWS 64      /* query rows that one attention unit works on at once; at least MAX_GROUP */
#define OURO_BLAS_TILES 8        /* tiles unpacked for one sgemm */
#define OURO_READOUT_ROWS 32     /* states that one readout sweep of the head carries */
#define OURO_KEPT_PAGES ((size_t)1 << 30)

/* A run of lanes that attention handles as one unit: same pages, no side, at most ATTEND_ROWS query rows a kv head. */
typedef struct ouro_span { int begin, end; } ouro_span;

typedef struct ouro_workspace {
    const ouro_model *model;
    ouro_pool *pool;                 /* owned */
    ouro_kv_layout kv;
    ouro_stock pages;                /* cache pages that no request holds now, at most KEPT_PAGES bytes */
    int *all_layers;                 /* [n_layers] 0, 1, ...: the order of a plain sweep */
    int lanes;                       /* rows allocated */
    ouro_acts x_model, x_heads, x_mlp;   /* inputs of products: cols d_model, n_heads * d_head, d_mlp */
    float *qkv;                      /* [lanes][(H + 2 Hkv) * head_pad] f32 */
    float *z;                        /* [lanes][H * d_head] f32, attention output */
    float *y;                        /* [lanes][d_model padded to 16] f32, what a block adds */
    float *mlp;                      /* [lanes][d_mlp padded to 16] f32, integer computes only */
    float *rope;                     /* [lanes][2][d_head / 2] f32: cos, sin of the lane's position */
    ouro_span *spans;                /* [lanes] */
    ouro_acts x_state;               /* [READOUT_ROWS] states, input of the head, allocated with logits */
    float *logits;                   /* [READOUT_ROWS][d_vocab padded to 16] f32, allocated by the first readout */
    int n_threads;
    uint8_t **scratch;               /* [n_threads] attention scratch, see attention.c */
    float **blas_scratch;            /* [n_threads] unpacked tiles, then gate/up rows; NULL without BLAS */
    int blas_cols;                   /* the longest row of any matrix */
    ouro_work work[2];               /* alternate from phase to phase */
    atomic_uchar *half_done;         /* [n_kv_heads] 1: the key or the value head of a pair is there (block.c) */
    atomic_int cancelled;
    struct ouro_seen *seen;          /* what observed passes need more (seen.h); NULL before the first */
    const uint64_t *want;            /* [n_layers + 1] points of each layer, then of the step; NULL: nobody looks */
    size_t bytes;                    /* all of the above, for `ouro info` */
} ouro_workspace;

int ouro_workspace_new(const ouro_model *m, ouro_kv_dtype kv, int n_threads, ouro_workspace **out);
void ouro_workspace_free(ouro_workspace *ws);
int ouro_workspace_reserve(ouro_workspace *ws, int lanes);
int ouro_workspace_reserve_logits(ouro_workspace *ws);
/* Bytes that can still be used; where they are fewer than `need`, pages that are kept are given back first. */
size_t ouro_workspace_available(ouro_workspace *ws, size_t need);

/* points of a layer (n_layers: of the step) that some lane's observer wants */
static inline uint64_t ouro_wanted(const ouro_workspace *ws, int layer) { return ws->want ? ws->want[layer] : 0; }

/* strides in floats */
static inline size_t ouro_qkv_stride(const ouro_config *c)
{
    return (size_t)(c->n_heads + 2 * c->n_kv_heads) * (size_t)ouro_head_pad(c);
}
static inline size_t ouro_y_stride(const ouro_config *c) { return (size_t)ouro_round_up(c->d_model, OURO_TILE); }
static inline size_t ouro_mlp_stride(const ouro_config *c) { return (size_t)ouro_round_up(c->d_mlp, OURO_TILE); }
static inline size_t ouro_logits_stride(const ouro_config *c) { return (size_t)ouro_round_up(c->d_vocab, OURO_TILE); }

#endif
