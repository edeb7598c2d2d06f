/* forks.h - many variants of one run that share its beginning: what patching sweeps are made of.
 *
 * A base run goes through all steps once and keeps its keys and values and the input of every layer. A fork repeats it
 * with rows of one point replaced, and starts where it first differs: at its first (step, layer), from the base's rows,
 * with lanes for its first position and those behind it only. Forks at different steps and layers share passes.
 *
 * A fork's result has the bits of a whole run with the same replacement: its lanes do the same arithmetic on the same
 * numbers, and a lane never depends on its company.
 */
#ifndef OURO_ENGINE_FORKS_H
#define OURO_ENGINE_FORKS_H

#include "engine/cache.h"
#include "model/workspace.h"

/* Rows of `point` are replaced at steps [step0, step1), layers [layer0, layer1), positions [pos0, pos1), in head `head`
 * or all of them (-1). The point is one of a layer, and has rows of a width that does not depend on the position. */
typedef struct ouro_fork {
    int32_t point, step0, step1, layer0, layer1, pos0, pos1, head;
} ouro_fork;

/* What the rows are replaced with: [n_steps][n_layers][pos][heads][cols] f32, dense; not owned. */
typedef struct ouro_fork_source {
    const float *data;
    int n_steps, n_layers, pos, heads, cols;
} ouro_fork_source;

typedef struct ouro_forks ouro_forks;

/* Runs the base: tokens [n], and embeddings [n][d_model] f32 in place of theirs when not NULL. */
int ouro_forks_new(ouro_workspace *ws, const int32_t *tokens, int n, int n_steps, const float *embeddings, int max_lanes,
                   ouro_poll_fn poll, void *poll_arg, ouro_forks **out);
void ouro_forks_free(ouro_forks *f);
/* States of the base [n_steps][n][d_model] f32; owned by f. */
const float *ouro_forks_states(const ouro_forks *f);

/* Runs forks [n_forks] and writes the states after the last step of positions out_pos [n_out] to
 * states [n_forks][n_out][d_model] f32. max_bytes bounds the keys and values of forks that run at once (at least one
 * runs). lane_layers (may be NULL) counts lanes times layers: the work that was done. */
int ouro_forks_run(ouro_forks *f, const ouro_fork *forks, int n_forks, const ouro_fork_source *source, const int32_t *out_pos,
                   int n_out, int max_lanes, size_t max_bytes, float *states, int64_t *lane_layers, ouro_poll_fn poll, void *poll_arg);

#endif
