/* exit_trace.h - exit rules over the states of a trace: after which step each position would have left. */
#ifndef OURO_ENGINE_EXIT_TRACE_H
#define OURO_ENGINE_EXIT_TRACE_H

#include "engine/exit.h"
#include "model/workspace.h"

typedef struct ouro_exit_trace {
    const float *states;             /* [n_steps][n][d_model] */
    const float *gate_logit;         /* [n_steps][n] */
    int n, n_steps;                  /* positions, of any sequences; steps that were run */
    int32_t *exit_step;              /* [n] out, 0-based */
} ouro_exit_trace;

/* The rule, its signals and its arithmetic are those of the engine: bit for bit the steps at which generation would have left
 * with the same states. OURO_ERR_STATE when a custom rule failed. */
int ouro_exit_trace_run(ouro_workspace *ws, const ouro_exit_rule *rule, const ouro_exit_trace *x, ouro_poll_fn poll,
                        void *poll_arg);

#endif
