/* signals.h - the numbers of one step that exit rules look at (exit.h), from states and readouts. Generation (decide.c) and
 * traces (exit_trace.c) take them from here, so a rule decides the same in both.
 */
#ifndef OURO_ENGINE_SIGNALS_H
#define OURO_ENGINE_SIGNALS_H

#include "engine/exit.h"
#include "model/lane.h"

/* An empty signal behind that of the step before, whose top token it remembers. */
void ouro_signal_begin(ouro_exit_signal *s);
/* What comes from the states [d_model] of this step, of the one before and of the one before that; s->step says how many of
 * them there are. before NULL: nothing. */
void ouro_signal_states(ouro_exit_signal *s, const float *h, const float *before, const float *before2, int d_model);
/* What comes from the readout. z_before [d_vocab] and log_z_before: the readout of the step before, replaced by this one;
 * NULL: no divergence is wanted. */
void ouro_signal_readout(ouro_exit_signal *s, const ouro_readout *read, float *z_before, double *log_z_before, int d_vocab);

#endif
