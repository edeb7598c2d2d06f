/* forks.c - the base run, and the schedule of forks over shared passes; see forks.h.
 *
 *   start -> [pass: lanes of all running forks, each at its own step and first layer] -> last step -> states out
 */
#include "engine/forks.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "ouro_status.h"

struct ouro_forks {
    ouro_workspace *ws;
    ouro_page_budget budget;
    ouro_sequence base;
    int n, n_steps;
    float *inputs;                       /* [n_steps][n_layers][n][d_model] what each layer read */
    float *states;                       /* [n_steps][n][d_model] */
    uint8_t **spare;                     /* [n_spare] pages that no fork uses now */
    int n_spare, spare_capacity;
};

/* One fork on its way. Lanes are positions first .. n-1. */
typedef struct fork_run {
    ouro_observer observer;              /* first: visits find the fork from it */
    const ouro_fork *fork;
    const ouro_fork_source *source;
    int index, step, first;              /* the fork's number; the step it runs next; its first position */
    bool started;                        /* false: the next pass is its first, and lanes join at its first layer */
    float *h;                            /* [n - first][d_model] */
    uint8_t **pages;                     /* [n_steps][blocks]: own from block first / 64 on, the base's before */
} fork_run;

typedef struct schedule {
    ouro_forks *f;
    const ouro_fork *forks;
    const ouro_fork_source *source;
    const int32_t *out_pos;
    int n_forks, n_out, next, max_lanes, most_running, n_running;
    fork_run *running;                   /* [most_running] */
    ouro_lane *lanes;                    /* [most lanes] in the order of their first layer */
    int64_t *order;                      /* [most lanes] first_layer << 32 | place */
    float *states;
    int64_t lane_layers;
} schedule;

static size_t row_bytes(const ouro_forks *f) { return (size_t)f->ws->model->config.d_model * sizeof(float); }

static float *input_of(const ouro_forks *f, int step, int layer, int pos)
{
    const ouro_config *c = &f->ws->model->config;
    return f->inputs + (((size_t)step * (size_t)c->n_layers + (size_t)layer) * (size_t)f->n + (size_t)pos) * (size_t)c->d_model;
}

static float *state_of(const ouro_forks *f, int step, int pos)
{
    return f->states + ((size_t)step * (size_t)f->n + (size_t)pos) * (size_t)f->ws->model->config.d_model;
}

/* ---- the base run ------------------------------------------------------------------------------------------------ */

typedef struct base_observer { ouro_observer observer; ouro_forks *f; } base_observer;

static uint64_t base_wants(const ouro_observer *o, int step, int layer)
{
    (void)o;
    (void)step;
    return layer >= 0 ? OURO_BIT(OURO_P_RESID_PRE) : 0;
}

static int base_visit(const ouro_observer *o, const ouro_lane *lane, ouro_point point, int layer, const ouro_rows *row)
{
    const ouro_forks *f = ((const base_observer *)(const void *)o)->f;
    if (point == OURO_P_RESID_PRE) memcpy(input_of(f, lane->step, layer, lane->pos), row->data, row_bytes(f));
    return 0;
}

static int base_chunk(ouro_forks *f, const float *embeddings, int begin, int end, ouro_lane *lanes, ouro_poll_fn poll, void *arg)
{
    const base_observer look = {{.wants = base_wants, .visit = base_visit}, f};
    for (int step = 0; step < f->n_steps; step++) {
        for (int pos = begin; pos < end; pos++) {
            float *h = state_of(f, step, pos);
            size_t d = (size_t)f->ws->model->config.d_model;
            if (step > 0) memcpy(h, state_of(f, step - 1, pos), row_bytes(f));
            else if (embeddings) memcpy(h, embeddings + (size_t)pos * d, row_bytes(f));
            else ouro_embed(f->ws->model, f->base.tokens[pos], h);
            lanes[pos - begin] = (ouro_lane){.pos = pos, .step = step, .h = h, .pages = ouro_sequence_pages(&f->base, step),
                                             .observer = &look.observer};
        }
        int status = ouro_pass(f->ws, lanes, end - begin, poll, arg);
        if (status != OURO_OK) return status;
    }
    return OURO_OK;
}

static int run_base(ouro_forks *f, const float *embeddings, int max_lanes, ouro_poll_fn poll, void *arg)
{
    ouro_lane *lanes = malloc((size_t)(max_lanes < f->n ? max_lanes : f->n) * sizeof *lanes);
    if (!lanes) return ouro_fail(OURO_ERR_MEMORY, "no memory for a base run");
    int status = OURO_OK;
    for (int at = 0; status == OURO_OK && at < f->n; at += max_lanes)
        status = base_chunk(f, embeddings, at, at + max_lanes < f->n ? at + max_lanes : f->n, lanes, poll, arg);
    free(lanes);
    return status;
}

/* Bytes that the base keeps: keys and values, and the inputs of layers. */
static size_t base_bytes(const ouro_workspace *ws, int n, int n_steps)
{
    const ouro_config *c = &ws->model->config;
    size_t row = (size_t)c->d_model * sizeof(float);
    return ouro_cache_bytes(&ws->kv, n, n_steps) + (size_t)n_steps * (size_t)(c->n_layers + 1) * (size_t)n * row;
}

static int check_base(ouro_workspace *ws, const int32_t *tokens, int n, int n_steps, int max_lanes)
{
    const ouro_config *c = &ws->model->config;
    if (n < 1 || n_steps < 1 || n_steps > OURO_MAX_STEPS || max_lanes < 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "%d tokens at %d steps, expected at least 1 and 1 to %d", n, n_steps, OURO_MAX_STEPS);
    if (n > c->n_ctx) return ouro_fail(OURO_ERR_CONTEXT, "%d tokens exceed the context of %d", n, (int)c->n_ctx);
    for (int i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->d_vocab)
            return ouro_fail(OURO_ERR_ARGUMENT, "token %d at position %d is outside of the vocabulary of %d", (int)tokens[i], i,
                             (int)c->d_vocab);
    size_t need = base_bytes(ws, n, n_steps), free_bytes = ouro_workspace_available(ws, need);
    if (need > free_bytes) return ouro_fail(OURO_ERR_MEMORY, "the base run keeps %zu bytes, %zu are available", need, free_bytes);
    return OURO_OK;
}

int ouro_forks_new(ouro_workspace *ws, const int32_t *tokens, int n, int n_steps, const float *embeddings, int max_lanes,
                   ouro_poll_fn poll, void *poll_arg, ouro_forks **out)
{
    if (!ws || !tokens || !out) return ouro_fail(OURO_ERR_ARGUMENT, "workspace, tokens and out must not be NULL");
    *out = NULL;
    int status = check_base(ws, tokens, n, n_steps, max_lanes);
    if (status != OURO_OK) return status;
    ouro_forks *f = calloc(1, sizeof *f);
    if (!f) return ouro_fail(OURO_ERR_MEMORY, "no memory for a base run");
    size_t d = (size_t)ws->model->config.d_model, rows = (size_t)n_steps * (size_t)n;
    f->ws = ws;
    f->n = n;
    f->n_steps = n_steps;
    f->budget = (ouro_page_budget){.layout = &ws->kv, .stock = &ws->pages, .limit = SIZE_MAX / 2};
    f->inputs = malloc(rows * (size_t)ws->model->config.n_layers * d * sizeof(float));
    f->states = malloc(rows * d * sizeof(float));
    if (!f->inputs || !f->states) status = ouro_fail(OURO_ERR_MEMORY, "no memory for the rows of a base run");
    if (status == OURO_OK) status = ouro_sequence_init(&f->base, &f->budget, n_steps, tokens, n);
    if (status == OURO_OK) status = ouro_sequence_reserve(&f->base, n);
    if (status == OURO_OK) status = run_base(f, embeddings, max_lanes, poll, poll_arg);
    if (status == OURO_OK) *out = f;
    else ouro_forks_free(f);
    return status;
}

void ouro_forks_free(ouro_forks *f)
{
    if (!f) return;
    if (f->base.budget) ouro_sequence_fini(&f->base);
    for (int i = 0; i < f->n_spare; i++) ouro_big_free(f->spare[i], f->ws->kv.page_bytes);
    free(f->spare);
    free(f->inputs);
    free(f->states);
    free(f);
}

const float *ouro_forks_states(const ouro_forks *f) { return f->states; }

/* ---- one fork ---------------------------------------------------------------------------------------------------- */

static bool within(int x, int begin, int end) { return x >= begin && x < end; }

/* Points of a layer that come before its attention: what they change, later positions see in the same layer. */
static bool before_attention(int point) { return point < OURO_P_SCORES; }

/* A residual is replaced where the fork starts, without an observer. */
static bool set_at_start(const fork_run *r, int step, int layer)
{
    return r->fork->point == OURO_P_RESID_PRE && step == r->fork->step0 && layer == r->fork->layer0;
}

static bool only_at_start(const ouro_fork *k)
{
    return k->point == OURO_P_RESID_PRE && k->step1 - k->step0 == 1 && k->layer1 - k->layer0 == 1;
}

static uint64_t fork_wants(const ouro_observer *o, int step, int layer)
{
    const fork_run *r = (const fork_run *)(const void *)o;
    const ouro_fork *k = r->fork;
    if (!within(step, k->step0, k->step1) || !within(layer, k->layer0, k->layer1) || set_at_start(r, step, layer)) return 0;
    return OURO_BIT(k->point);
}

static const float *source_row(const ouro_fork_source *s, int step, int layer, int pos, int head)
{
    size_t at = ((size_t)step * (size_t)s->n_layers + (size_t)layer) * (size_t)s->pos + (size_t)pos;
    return s->data + (at * (size_t)s->heads + (size_t)head) * (size_t)s->cols;
}

static int fork_visit(const ouro_observer *o, const ouro_lane *lane, ouro_point point, int layer, const ouro_rows *row)
{
    const fork_run *r = (const fork_run *)(const void *)o;
    const ouro_fork *k = r->fork;
    if ((int)point != k->point || !within(lane->step, k->step0, k->step1) || !within(layer, k->layer0, k->layer1)
        || !within(lane->pos, k->pos0, k->pos1) || set_at_start(r, lane->step, layer))
        return 0;
    int begin = k->head < 0 ? 0 : k->head, end = k->head < 0 ? r->source->heads : k->head + 1;
    for (int h = begin; h < end; h++)
        memcpy(row->data + (size_t)h * row->head_stride, source_row(r->source, lane->step, layer, lane->pos, h),
               (size_t)r->source->cols * sizeof(float));
    return 1;
}

static uint8_t *page_take(ouro_forks *f)
{
    return f->n_spare ? f->spare[--f->n_spare] : ouro_big_alloc(f->ws->kv.page_bytes);
}

/* Room for it was made when the page was taken. */
static void page_give(ouro_forks *f, uint8_t *page) { f->spare[f->n_spare++] = page; }

static int spare_room(ouro_forks *f, int pages)
{
    if (pages <= f->spare_capacity) return OURO_OK;
    uint8_t **more = realloc(f->spare, (size_t)pages * sizeof *more);
    if (!more) return ouro_fail(OURO_ERR_MEMORY, "no memory for a table of pages");
    f->spare = more;
    f->spare_capacity = pages;
    return OURO_OK;
}

static int blocks_of(const ouro_forks *f) { return (f->n + OURO_BLOCK - 1) / OURO_BLOCK; }

static void fork_end(ouro_forks *f, fork_run *r)
{
    int blocks = blocks_of(f);
    for (int t = r->fork->step0; r->pages && t < f->n_steps; t++)
        for (int b = r->first / OURO_BLOCK; b < blocks; b++)
            if (r->pages[t * blocks + b]) page_give(f, r->pages[t * blocks + b]);
    free(r->pages);
    free(r->h);
    *r = (fork_run){0};
}

/* Own pages start as copies: positions before the fork, and layers before its first, keep what the base had. */
static int fork_pages(ouro_forks *f, fork_run *r)
{
    int blocks = blocks_of(f), first = r->first / OURO_BLOCK;
    for (int t = r->fork->step0; t < f->n_steps; t++)
        for (int b = 0; b < blocks; b++) {
            uint8_t *base = ouro_sequence_pages(&f->base, t)[b];
            uint8_t *own = b < first ? base : page_take(f);
            if (!own) return ouro_fail(OURO_ERR_MEMORY, "no memory for a page of %zu bytes", f->ws->kv.page_bytes);
            r->pages[t * blocks + b] = own;
            if (own != base) memcpy(own, base, f->ws->kv.page_bytes);
        }
    return OURO_OK;
}

static int fork_begin(schedule *s, fork_run *r, int index)
{
    ouro_forks *f = s->f;
    const ouro_fork *k = &s->forks[index];
    *r = (fork_run){.observer = {.wants = fork_wants, .visit = fork_visit}, .fork = k, .source = s->source,
                    .index = index, .step = k->step0, .first = k->pos0};
    r->h = malloc((size_t)(f->n - r->first) * row_bytes(f));
    r->pages = calloc((size_t)f->n_steps * (size_t)blocks_of(f), sizeof *r->pages);
    int status = r->h && r->pages ? fork_pages(f, r) : ouro_fail(OURO_ERR_MEMORY, "no memory for a fork");
    if (status != OURO_OK) fork_end(f, r);
    return status;
}

/* The layer at which a lane joins the fork's first pass; n_layers: not at all, nothing it sees has changed there. */
static int joins_at(const fork_run *r, int pos)
{
    const ouro_fork *k = r->fork;
    return before_attention(k->point) || within(pos, k->pos0, k->pos1) ? k->layer0 : k->layer0 + 1;
}

/* Sets the row a lane starts from and returns the layer it joins at. */
static int place_lane(const ouro_forks *f, fork_run *r, int pos)
{
    const ouro_fork *k = r->fork;
    int layers = f->ws->model->config.n_layers;
    size_t d = (size_t)f->ws->model->config.d_model;
    if (r->started) return 0;
    float *h = r->h + (size_t)(pos - r->first) * d;
    int layer = joins_at(r, pos);
    memcpy(h, layer < layers ? input_of(f, r->step, layer, pos) : state_of(f, r->step, pos), row_bytes(f));
    if (k->point == OURO_P_RESID_PRE && within(pos, k->pos0, k->pos1))
        memcpy(h, source_row(r->source, r->step, k->layer0, pos, 0), row_bytes(f));
    return layer;
}

/* ---- the schedule ------------------------------------------------------------------------------------------------ */

static int lanes_of(const schedule *s)
{
    int lanes = 0;
    for (int i = 0; i < s->n_running; i++) lanes += s->f->n - s->running[i].first;
    return lanes;
}

/* New forks while there is room; one that is wider than max_lanes runs all the same, alone. */
static int admit(schedule *s)
{
    int lanes = lanes_of(s);
    while (s->next < s->n_forks && s->n_running < s->most_running) {
        int more = s->f->n - s->forks[s->next].pos0;
        if (lanes && lanes + more > s->max_lanes) break;
        int status = fork_begin(s, &s->running[s->n_running], s->next);
        if (status != OURO_OK) return status;
        s->n_running++;
        s->next++;
        lanes += more;
    }
    return OURO_OK;
}

static int by_layer(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* Lanes of every running fork, sorted by the layer they join at; inside of that as they came. */
static int gather(schedule *s, ouro_lane *unsorted)
{
    ouro_forks *f = s->f;
    int n = 0, layers = f->ws->model->config.n_layers, blocks = blocks_of(f);
    size_t d = (size_t)f->ws->model->config.d_model;
    for (int i = 0; i < s->n_running; i++) {
        fork_run *r = &s->running[i];
        bool looks = r->step < r->fork->step1 && !only_at_start(r->fork);
        for (int pos = r->first; pos < f->n; pos++) {
            int layer = place_lane(f, r, pos);
            if (layer == layers) continue;
            s->order[n] = (int64_t)layer << 32 | n;
            s->lane_layers += layers - layer;
            unsorted[n++] = (ouro_lane){.pos = pos, .step = r->step, .h = r->h + (size_t)(pos - r->first) * d,
                                        .pages = (uint8_t *const *)(r->pages + (size_t)r->step * (size_t)blocks),
                                        .first_layer = layer, .observer = looks ? &r->observer : NULL};
        }
    }
    qsort(s->order, (size_t)n, sizeof *s->order, by_layer);
    for (int i = 0; i < n; i++) s->lanes[i] = unsorted[(size_t)(s->order[i] & 0xffffffff)];
    return n;
}

static void write_out(schedule *s, const fork_run *r)
{
    const ouro_forks *f = s->f;
    size_t d = (size_t)f->ws->model->config.d_model;
    for (int i = 0; i < s->n_out; i++) {
        int pos = s->out_pos[i];
        const float *from = pos < r->first ? state_of(f, f->n_steps - 1, pos) : r->h + (size_t)(pos - r->first) * d;
        memcpy(s->states + ((size_t)r->index * (size_t)s->n_out + (size_t)i) * d, from, d * sizeof *from);
    }
}

/* Every running fork is one step further; those that are done leave. */
static void settle(schedule *s)
{
    int kept = 0;
    for (int i = 0; i < s->n_running; i++) {
        fork_run *r = &s->running[i];
        r->started = true;
        if (++r->step == s->f->n_steps) {
            write_out(s, r);
            fork_end(s->f, r);
        } else if (kept++ != i) {
            s->running[kept - 1] = *r;
        }
    }
    s->n_running = kept;
}

static int check_fork(const ouro_forks *f, const ouro_fork *k, const ouro_fork_source *s, int index)
{
    int layers = f->ws->model->config.n_layers;
    bool of_layer = k->point >= OURO_P_RESID_PRE && k->point <= OURO_P_RESID_POST
                    && !(OURO_ATTENTION_POINTS >> k->point & 1);
    if (!of_layer) return ouro_fail(OURO_ERR_ARGUMENT, "fork %d replaces point %d, which can not be", index, (int)k->point);
    if (k->step0 < 0 || k->step0 >= k->step1 || k->step1 > f->n_steps || k->layer0 < 0 || k->layer0 >= k->layer1
        || k->layer1 > layers || k->pos0 < 0 || k->pos0 >= k->pos1 || k->pos1 > f->n)
        return ouro_fail(OURO_ERR_ARGUMENT, "fork %d: steps %d..%d, layers %d..%d, positions %d..%d of %d, %d, %d", index,
                         (int)k->step0, (int)k->step1, (int)k->layer0, (int)k->layer1, (int)k->pos0, (int)k->pos1, f->n_steps,
                         layers, f->n);
    if (k->head < -1 || k->head >= s->heads)
        return ouro_fail(OURO_ERR_ARGUMENT, "fork %d: head %d of %d", index, (int)k->head, s->heads);
    return OURO_OK;
}

static int check_run(const ouro_forks *f, const ouro_fork *forks, int n_forks, const ouro_fork_source *s, const int32_t *out_pos,
                     int n_out, int max_lanes)
{
    const ouro_config *c = &f->ws->model->config;
    if (n_forks < 0 || n_out < 1 || max_lanes < 1)
        return ouro_fail(OURO_ERR_ARGUMENT, "%d forks, %d positions out, %d lanes", n_forks, n_out, max_lanes);
    if (s->n_steps < f->n_steps || s->n_layers != c->n_layers || s->pos < f->n || s->heads < 1 || s->cols < 1)
        return ouro_fail(OURO_ERR_SHAPE, "the source is [%d][%d][%d][%d][%d], the run has %d steps, %d layers, %d positions", s->n_steps,
                         s->n_layers, s->pos, s->heads, s->cols, f->n_steps, (int)c->n_layers, f->n);
    for (int i = 0; i < n_out; i++)
        if (out_pos[i] < 0 || out_pos[i] >= f->n)
            return ouro_fail(OURO_ERR_ARGUMENT, "position %d is asked for, expected 0 to %d", (int)out_pos[i], f->n - 1);
    for (int i = 0; i < n_forks; i++) {
        int status = check_fork(f, &forks[i], s, i);
        if (status != OURO_OK) return status;
    }
    return OURO_OK;
}

/* How many forks the bytes allow, and room for all their lanes and pages. */
static int open_schedule(schedule *s, size_t max_bytes, ouro_lane **unsorted)
{
    ouro_forks *f = s->f;
    int pages = f->n_steps * blocks_of(f);
    size_t most = max_bytes / ((size_t)pages * f->ws->kv.page_bytes);
    s->most_running = most < 1 ? 1 : most > (size_t)s->max_lanes ? s->max_lanes : (int)most;
    size_t lanes = (size_t)(s->max_lanes > f->n ? s->max_lanes : f->n);
    s->running = calloc((size_t)s->most_running, sizeof *s->running);
    s->lanes = malloc(lanes * sizeof *s->lanes);
    s->order = malloc(lanes * sizeof *s->order);
    *unsorted = malloc(lanes * sizeof **unsorted);
    if (!s->running || !s->lanes || !s->order || !*unsorted) return ouro_fail(OURO_ERR_MEMORY, "no memory for a sweep");
    return spare_room(f, f->n_spare + s->most_running * pages);
}

int ouro_forks_run(ouro_forks *f, const ouro_fork *forks, int n_forks, const ouro_fork_source *source, const int32_t *out_pos,
                   int n_out, int max_lanes, size_t max_bytes, float *states, int64_t *lane_layers, ouro_poll_fn poll, void *poll_arg)
{
    if (!f || !forks || !source || !source->data || !out_pos || !states)
        return ouro_fail(OURO_ERR_ARGUMENT, "forks, source, positions and states must not be NULL");
    int status = check_run(f, forks, n_forks, source, out_pos, n_out, max_lanes);
    if (status != OURO_OK) return status;
    schedule s = {.f = f, .forks = forks, .source = source, .out_pos = out_pos, .n_forks = n_forks, .n_out = n_out,
                  .max_lanes = max_lanes, .states = states};
    ouro_lane *unsorted = NULL;
    status = open_schedule(&s, max_bytes, &unsorted);
    while (status == OURO_OK && (s.next < n_forks || s.n_running)) {
        status = admit(&s);
        if (status == OURO_OK) status = ouro_pass(f->ws, s.lanes, gather(&s, unsorted), poll, poll_arg);
        if (status == OURO_OK) settle(&s);
    }
    for (int i = 0; i < s.n_running; i++) fork_end(f, &s.running[i]);
    free(s.running);
    free(s.lanes);
    free(s.order);
    free(unsorted);
    if (lane_layers) *lane_layers = s.lane_layers;
    return status;
}
