/* test_engine.c - a small random model through the C API: one answer for any threads, batch, chunk and speculation;
 * refusals; cancelling.
 */
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "engine/lookup.h"
#include "engine/trace.h"
#include "harness.h"
#include "ouro_status.h"

#define CHECK(condition) EXPECT(condition, "%s", ouro_last_error())

enum { V = 211, NEW = 20, T = 4 };
static const ouro_config config = {.n_layers = 2, .n_steps = T, .n_heads = 4, .n_kv_heads = 2, .d_model = 72, .d_head = 24,
                                   .d_mlp = 100, .d_vocab = V, .n_ctx = 256, .eps = 1e-6f, .rope_theta = 1e4};

static float uniform(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(*s >> 40) / (double)(1 << 24)) - 0.5f;
}

static ouro_model *random_model(ouro_compute compute)
{
    static const ouro_formats formats[] = {
        {OURO_F32, OURO_F32, OURO_F32, OURO_F32, OURO_F32}, {OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16},
        {OURO_INT8, OURO_INT8, OURO_INT8, OURO_INT8, OURO_BF16}, {OURO_INT4, OURO_INT4, OURO_INT8, OURO_INT8, OURO_BF16}};
    ouro_model *m;
    uint64_t seed = 5;
    CHECK(ouro_model_new(&config, compute, &formats[compute], NULL, &m) == OURO_OK);
    for (int layer = 0; layer < config.n_layers; layer++)
        for (int t = layer ? OURO_T_Q : 0; t < OURO_N_TENSORS; t++) {
            int rows, cols, is_norm = t == OURO_T_NORM || t >= OURO_T_LN1;
            ouro_tensor_shape(&config, (ouro_tensor)t, &rows, &cols);
            float *w = malloc((size_t)rows * (size_t)cols * sizeof *w);
            for (int i = 0; i < rows * cols; i++) w[i] = is_norm ? 1.0f + 0.3f * uniform(&seed) : uniform(&seed) * 3.0f / sqrtf((float)cols);
            CHECK(ouro_model_put(m, (ouro_tensor)t, layer, OURO_DT_F32, 0, rows, w) == OURO_OK);
            free(w);
        }
    CHECK(ouro_model_put(m, OURO_T_Q, 9, OURO_DT_F32, 0, 1, "") == OURO_ERR_SHAPE);
    CHECK(ouro_model_finish(m) == OURO_OK);
    return m;
}

static ouro_workspace *workspace(const ouro_model *m, int threads)
{
    ouro_workspace *ws = NULL;
    CHECK(ouro_workspace_new(m, m->compute == OURO_FLOAT32 ? OURO_KV_F32 : OURO_KV_BF16, threads, &ws) == OURO_OK);
    return ws;
}

static ouro_request_params greedy(void)
{
    return (ouro_request_params){.max_new_tokens = NEW, .n_steps = T, .exit_at_step = -1,
                                 .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
}

static size_t cache_bytes(ouro_engine *e)
{
    ouro_engine_status now;
    ouro_engine_look(e, &now);
    return now.cache_bytes;
}

/* Runs requests together; tokens [n][NEW], logprobs [n][NEW]. */
static void run(ouro_workspace *ws, int max_lanes, const int32_t *const *prompts, const int *lengths, int n,
                const ouro_request_params *p, int32_t *tokens, float *logprobs)
{
    ouro_engine *e;
    int64_t ids[8];
    int made[8] = {0};
    CHECK(ouro_engine_new(ws, &(ouro_engine_options){.max_lanes = max_lanes, .max_cache_bytes = (size_t)64 << 20}, &e) == OURO_OK);
    for (int i = 0; i < n; i++) CHECK(ouro_engine_submit(e, prompts[i], lengths[i], p, &ids[i]) == OURO_OK);
    while (ouro_engine_pending(e)) {
        const ouro_event *events;
        int count;
        CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK);
        for (int k = 0; k < count; k++)
            for (int i = 0; i < n; i++)
                if (events[k].request == ids[i] && events[k].token >= 0) {
                    tokens[i * NEW + made[i]] = events[k].token;
                    logprobs[i * NEW + made[i]++] = events[k].logprob;
                }
    }
    for (int i = 0; i < n; i++) CHECK(made[i] == NEW);
    CHECK(cache_bytes(e) == 0);
    ouro_engine_free(e);
}

static void test_one_answer(ouro_compute compute, const ouro_request_params *base)
{
    int32_t prompt[3][100], alone[3 * NEW], together[3 * NEW];
    float lp_alone[3 * NEW], lp_together[3 * NEW];
    const int lengths[3] = {1, 70, 13};
    const int32_t *prompts[3] = {prompt[0], prompt[1], prompt[2]};
    for (int i = 0; i < 300; i++) prompt[i / 100][i % 100] = (i * 37 + 11) % V;
    ouro_model *m = random_model(compute);
    ouro_workspace *one = workspace(m, 1), *three = workspace(m, 3);
    for (int i = 0; i < 3; i++) run(one, 256, &prompts[i], &lengths[i], 1, base, alone + i * NEW, lp_alone + i * NEW);
    for (int speculate = 0; speculate < 3; speculate++) {
        ouro_request_params p = *base;
        p.speculate = (ouro_speculate)speculate;
        static const int lanes[] = {256, 9, 4};
        for (int i = 0; i < 3; i++) {
            run(three, lanes[i], prompts, lengths, 3, &p, together, lp_together);
            CHECK(memcmp(alone, together, sizeof alone) == 0);
            CHECK(memcmp(lp_alone, lp_together, sizeof lp_alone) == 0);
        }
    }
    ouro_workspace_free(one);
    ouro_workspace_free(three);
    ouro_model_free(m);
}

static int stop_at_once(void *arg) { return ++*(int *)arg > 3; }

static void test_refusals(void)
{
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 2), *wrong;
    CHECK(ouro_workspace_new(m, OURO_KV_F32, 1, &wrong) == OURO_ERR_ARGUMENT);
    ouro_engine *e;
    CHECK(ouro_engine_new(ws, &(ouro_engine_options){.max_lanes = 64, .max_cache_bytes = (size_t)1 << 30}, &e) == OURO_OK);
    int32_t prompt[4] = {1, 2, 3, V};
    int64_t id;
    ouro_request_params p = greedy();
    CHECK(ouro_engine_submit(e, prompt, 4, &p, &id) == OURO_ERR_ARGUMENT && strstr(ouro_last_error(), "211"));
    CHECK(ouro_engine_submit(e, prompt, 0, &p, &id) == OURO_ERR_ARGUMENT);
    p.max_new_tokens = 255;
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_CONTEXT && strstr(ouro_last_error(), "256"));
    p = greedy();
    p.exit_at_step = 1, p.weighted_exit = 1;
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT);
    p = greedy();
    p.exit = (ouro_exit_rule){.name = "entropie", .threshold = 0.5f};
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT && strstr(ouro_last_error(), "never, q, "));
    p.exit = (ouro_exit_rule){.name = "q", .threshold = 1.5f};
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT && strstr(ouro_last_error(), "0 to 1"));
    p.exit.threshold = 0.5f, p.weighted_exit = 1;
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT);
    p.exit.name = "never";                               /* as a rule that is zero: contradicts nothing */
    CHECK(!ouro_exit_is_on(&p.exit) && !ouro_exit_is_on(&(ouro_exit_rule){0}) && ouro_exit_check(&(ouro_exit_rule){0}) == OURO_OK);
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_OK);
    ouro_engine_cancel(e, id);
    p = greedy();
    p.kv_policy = OURO_POLICY_AVERAGE, p.speculate = OURO_SPECULATE_ON;
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT);
    p.speculate = OURO_SPECULATE_OFF, p.kv_policy = OURO_N_POLICIES;
    CHECK(ouro_engine_submit(e, prompt, 2, &p, &id) == OURO_ERR_ARGUMENT);
    p = greedy();
    CHECK(ouro_engine_submit(e, prompt, 3, &p, &id) == OURO_OK);
    const ouro_event *events;
    int count, calls = 0;
    CHECK(ouro_engine_step(e, stop_at_once, &calls, &events, &count) == OURO_OK || calls > 3);
    CHECK(ouro_engine_step(e, stop_at_once, &calls, &events, &count) == OURO_ERR_CANCELLED);
    CHECK(ouro_engine_pending(e) == 0 && cache_bytes(e) == 0);
    CHECK(ouro_engine_submit(e, prompt, 3, &p, &id) == OURO_OK);
    ouro_engine_cancel(e, id);
    CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK && count == 1 && events[0].finish == OURO_FINISH_CANCELLED);
    ouro_engine_free(e);
    ouro_workspace_free(ws);
    ouro_model_free(m);
    ouro_config bad = config;
    ouro_formats f = {OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16};
    bad.d_head = 23;
    CHECK(ouro_model_new(&bad, OURO_BFLOAT16, &f, NULL, &m) == OURO_ERR_ARGUMENT && strstr(ouro_last_error(), "d_head"));
    f.layers = OURO_INT8;
    CHECK(ouro_model_new(&config, OURO_BFLOAT16, &f, NULL, &m) == OURO_ERR_ARGUMENT);
}

/* What is kept for a sequence belongs to one number of passes and of positions, and only grows. */
static void test_kept(void)
{
    enum { N = 70, D = 72 };
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 1);
    CHECK(ouro_cache_bytes(&ws->kv, 0, T) == 0 && ouro_cache_bytes(&ws->kv, N, T) == 2 * T * ws->kv.page_bytes);
    CHECK(ouro_cache_bytes(&ws->kv, INT_MAX, 1) / ws->kv.page_bytes == 1u << 25);
    ouro_kept *kept;
    CHECK(ouro_kept_new(ws, 0, T, &kept) == OURO_ERR_ARGUMENT && ouro_kept_new(ws, N, OURO_MAX_STEPS + 1, &kept) == OURO_ERR_ARGUMENT);
    CHECK(ouro_kept_new(ws, 257, T, &kept) == OURO_ERR_CONTEXT && ouro_kept_new(ws, N, T, &kept) == OURO_OK);
    int32_t ids[N], length = 65;
    const int32_t *tokens = ids;
    for (int i = 0; i < N; i++) ids[i] = i * 7 % V;
    float *states = calloc((size_t)T * N * D, sizeof *states), gates[T * N], last[T * D];
    ouro_trace t = {.tokens = &tokens, .lengths = &length, .batch = 1, .pos = N, .n_steps = T, .max_lanes = 64, .states = states,
                    .gate_logit = gates, .kept = kept};
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_OK && kept->done == 65);
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_ERR_SHAPE && strstr(ouro_last_error(), "expected 66"));
    length = N + 1;
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_ERR_ARGUMENT);
    length = 66, t.pos = 1, t.n_steps = T - 1;
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_ERR_ARGUMENT && kept->done == 65);
    t.n_steps = T, t.states = last;
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_OK && kept->done == 66);
    t.kept = NULL, t.pos = N, t.states = states;
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_OK);
    for (int s = 0; s < T; s++)
        EXPECT(!memcmp(last + s * D, states + (size_t)(s * N + 65) * D, D * sizeof *last), "step %d has other bits", s);
    t.turns = &(ouro_turn){0}, t.n_turns = OURO_MAX_STEPS + 1;               /* refused before its passes are looked at */
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_ERR_ARGUMENT && strstr(ouro_last_error(), "passes"));
    free(states);
    ouro_kept_free(kept);
    ouro_workspace_free(ws);
    ouro_model_free(m);
}

/* Random arrivals, cancels and settings on one engine: each request that ends by itself gives what it gives alone. */
static void test_random_schedules(void)
{
    enum { KINDS = 9 };
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 2);
    int32_t prompt[80], want[KINDS][NEW];
    float lp[NEW];
    ouro_request_params kind[KINDS];
    for (int i = 0; i < 80; i++) prompt[i] = (i * 91 + 3) % V;
    const int32_t *prompts[1] = {prompt};
    for (int k = 0; k < KINDS; k++) {
        kind[k] = greedy();
        kind[k].speculate = (ouro_speculate)(k % 3);
        if (k == 1) kind[k].exit = (ouro_exit_rule){.name = "q", .threshold = 0.6f};
        if (k == 2) kind[k].sampling.temperature = 1.0f, kind[k].sampling.seed = 4;
        if (k == 3) kind[k].exit = (ouro_exit_rule){.name = "entropy", .threshold = 3.0f};
        if (k == 4) kind[k].weighted_exit = 1;
        if (k == 5) kind[k].exit_at_step = 2, kind[k].sampling.repetition_penalty = 1.2f;
        if (k > 5) kind[k].speculate = OURO_SPECULATE_AUTO, kind[k].exit = kind[1].exit;
        if (k > 5) kind[k].kv_policy = k == 6 ? OURO_POLICY_AVERAGE : k == 7 ? OURO_POLICY_LAST_STEP : OURO_POLICY_LAST_EXITED;
        int n = 5 + 7 * k;
        run(ws, 64, prompts, &n, 1, &kind[k], want[k], lp);
    }
    ouro_engine *e;
    CHECK(ouro_engine_new(ws, &(ouro_engine_options){.max_lanes = 24, .max_cache_bytes = (size_t)4 << 20}, &e) == OURO_OK);
    uint64_t seed = 9;
    struct { int64_t id; int kind, made, cancelled; } live[400];
    int n = 0;
    while (n < 400 || ouro_engine_pending(e)) {
        while (n < 400 && uniform(&seed) < 0.0f) {
            int k = (int)((uniform(&seed) + 0.5f) * KINDS) % KINDS;
            CHECK(ouro_engine_submit(e, prompt, 5 + 7 * k, &kind[k], &live[n].id) == OURO_OK);
            live[n].kind = k, live[n].made = 0, live[n++].cancelled = 0;
        }
        if (n && uniform(&seed) < -0.45f) {
            int victim = (int)((uniform(&seed) + 0.5f) * (float)n) % n;
            live[victim].cancelled = 1;
            ouro_engine_cancel(e, live[victim].id);
        }
        const ouro_event *events;
        int count;
        CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK);
        for (int i = 0; i < count; i++)
            for (int r = 0; r < n; r++)
                if (live[r].id == events[i].request && events[i].token >= 0)
                    CHECK(events[i].token == want[live[r].kind][live[r].made++]);
    }
    for (int r = 0; r < n; r++) CHECK(live[r].cancelled || live[r].made == NEW);
    CHECK(cache_bytes(e) == 0);
    ouro_engine_free(e);
    ouro_workspace_free(ws);
    ouro_model_free(m);
}

/* Runs an engine to its end, counting tokens that differ from want [n][NEW] for requests first, first + 1, ... */
static int differing(ouro_engine *e, int64_t first, int32_t (*want)[NEW], int n, ouro_stats *stats)
{
    int made[8] = {0}, wrong = 0, count;
    const ouro_event *events;
    while (ouro_engine_pending(e)) {
        CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK);
        for (int i = 0; i < count; i++) {
            int r = (int)(events[i].request - first);
            if (r < 0 || r >= n) continue;
            if (events[i].token >= 0) wrong += events[i].token != want[r][made[r]++];
            if (events[i].finish != OURO_RUNNING) stats[r] = events[i].stats;
        }
    }
    for (int r = 0; r < n; r++) wrong += made[r] != NEW;
    return wrong;
}

/* Prompts with the same beginning share blocks, with the same tokens as alone; what is kept stays within its limit and
 * makes room; fewer steps may use what more steps made, not the other way round. */
static void test_prefix(void)
{
    enum { N = 4 };
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 2);
    int32_t prompt[N][200], want[N][NEW];
    const int lengths[N] = {150, 200, 129, 128}, shared[N] = {0, 64, 128, 64};
    float lp[NEW];
    ouro_request_params p = greedy();
    ouro_stats stats[N];
    for (int r = 0; r < N; r++)
        for (int i = 0; i < 200; i++) prompt[r][i] = (i * 29 + (r == 1 && i > 70 ? 5 : 3)) % V;
    for (int r = 0; r < N; r++) {
        const int32_t *one = prompt[r];
        run(ws, 64, &one, &lengths[r], 1, &p, want[r], lp);
    }
    ouro_engine *e;
    const ouro_engine_options options = {.max_lanes = 40, .max_cache_bytes = (size_t)8 << 20, .prefix_cache_bytes = (size_t)4 << 20};
    CHECK(ouro_engine_new(ws, &options, &e) == OURO_OK);
    int64_t id, first = 0;
    for (int round = 0; round < 2; round++) {            /* together, then from what the first round left */
        for (int r = 0; r < N; r++) {
            CHECK(ouro_engine_submit(e, prompt[r], lengths[r], &p, &id) == OURO_OK);
            if (r == 0) first = id;
        }
        CHECK(differing(e, first, want, N, stats) == 0);
        for (int r = 0; r < N; r++)
            CHECK(stats[r].prefix_tokens == (round ? (lengths[r] - 1) / 64 * 64 : shared[r]));
    }
    ouro_engine_status now;
    ouro_engine_look(e, &now);
    CHECK(now.cache_bytes == now.prefix_bytes && now.prefix_bytes > 0 && now.prefix_bytes <= now.prefix_limit);
    CHECK(now.running == 0 && now.waiting == 0 && now.stats.prefix_tokens > 0);
    p.n_steps = 2;
    CHECK(ouro_engine_submit(e, prompt[0], 150, &p, &id) == OURO_OK);
    while (ouro_engine_pending(e)) differing(e, id, want, 1, stats);
    CHECK(stats[0].prefix_tokens == 128);
    p.n_steps = 6;
    CHECK(ouro_engine_submit(e, prompt[0], 150, &p, &id) == OURO_OK);
    while (ouro_engine_pending(e)) differing(e, id, want, 1, stats);
    CHECK(stats[0].prefix_tokens == 0);
    ouro_engine_free(e);
    ouro_workspace_free(ws);
    ouro_model_free(m);
}

/* A cache of a few pages and prompts that fill it: kept blocks give way, everybody finishes. */
static void test_prefix_makes_room(void)
{
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 1);
    ouro_engine *e;
    size_t page = ws->kv.page_bytes;
    const ouro_engine_options options = {.max_lanes = 8, .max_cache_bytes = 4 * T * page, .prefix_cache_bytes = 3 * T * page};
    CHECK(ouro_engine_new(ws, &options, &e) == OURO_OK);
    ouro_request_params p = greedy();
    int32_t prompt[150];
    int64_t id;
    for (int k = 0; k < 12; k++) {
        for (int i = 0; i < 150; i++) prompt[i] = (i * 13 + k / 2 * 17) % V;
        CHECK(ouro_engine_submit(e, prompt, 100 + 10 * (k % 4), &p, &id) == OURO_OK);
    }
    const ouro_event *events;
    ouro_engine_status now;
    int count, ended = 0;
    while (ouro_engine_pending(e)) {
        CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK);
        for (int i = 0; i < count; i++) ended += events[i].finish == OURO_FINISH_LENGTH;
        ouro_engine_look(e, &now);
        CHECK(now.prefix_bytes <= now.prefix_limit && now.cache_bytes <= now.cache_limit);
    }
    CHECK(ended == 12 && now.stats.prefix_tokens > 0);
    ouro_engine_free(e);
    ouro_workspace_free(ws);
    ouro_model_free(m);
}

/* Requests come and are cancelled from other threads while one thread steps. */
typedef struct crowd { ouro_engine *engine; int seed, wrong; atomic_int *left; } crowd;

static void *submit_and_cancel(void *arg)
{
    crowd *c = arg;
    int32_t prompt[80];
    uint64_t seed = (uint64_t)c->seed;
    for (int i = 0; i < 80; i++) prompt[i] = (i * 7 + c->seed % 2) % V;
    for (int k = 0; k < 25; k++) {
        ouro_request_params p = greedy();
        int64_t id;
        int status = ouro_engine_submit(c->engine, prompt, 66 + k % 10, &p, &id);
        c->wrong += status != OURO_OK && status != OURO_ERR_BUSY;
        if (status == OURO_OK && uniform(&seed) < 0.0f) c->wrong += ouro_engine_cancel(c->engine, id) != OURO_OK;
        ouro_engine_status now;
        ouro_engine_look(c->engine, &now);
        c->wrong += now.waiting > 9;
    }
    atomic_fetch_sub(c->left, 1);
    return NULL;
}

static void test_other_threads(void)
{
    ouro_model *m = random_model(OURO_BFLOAT16);
    ouro_workspace *ws = workspace(m, 2);
    ouro_engine *e;
    const ouro_engine_options options = {.max_lanes = 16, .max_queue = 9, .max_cache_bytes = (size_t)8 << 20,
                                         .prefix_cache_bytes = (size_t)1 << 20, .record = true};
    CHECK(ouro_engine_new(ws, &options, &e) == OURO_OK);
    atomic_int left = 3;
    pthread_t threads[3];
    crowd crowds[3];
    for (int i = 0; i < 3; i++) {
        crowds[i] = (crowd){e, i + 1, 0, &left};
        CHECK(pthread_create(&threads[i], NULL, submit_and_cancel, &crowds[i]) == 0);
    }
    const ouro_event *events;
    int count;
    while (atomic_load(&left) || ouro_engine_pending(e)) CHECK(ouro_engine_step(e, NULL, NULL, &events, &count) == OURO_OK);
    for (int i = 0; i < 3; i++) CHECK(pthread_join(threads[i], NULL) == 0 && crowds[i].wrong == 0);
    ouro_engine_status now;
    ouro_engine_look(e, &now);
    CHECK(now.running == 0 && now.waiting == 0 && now.cache_bytes == now.prefix_bytes);
    ouro_engine_free(e);
    ouro_workspace_free(ws);
    ouro_model_free(m);
}

static void test_lookup(void)
{
    const int32_t tokens[] = {1, 2, 3, 4, 9, 2, 3, 4, 5, 7, 2, 3, 4, 7, 8, 3, 4, 5, 7, 2, 3, 4};
    CHECK(ouro_lookup(tokens, 0) == -1 && ouro_lookup(tokens, 3) == -1);
    CHECK(ouro_lookup(tokens, 7) == -1);                 /* two tokens agree: too few */
    CHECK(ouro_lookup(tokens, 8) == 9);                  /* 2 3 4 -> 9 */
    CHECK(ouro_lookup(tokens, 13) == 5);                 /* 2 3 4 stands twice: the latest counts */
    CHECK(ouro_lookup(tokens, 22) == 7);                 /* 4 5 7 2 3 4 -> 7, longer than the latest 2 3 4 */
    int32_t same[40];
    for (int i = 0; i < 40; i++) same[i] = 6;
    CHECK(ouro_lookup(same, 40) == 6 && ouro_lookup(same, 3) == -1 && ouro_lookup(same, 4) == 6);
}

int main(void)
{
    long failed = harness_failed;
    ouro_request_params p = greedy();
    for (int compute = 0; compute < 4; compute++) test_one_answer((ouro_compute)compute, &p);
    p.sampling.temperature = 1.0f, p.sampling.seed = 3, p.sampling.repetition_penalty = 1.1f;
    test_one_answer(OURO_BFLOAT16, &p);
    p = greedy();
    p.exit = (ouro_exit_rule){.name = "q", .threshold = 0.5f};
    test_one_answer(OURO_BFLOAT16, &p);
    p.exit = (ouro_exit_rule){.name = "kl", .threshold = 0.5f};
    test_one_answer(OURO_FLOAT32, &p);
    p = greedy();
    p.kv_policy = OURO_POLICY_FIRST_STEP;
    test_one_answer(OURO_FLOAT32, &p);
    p.kv_policy = OURO_POLICY_LAST_EXITED, p.exit = (ouro_exit_rule){.name = "q", .threshold = 0.6f};
    test_one_answer(OURO_BFLOAT16, &p);
    test_lookup();
    test_refusals();
    test_kept();
    test_random_schedules();
    test_prefix();
    test_prefix_makes_room();
    test_other_threads();
    return harness_failed != failed;
}
