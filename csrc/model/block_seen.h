/* block_seen.h - the phases of a layer with their insides in memory; see block_seen.c. */
#ifndef OURO_MODEL_BLOCK_SEEN_H
#define OURO_MODEL_BLOCK_SEEN_H

#include "model/block.h"
#include "model/observe.h"

/* Which points make which phase of ouro_block take its slow path. */
#define OURO_SEES_CLOSE (OURO_BIT(OURO_P_LN2_POST_SCALE) | OURO_BIT(OURO_P_LN2_POST) | OURO_BIT(OURO_P_MLP_OUT) \
                         | OURO_BIT(OURO_P_RESID_POST))
#define OURO_SEES_ENTER (OURO_BIT(OURO_P_RESID_PRE) | OURO_BIT(OURO_P_LN1_SCALE) | OURO_BIT(OURO_P_LN1))
#define OURO_SEES_QKV (OURO_BIT(OURO_P_Q) | OURO_BIT(OURO_P_K) | OURO_BIT(OURO_P_V) | OURO_BIT(OURO_P_ROT_Q) \
                       | OURO_BIT(OURO_P_ROT_K))
#define OURO_SEES_MIDDLE (OURO_BIT(OURO_P_LN1_POST_SCALE) | OURO_BIT(OURO_P_LN1_POST) | OURO_BIT(OURO_P_ATTN_OUT) \
                          | OURO_BIT(OURO_P_RESID_MID) | OURO_BIT(OURO_P_LN2_SCALE) | OURO_BIT(OURO_P_LN2))
#define OURO_SEES_MLP (OURO_BIT(OURO_P_MLP_PRE) | OURO_BIT(OURO_P_MLP_PRE_LINEAR) | OURO_BIT(OURO_P_MLP_POST))

/* before the first layer: embedding and what the step starts from */
void ouro_seen_open(crew *c, const ouro_sweep *sweep, const ouro_lane *lanes, int n);
void ouro_seen_enter(crew *c, const ouro_lane *lanes, int n, ouro_place at);
void ouro_seen_qkv(crew *c, const ouro_lane *lanes, int n, ouro_place at);
void ouro_seen_attend(crew *c, const ouro_lane *lanes, int n, int n_spans, ouro_place at);
/* shows z and prepares it for the output projection */
void ouro_seen_z(crew *c, const ouro_lane *lanes, int n, int layer);
/* behind the output projection, whose inputs are still in ws->x_heads */
void ouro_seen_result(crew *c, const ouro_lane *lanes, int n, int layer);
void ouro_seen_middle(crew *c, const ouro_lane *lanes, int n, int layer);
void ouro_seen_mlp(crew *c, const ouro_lane *lanes, int n, int layer);
/* behind layer `last` (-1: none ran): its addition, and the end of the step if there is one */
void ouro_seen_boundary(crew *c, const ouro_sweep *sweep, ouro_lane *lanes, int n, int last);

#endif
