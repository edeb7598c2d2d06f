/* attention.h - causal attention of lanes over cache pages; see attention.c. */
#ifndef OURO_MODEL_ATTENTION_H
#define OURO_MODEL_ATTENTION_H

#include "model/workspace.h"

size_t ouro_attention_scratch_bytes(const ouro_workspace *ws);

/* Groups lanes [n] into spans; returns their number. */
int ouro_attention_spans(const ouro_lane *lanes, int n, int heads_per_kv, ouro_span *spans);

/* z rows of the span's lanes, for the query heads of kv head `head`, from roped q in ws->qkv. */
void ouro_attend(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int layer, int head, int thread);

#endif
