/* node.h - a position whose readout is watched: the last known token of a request, or a guess that follows it.
 *
 * Nodes of a request form a tree below its lead. A node that is not speculative has its keys and values in the pages;
 * a speculative one may have them there as well, or in side rows, step by step, and sees those of its ancestors that
 * have them there. Under a cache policy (policy.h) every new token's are in side rows until it is decided.
 */
#ifndef OURO_ENGINE_NODE_H
#define OURO_ENGINE_NODE_H

#include "engine/engine.h"

typedef struct ouro_node {
    struct ouro_node *next;              /* list of the request, parents before children */
    struct ouro_node *parent;            /* the speculative or leading node this one follows; NULL once it is real */
    int pos;
    int32_t token;
    int step;                            /* steps run so far */
    bool speculative, doomed;
    bool looked_up;                      /* guessed from the sequence's repeats */
    float *h;                            /* [d_model] state of the last step run (or the embedding) */
    float *before, *before2;             /* [d_model] states one and two steps earlier, when the exit rule asks */
    float *z_before;                     /* [d_vocab] logits of the step before, when the exit rule asks */
    double log_z_before;
    float *mixed;                        /* [d_vocab] sum of pdf-weighted logits (weighted_exit) */
    uint8_t *rows;                       /* [n_steps][side_bytes] side rows; NULL: keys and values go to the pages */
    ouro_side side[OURO_MAX_STEPS];      /* one per step */

    ouro_exit_track track;
    ouro_exit_signal signal;
    float exit_pdf[OURO_MAX_STEPS];
    bool leaves;                         /* the rule lets it go after the step just run */
    bool decided;
    ouro_event event;                    /* filled when decided */
    int32_t guess[OURO_MAX_STEPS];       /* what the readout of each step would have chosen; -1: not read */
} ouro_node;

#endif
