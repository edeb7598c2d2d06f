/* plan.c - plans compiled and carried out; see plan.h. */
#include "tap/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/math.h"
#include "model/workspace.h"
#include "ouro_status.h"

typedef struct tap {
    struct tap *next;                /* at the same point, in the order of adding */
    ouro_tap_spec spec;              /* its pointers are owned copies, but the array and the call */
    int32_t step_at[OURO_MAX_STEPS]; /* place along the step axis, -1: not here */
    int32_t *layer_at;               /* [n_layers] likewise */
    int32_t *head_at;                /* [heads of the point] or NULL */
    int32_t *pos_at;
} tap;

struct ouro_plan {
    ouro_observer observer;          /* first: an observer of a plan is the plan */
    ouro_config config;
    const ouro_kernels *kernels;
    tap *first[OURO_N_POINTS];
    bool calls;
    uint64_t *want;                  /* [OURO_MAX_STEPS][n_layers + 1] points, then of the step */
    uint64_t *call;                  /* likewise: where a call stands */
};

static bool is_of_step(ouro_point p) { return p <= OURO_P_STEP_PRE || p >= OURO_P_STEP_POST; }

static int heads_of(const ouro_config *c, ouro_point p)
{
    if (p == OURO_P_K || p == OURO_P_V || p == OURO_P_ROT_K) return c->n_kv_heads;
    return p >= OURO_P_Q && p <= OURO_P_RESULT ? c->n_heads : 1;
}

/* ---- carrying out -------------------------------------------------------------------------------------------- */

/* Places of one (lane, layer) along a tap's axes; false: the tap does not apply. */
typedef struct place { ptrdiff_t step, layer, row, pos; } place;

static bool place_of(const tap *t, const ouro_lane *lane, int layer, place *at)
{
    const ouro_tap_spec *s = &t->spec;
    at->step = lane->step < OURO_MAX_STEPS ? t->step_at[lane->step] : -1;
    at->layer = layer < 0 ? 0 : t->layer_at[layer];
    at->row = at->pos = 0;
    if (at->step < 0 || at->layer < 0) return false;
    if (!t->pos_at) return true;
    at->row = s->rows == 1 && s->kind != OURO_TAP_READ ? 0 : lane->row;
    if (at->row >= s->rows || lane->pos >= s->n_pos) return false;
    at->pos = t->pos_at[at->row * s->n_pos + lane->pos];
    return at->pos >= 0;
}

static uint8_t *array_row(const ouro_tap_array *a, const place *at, int head)
{
    const ptrdiff_t *s = a->stride;
    return (uint8_t *)a->data + at->step * s[OURO_AXIS_STEP] + at->layer * s[OURO_AXIS_LAYER] + at->row * s[OURO_AXIS_ROW]
           + at->pos * s[OURO_AXIS_POS] + head * s[OURO_AXIS_HEAD];
}

/* What stands ahead of a position in a row of scores or patterns. */
static float ahead(ouro_point p) { return p == OURO_P_SCORES ? -INFINITY : 0.0f; }

static void read_row(const ouro_kernels *k, const ouro_tap_spec *s, const place *at, int head, const float *x, int n)
{
    const ouro_tap_array *a = &s->array;
    uint8_t *to = array_row(a, at, head);
    bool square = OURO_BIT(s->point) & OURO_ATTENTION_POINTS;
    int most = square ? a->cols : n;
    if (n > a->cols) n = a->cols;
    if (a->bf16) {
        uint16_t *y = (uint16_t *)(void *)to;
        k->to_bf16(x, n, n, y);
        for (int i = n; i < most; i++) y[i] = ouro_f32_to_bf16(ahead(s->point));
    } else {
        float *y = (float *)(void *)to;
        if (square) memcpy(y, x, (size_t)n * sizeof *x);
        else k->keep_row(x, n, y);
        for (int i = n; i < most; i++) y[i] = ahead(s->point);
    }
}

static void project(float *x, const float *u, int n, float scale)
{
    double dot = 0.0;
    for (int i = 0; i < n; i++) dot += (double)x[i] * (double)u[i];
    float a = scale * (float)dot;
    for (int i = 0; i < n; i++) x[i] = x[i] - a * u[i];
}

static void add_noise(const ouro_tap_spec *s, const ouro_lane *lane, int layer, int head, float *x, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = x[i] + s->scale * (float)ouro_normal(ouro_noise_key(s->seed, s->point, lane->step, layer, lane->pos, head, i));
}

static void edit_row(const ouro_tap_spec *s, const ouro_lane *lane, int layer, const place *at, int head, int place, float *x, int n)
{
    const float *v = s->array.data ? (const float *)(const void *)array_row(&s->array, at, place) : NULL;
    int one = s->array.cols == 1, most = one || n < s->array.cols || !v ? n : s->array.cols;
    if (s->kind == OURO_TAP_SCALE)
        for (int i = 0; i < n; i++) x[i] = s->scale * x[i];
    else if (s->kind == OURO_TAP_SET)
        for (int i = 0; i < most; i++) x[i] = v[one ? 0 : i];
    else if (s->kind == OURO_TAP_ADD)
        for (int i = 0; i < most; i++) x[i] = x[i] + s->scale * v[one ? 0 : i];
    else if (s->kind == OURO_TAP_PROJECT) project(x, v, n, s->scale);
    else add_noise(s, lane, layer, head, x, n);
}

static bool apply(const ouro_plan *p, const tap *t, const ouro_lane *lane, int layer, const ouro_rows *row)
{
    place at;
    if (!place_of(t, lane, layer, &at)) return false;
    for (int h = 0; h < row->heads; h++) {
        int place = t->head_at ? t->head_at[h] : h;
        if (place < 0) continue;
        float *x = row->data + (size_t)h * row->head_stride;
        if (t->spec.kind == OURO_TAP_READ) read_row(p->kernels, &t->spec, &at, place, x, row->cols);
        else edit_row(&t->spec, lane, layer, &at, h, place, x, row->cols);
    }
    return t->spec.kind != OURO_TAP_READ;
}

static const uint64_t *bits_at(const ouro_plan *p, const uint64_t *table, int step, int layer)
{
    int columns = p->config.n_layers + 1;
    return table + (ptrdiff_t)step * columns + (layer < 0 ? columns - 1 : layer);
}

static uint64_t wants(const ouro_observer *o, int step, int layer)
{
    const ouro_plan *p = (const ouro_plan *)(const void *)o;
    return step < OURO_MAX_STEPS ? *bits_at(p, p->want, step, layer) : 0;
}

static bool called_at(const ouro_plan *p, int step, int layer, ouro_point point)
{
    return step < OURO_MAX_STEPS && (*bits_at(p, p->call, step, layer) & OURO_BIT(point));
}

static int visit(const ouro_observer *o, const ouro_lane *lane, ouro_point point, int layer, const ouro_rows *row)
{
    const ouro_plan *p = (const ouro_plan *)(const void *)o;
    bool changed = false, later = called_at(p, lane->step, layer, point);
    for (const tap *t = p->first[point]; t; t = t->next)
        if (t->spec.kind != OURO_TAP_CALL && t->spec.kind != OURO_TAP_READ) changed |= apply(p, t, lane, layer, row);
    for (const tap *t = p->first[point]; t && !later; t = t->next)
        if (t->spec.kind == OURO_TAP_READ) apply(p, t, lane, layer, row);
    return changed;
}

static int meet(const ouro_observer *o, const ouro_lane *lanes, int n, ouro_point point, int layer, const ouro_rows *rows,
                uint8_t *changed)
{
    const ouro_plan *p = (const ouro_plan *)(const void *)o;
    if (!called_at(p, lanes[0].step, layer, point)) return 0;
    for (const tap *t = p->first[point]; t; t = t->next) {
        place at;
        if (t->spec.kind != OURO_TAP_CALL || !place_of(t, &lanes[0], layer, &at)) continue;
        if (t->spec.call(t->spec.call_arg, lanes, n, point, layer, rows, changed)) return 1;
    }
    for (int i = 0; i < n; i++) {
        ouro_rows row = ouro_row_of(rows, lanes, i);
        for (const tap *t = p->first[point]; t; t = t->next)
            if (t->spec.kind == OURO_TAP_READ) apply(p, t, &lanes[i], layer, &row);
    }
    return 0;
}

/* ---- compiling ----------------------------------------------------------------------------------------------- */

int ouro_plan_new(const ouro_config *c, const ouro_kernels *kernels, ouro_plan **out)
{
    *out = NULL;
    ouro_plan *p = calloc(1, sizeof *p);
    size_t cells = (size_t)OURO_MAX_STEPS * ((size_t)c->n_layers + 1);
    if (p) {
        p->config = *c;
        p->kernels = kernels;
        p->observer = (ouro_observer){.wants = wants, .visit = visit};
        p->want = calloc(cells, sizeof *p->want);
        p->call = calloc(cells, sizeof *p->call);
    }
    if (!p || !p->want || !p->call) {
        ouro_plan_free(p);
        return ouro_fail(OURO_ERR_MEMORY, "no memory for a plan");
    }
    *out = p;
    return OURO_OK;
}

static void tap_free(tap *t)
{
    free(t->layer_at);
    free(t->head_at);
    free(t->pos_at);
    free(t);
}

void ouro_plan_free(ouro_plan *p)
{
    if (!p) return;
    for (int i = 0; i < OURO_N_POINTS; i++)
        while (p->first[i]) {
            tap *t = p->first[i];
            p->first[i] = t->next;
            tap_free(t);
        }
    free(p->want);
    free(p->call);
    free(p);
}

const ouro_observer *ouro_plan_observer(const ouro_plan *p) { return &p->observer; }

/* places of `values` [n] in a map of `size`, -1 elsewhere */
static int fill_map(int32_t *map, int size, const int *values, int n, const char *what)
{
    for (int i = 0; i < size; i++) map[i] = -1;
    for (int i = 0; i < n; i++) {
        if (values[i] < 0 || values[i] >= size)
            return ouro_fail(OURO_ERR_ARGUMENT, "%s %d is outside of 0 to %d", what, values[i], size - 1);
        map[values[i]] = i;
    }
    return OURO_OK;
}

/* No place of the tap lies beyond its array; axes of size 1 get a stride of 0. */
static int check_array(const ouro_config *c, ouro_tap_spec *s)
{
    static const char *const axes[] = {"step", "layer", "row", "pos", "head"};
    int64_t last = s->pos_at ? 0 : 1, need[OURO_TAP_AXES];
    for (ptrdiff_t i = 0; s->pos_at && i < (ptrdiff_t)s->rows * s->n_pos; i++)
        if (s->pos_at[i] >= last) last = (int64_t)s->pos_at[i] + 1;
    need[OURO_AXIS_STEP] = s->n_steps;
    need[OURO_AXIS_LAYER] = is_of_step(s->point) ? 1 : s->n_layers;
    need[OURO_AXIS_ROW] = s->pos_at ? s->rows : 1;
    need[OURO_AXIS_POS] = last;
    need[OURO_AXIS_HEAD] = s->heads ? s->n_heads : heads_of(c, s->point);
    for (int i = 0; s->array.data && i < OURO_TAP_AXES; i++) {
        if (s->array.size[i] == 1) s->array.stride[i] = 0;
        if (s->array.size[i] < 1 || (s->array.size[i] != 1 && s->array.size[i] < need[i]))
            return ouro_fail(OURO_ERR_SHAPE, "axis %s of a tap's array has %lld places, expected 1 or %lld", axes[i],
                             (long long)s->array.size[i], (long long)need[i]);
        if (!s->pos_at && (i == OURO_AXIS_ROW || i == OURO_AXIS_POS) && s->array.size[i] != 1)
            return ouro_fail(OURO_ERR_SHAPE, "a tap whose array has a %s axis must say which positions it is for", axes[i]);
    }
    return OURO_OK;
}

static int check_spec(const ouro_tap_spec *s)
{
    bool needs = s->kind == OURO_TAP_READ || s->kind == OURO_TAP_ADD || s->kind == OURO_TAP_SET || s->kind == OURO_TAP_PROJECT;
    if ((unsigned)s->kind >= OURO_N_TAPS || (unsigned)s->point >= OURO_N_POINTS)
        return ouro_fail(OURO_ERR_ARGUMENT, "unknown kind %d or point %d of a tap", (int)s->kind, (int)s->point);
    if (!isfinite(s->scale)) return ouro_fail(OURO_ERR_ARGUMENT, "the scale of a tap is %g, expected a finite number", (double)s->scale);
    if (needs && (!s->array.data || s->array.cols < 1))
        return ouro_fail(OURO_ERR_ARGUMENT, "a tap of kind %d needs an array", (int)s->kind);
    if (s->kind == OURO_TAP_READ && !s->pos_at) return ouro_fail(OURO_ERR_ARGUMENT, "a read must say which positions it is for");
    if (s->array.bf16 && s->kind != OURO_TAP_READ) return ouro_fail(OURO_ERR_ARGUMENT, "edits take float32 arrays");
    if (s->kind == OURO_TAP_CALL && !s->call) return ouro_fail(OURO_ERR_ARGUMENT, "a call needs a function");
    if (s->kind == OURO_TAP_PROJECT && s->array.cols == 1 && s->point != OURO_P_GATE)
        return ouro_fail(OURO_ERR_ARGUMENT, "a projection needs a direction");
    return OURO_OK;
}

static int compile(const ouro_config *c, tap *t)
{
    ouro_tap_spec *s = &t->spec;
    int heads = heads_of(c, s->point);
    size_t cells = (size_t)(s->rows > 0 ? s->rows : 0) * (size_t)(s->n_pos > 0 ? s->n_pos : 0);
    t->layer_at = malloc((size_t)c->n_layers * sizeof *t->layer_at);
    t->head_at = s->heads ? malloc((size_t)heads * sizeof *t->head_at) : NULL;
    t->pos_at = s->pos_at ? malloc((cells + 1) * sizeof *t->pos_at) : NULL;
    if (!t->layer_at || (s->heads && !t->head_at) || (s->pos_at && !t->pos_at)) return ouro_fail(OURO_ERR_MEMORY, "no memory for a plan");
    int status = fill_map(t->step_at, OURO_MAX_STEPS, s->steps, s->n_steps, "step");
    if (status == OURO_OK) status = fill_map(t->layer_at, c->n_layers, s->layers, is_of_step(s->point) ? 0 : s->n_layers, "layer");
    if (status == OURO_OK && s->heads) status = fill_map(t->head_at, heads, s->heads, s->n_heads, "head");
    if (s->pos_at) memcpy(t->pos_at, s->pos_at, cells * sizeof *t->pos_at);
    s->steps = s->layers = s->heads = NULL;
    s->pos_at = NULL;
    return status;
}

static void mark(ouro_plan *p, const tap *t)
{
    int columns = p->config.n_layers + 1;
    uint64_t bit = OURO_BIT(t->spec.point);
    for (int step = 0; step < OURO_MAX_STEPS; step++)
        for (int l = 0; l < columns; l++) {
            bool here = l == columns - 1 ? is_of_step(t->spec.point) : !is_of_step(t->spec.point) && t->layer_at[l] >= 0;
            if (t->step_at[step] < 0 || !here) continue;
            p->want[step * columns + l] |= bit;
            if (t->spec.kind == OURO_TAP_CALL) p->call[step * columns + l] |= bit;
        }
}

int ouro_plan_add(ouro_plan *p, const ouro_tap_spec *spec)
{
    if (!p || !spec) return ouro_fail(OURO_ERR_ARGUMENT, "plan and tap must not be NULL");
    int status = check_spec(spec);
    if (status != OURO_OK) return status;
    tap *t = calloc(1, sizeof *t);
    if (!t) return ouro_fail(OURO_ERR_MEMORY, "no memory for a plan");
    t->spec = *spec;
    status = check_array(&p->config, &t->spec);
    if (status == OURO_OK) status = compile(&p->config, t);
    if (status != OURO_OK) {
        tap_free(t);
        return status;
    }
    tap **end = &p->first[spec->point];
    while (*end) end = &(*end)->next;
    *end = t;
    mark(p, t);
    if (spec->kind == OURO_TAP_CALL) p->observer.meet = meet;
    return OURO_OK;
}
