/* lane.h - one row of work, and a pass over many.
 *
 * A lane is (sequence, position, step, hidden state). A pass sweeps the shared layers once over a set of lanes, each at
 * its own step, and moves every lane one step on: its row h goes in as the state of the step before (or the embedding)
 * and comes out as RMS(h; norm), the state of this step, with its exit-gate logit.
 *
 * What a lane reads and writes of the cache is named by pointers, so that the arithmetic knows no sequence: `pages` are
 * the pages of its own step. Keys and values of positions before `pos` must be in those pages or come with the same
 * pass. A speculative lane keeps its keys and values in a side row and sees those of its guessed ancestors as a chain.
 *
 * The result of a lane never depends on the other lanes of the pass, on their number or on the threads.
 */
#ifndef OURO_MODEL_LANE_H
#define OURO_MODEL_LANE_H

#include <stdbool.h>

#include "base/pool.h"
#include "model/kv.h"
#include "model/observe.h"

/* Keys and values of one guessed position at the lane's step, outside of the pages. */
typedef struct ouro_side {
    int pos;
    uint8_t *rows;                   /* [layer][kv head][K, V] side rows of this lane's step */
    const struct ouro_side *parent;  /* the guessed position before this one, or NULL */
} ouro_side;

typedef struct ouro_lane {
    int pos, step;
    float *h;                        /* [d_model] f32, in and out */
    uint8_t *const *pages;           /* [pos / 64 + 1] pages of this (sequence, step) */
    const ouro_side *side;           /* NULL: keys and values go to the pages; else there (side->pos == pos) */
    float gate;                      /* out: exit gate logit of this step */
    int first_layer;                 /* place in the sweep where the lane joins with h as that layer's input; else 0 */
    const ouro_observer *observer;   /* NULL: nobody looks */
    int row;                         /* for the observer: which sequence of its batch */
    bool keys_only;                  /* nobody wants the state: the last layer leaves keys and values, h and gate are undefined */
} ouro_lane;

/* the row of lane i out of the rows of lanes [n] */
static inline ouro_rows ouro_row_of(const ouro_rows *rows, const ouro_lane *lanes, int i)
{
    ouro_rows row = *rows;
    row.data = rows->data ? rows->data + (size_t)i * rows->stride : lanes[i].h;
    if (!row.cols) row.cols = lanes[i].pos + 1;
    return row;
}

struct ouro_workspace;

/* What one pass does: which layers, in which order, and what stands before and behind them. NULL: all of the above.
 * Keys and values of place k of `layers` are those of layer k in the lane's pages. */
typedef struct ouro_sweep {
    const int *layers;               /* [n_layers] */
    int n_layers;                    /* 0 to the model's */
    bool embeds;                     /* rows of step 0 are embeddings */
    bool opens, closes;              /* it begins a step; it ends one: shared norm and gate */
} ouro_sweep;

/* One pass over lanes [n], sorted by first_layer, those of keys_only (which no observer may watch) behind all others. Lanes
 * that share `pages` and have no side should stand next to each other, by ascending position: they are attended together.
 * `poll` (may be NULL) is asked by the calling thread once a layer; not 0 ends the pass with OURO_ERR_CANCELLED, leaving the
 * states undefined and the cache valid below the lanes' positions. */
typedef int (*ouro_poll_fn)(void *arg);
int ouro_pass(struct ouro_workspace *ws, ouro_lane *lanes, int n, ouro_poll_fn poll, void *poll_arg);
int ouro_pass_sweep(struct ouro_workspace *ws, const ouro_sweep *sweep, ouro_lane *lanes, int n, ouro_poll_fn poll,
                    void *poll_arg);

/* A readout of one state: z = W_head state. Each pointer may be NULL when it is not wanted. */
typedef struct ouro_readout {
    const float *state;              /* [d_model] f32 */
    float *logits;                   /* [d_vocab] f32 */
    float *entropy;                  /* scalar, nats */
    float *log_z;                    /* scalar, log sum exp of the logits */
    int32_t *argmax;                 /* scalar, the first of the largest */
} ouro_readout;
int ouro_read_out(struct ouro_workspace *ws, const ouro_readout *rows, int n, ouro_poll_fn poll, void *poll_arg);

/* entropy, log_z and argmax once more, from logits that were changed */
void ouro_readout_again(const ouro_model *m, const ouro_readout *r);

/* lanes of h [d_model] from token ids */
void ouro_embed(const ouro_model *m, int32_t token, float *h);

#endif
