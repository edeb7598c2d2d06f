/* plan.h - a plan: what is read from a run, and what is changed in it, compiled before the run.
 *
 * A plan is a list of taps. Each names a point, the steps, layers, positions and heads where it applies, and an array
 * that rows are written to (OURO_TAP_READ) or taken from (the edits). At a point the edits come first, in the order in
 * which they were added; then the calls, on the thread that runs the pass; then the reads, which see what the model
 * goes on with.
 *
 *   ADD       x += a v            SET   x = v            SCALE  x = a x
 *   PROJECT   x -= a (x . u) u    NOISE x += a n,  n standard normal, a function of (seed, point, step, layer, pos,
 *                                 head, column) alone: the same in any batch and any row of one
 *
 * A plan is read only while passes use it, except for the arrays that reads fill.
 */
#ifndef OURO_TAP_PLAN_H
#define OURO_TAP_PLAN_H

#include "model/config.h"
#include "model/lane.h"

typedef enum ouro_tap_kind {
    OURO_TAP_READ, OURO_TAP_ADD, OURO_TAP_SET, OURO_TAP_SCALE, OURO_TAP_PROJECT, OURO_TAP_NOISE, OURO_TAP_CALL, OURO_N_TAPS
} ouro_tap_kind;

/* Rows of a run in memory: [step][layer][row][pos][head][cols]. An axis of size 1 serves every place of it. */
enum { OURO_AXIS_STEP, OURO_AXIS_LAYER, OURO_AXIS_ROW, OURO_AXIS_POS, OURO_AXIS_HEAD, OURO_TAP_AXES };
typedef struct ouro_tap_array {
    void *data;                      /* borrowed; f32, or bf16 for reads */
    int64_t size[OURO_TAP_AXES];
    ptrdiff_t stride[OURO_TAP_AXES]; /* in bytes */
    int cols;                        /* elements of a row; 1 serves every column of an edit */
    bool bf16;
} ouro_tap_array;

struct ouro_tap;
/* All lanes of a pass at the point of a CALL; not 0 ends the run. See ouro_observer.meet. */
typedef int (*ouro_tap_call)(void *arg, const ouro_lane *lanes, int n, ouro_point point, int layer, const ouro_rows *rows,
                             uint8_t *changed);

/* What ouro_plan_add is told; everything is copied but the arrays. */
typedef struct ouro_tap_spec {
    ouro_tap_kind kind;
    ouro_point point;
    const int *steps, *layers;       /* [n] in the order of the array's axis; layers NULL for points of a step */
    int n_steps, n_layers;
    const int32_t *pos_at;           /* [rows][n_pos] place along the array's pos axis, -1: not here; NULL: everywhere */
    int rows, n_pos;                 /* rows and positions beyond are left alone; rows 1 serves every row of an edit */
    const int *heads;                /* [n_heads] or NULL: all, in order */
    int n_heads;
    ouro_tap_array array;            /* data NULL when the kind needs none */
    float scale;
    uint64_t seed;
    ouro_tap_call call;
    void *call_arg;
} ouro_tap_spec;

typedef struct ouro_plan ouro_plan;

int ouro_plan_new(const ouro_config *c, const ouro_kernels *kernels, ouro_plan **out);
void ouro_plan_free(ouro_plan *p);
/* OURO_ERR_ARGUMENT when a step, layer, head or kind is out of range, OURO_ERR_SHAPE when the tap would reach beyond its
 * array. */
int ouro_plan_add(ouro_plan *p, const ouro_tap_spec *spec);
/* What lanes carry; valid until the plan is freed. Adding a tap may change it. */
const ouro_observer *ouro_plan_observer(const ouro_plan *p);

/* The normal deviate behind a 64-bit number: inverse of the distribution at (key + 1/2) 2^-53 (csrc/tap/noise.c). */
double ouro_normal(uint64_t key);
uint64_t ouro_noise_key(uint64_t seed, ouro_point point, int step, int layer, int pos, int head, int column);

#endif
