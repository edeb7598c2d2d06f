/* seen.h - the memory of observed passes, and the phases that show rows to observers. */
#ifndef OURO_MODEL_SEEN_H
#define OURO_MODEL_SEEN_H

#include "model/crew.h"

/* Buffers that only observed passes have; each is allocated when a point first needs it. */
typedef struct ouro_seen {
    uint64_t *want;                  /* [n_layers + 1] */
    uint8_t *changed;                /* [lanes] the row shown last was changed */
    float *scalars;                  /* [lanes] f32: scales, gate logits */
    float *normed;                   /* [lanes][d_model padded] f32 */
    float *gate_up;                  /* [lanes][4][d_mlp padded] f32: both in turns, gate, up */
    float *scores, *pattern;         /* [lanes][H][sources] f32 */
    float *result;                   /* [lanes][H][d_model padded] f32 */
    ouro_acts one_head;              /* x_heads with all heads but one blanked */
    size_t sources;                  /* positions, padded to blocks */
    size_t sizes[6];                 /* floats allocated, from `scalars` to `result` */
    int lanes;                       /* rows of `changed` and `one_head` */
    bool meets;                      /* some lane's observer wants them together */
} ouro_seen;

void ouro_seen_free(ouro_seen *s);

/* Asks the observers of lanes [n] and makes room. Sets ws->want, or NULL when no lane has an observer. */
int ouro_seen_begin(ouro_workspace *ws, const ouro_lane *lanes, int n);

/* Something done to lane i of a pass, and the point that its row shows then. */
typedef struct ouro_stage {
    void (*work)(ouro_workspace *ws, const ouro_lane *lane, int i, ouro_point point, int layer);    /* NULL: nothing is done */
    ouro_point point;                /* OURO_N_POINTS: nothing is shown */
} ouro_stage;

#define OURO_MAX_STAGES 8            /* of one call */

/* All stages for lanes [n]. Where nobody meets, a lane goes through all of them while its rows are in the first cache;
 * else each is a phase, behind which the observers meet. changed[i] tells the next stage whether the row just shown was
 * changed. `layer` n_layers: of the step. */
void ouro_stages(crew *c, const ouro_lane *lanes, int n, int layer, const ouro_stage *stages, int n_stages);

/* One point, with nothing done before. Costs nothing when no one wants it; true when someone did: changed[i] is valid for
 * lane i behind the next barrier. */
bool ouro_see(crew *c, const ouro_lane *lanes, int n, ouro_point point, int layer);

/* The same outside of a pass, on the calling thread, for points that belong to no layer; changed [n]. */
int ouro_show(const ouro_lane *lanes, int n, ouro_point point, ouro_rows rows, uint8_t *changed);

#endif
