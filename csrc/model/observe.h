/* observe.h - what may look into a pass, and change what it sees.
 *
 * A lane may carry an observer. A pass asks it once which points of which layers it wants, and at each of those the
 * layer takes a path that has the rows of that point in memory (block_seen.c) and shows them: first lane by lane, from
 * all threads (`visit`), then all lanes together, from the calling thread (`meet`). What is not wanted is not touched,
 * and a row that is only read leaves every result with the bits it would have had: the paths differ in what they keep,
 * not in what they compute.
 *
 * The points stand in the order in which a step passes them. H, Hkv, dh, f, d, V as in config.h.
 */
#ifndef OURO_MODEL_OBSERVE_H
#define OURO_MODEL_OBSERVE_H

#include <stddef.h>
#include <stdint.h>

typedef enum ouro_point {
    OURO_P_EMBED,                /* [d] step 0 only: the embedding */
    OURO_P_STEP_PRE,             /* [d] what a step starts from */
    OURO_P_RESID_PRE,            /* [d] from here on: of a layer */
    OURO_P_LN1_SCALE,            /* [1] sqrt(mean(x^2) + eps) */
    OURO_P_LN1,                  /* [d] normed and weighted */
    OURO_P_Q, OURO_P_K, OURO_P_V,                        /* [H | Hkv][dh] before the rotation */
    OURO_P_ROT_Q, OURO_P_ROT_K,                          /* [H | Hkv][dh] after it */
    OURO_P_SCORES,               /* [H][pos + 1] scaled, before the softmax */
    OURO_P_PATTERN,              /* [H][pos + 1] after it */
    OURO_P_Z,                    /* [H][dh] */
    OURO_P_RESULT,               /* [H][d] each head's share of the output projection */
    OURO_P_LN1_POST_SCALE, OURO_P_LN1_POST,              /* [1], [d] */
    OURO_P_ATTN_OUT,             /* [d] what attention adds */
    OURO_P_RESID_MID,            /* [d] */
    OURO_P_LN2_SCALE, OURO_P_LN2,                        /* [1], [d] */
    OURO_P_MLP_PRE, OURO_P_MLP_PRE_LINEAR,               /* [f] gate, up */
    OURO_P_MLP_POST,             /* [f] silu(gate) * up */
    OURO_P_LN2_POST_SCALE, OURO_P_LN2_POST,              /* [1], [d] */
    OURO_P_MLP_OUT,              /* [d] what the feed-forward adds */
    OURO_P_RESID_POST,           /* [d] */
    OURO_P_STEP_POST,            /* [d] from here on: of a step; before the shared norm */
    OURO_P_LN_FINAL_SCALE, OURO_P_LN_FINAL,              /* [1], [d] the state */
    OURO_P_GATE,                 /* [1] exit gate logit */
    OURO_P_LOGITS,               /* [V] not part of a pass: shown by whoever reads out */
    OURO_N_POINTS
} ouro_point;

#define OURO_BIT(point) ((uint64_t)1 << (point))
#define OURO_ATTENTION_POINTS (OURO_BIT(OURO_P_SCORES) | OURO_BIT(OURO_P_PATTERN))

/* Rows of lanes at one point: lane i at data + i * stride, its head j at + j * head_stride. data NULL: every lane's h.
 * cols 0: as many as the lane has sources, pos + 1. */
typedef struct ouro_rows {
    float *data;
    size_t stride, head_stride;      /* in floats */
    int heads, cols;
} ouro_rows;

struct ouro_lane;

typedef struct ouro_observer {
    /* Points of (step, layer) that visit or meet want, as bits; layer -1: those of a step. */
    uint64_t (*wants)(const struct ouro_observer *o, int step, int layer);
    /* One lane's row, rows->data being its first element; from any thread, which calls the kernels' keep_done before the others
     * go on. 1 when it was changed. */
    int (*visit)(const struct ouro_observer *o, const struct ouro_lane *lane, ouro_point point, int layer, const ouro_rows *row);
    /* All lanes [n] of the pass that carry this observer or another; NULL: not wanted. changed[i] is set for what was
     * changed. Not 0 ends the pass as a poll would. */
    int (*meet)(const struct ouro_observer *o, const struct ouro_lane *lanes, int n, ouro_point point, int layer,
                const ouro_rows *rows, uint8_t *changed);
} ouro_observer;

#endif
