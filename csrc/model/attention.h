/* attention.h - causal attention of lanes over cache pages; see attention.c. */
#ifndef OURO_MODEL_ATTENTION_H
#define OURO_MODEL_ATTENTION_H

#include "model/workspace.h"

size_t ouro_attention_scratch_bytes(const ouro_workspace *ws);

/* Groups lanes [n] into spans; returns their number. */
int ouro_attention_spans(const ouro_lane *lanes, int n, int heads_per_kv, ouro_span *spans);

/* Units [begin, end) of attention, unit u being kv head u % n_kv_heads of span u / n_kv_heads of ws->spans: z rows of the span's
 * lanes for the query heads of that kv head, from roped q in ws->qkv. `slot`: the layer of the pages whose keys and values are
 * read. Heads of a span that a thread takes together are read together. */
void ouro_attend(ouro_workspace *ws, const ouro_lane *lanes, int begin, int end, int slot, int thread);
/* How many units a thread should take at a time: for lanes that are a span each, several; n lanes, n_spans spans. */
int ouro_attend_at_once(int n, int n_spans);

/* One span at one kv head in three pieces with ws->seen's scores and pattern between them; the bits of ouro_attend for every lane
 * whose scores were left alone and whose pattern is not marked in `changed` ([lanes] or NULL). */
void ouro_attend_scores(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread);
void ouro_attend_pattern(ouro_workspace *ws, const ouro_lane *lane, int i);
void ouro_attend_values(ouro_workspace *ws, const ouro_lane *lanes, ouro_span span, int slot, int head, int thread,
                        const uint8_t *changed);

#endif
