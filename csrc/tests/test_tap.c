/* test_tap.c - plans: what they refuse, what they read and change, and that looking changes no bit. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/trace.h"
#include "harness.h"
#include "ouro_status.h"
#include "tap/plan.h"

#define CHECK(condition) EXPECT(condition, "%s", ouro_last_error())

enum { L = 2, T = 3, H = 4, D = 40, POS = 70, V = 61 };
static const ouro_config config = {.n_layers = L, .n_steps = T, .n_heads = H, .n_kv_heads = 2, .d_model = D, .d_head = 12,
                                   .d_mlp = 50, .d_vocab = V, .n_ctx = 128, .eps = 1e-6f, .rope_theta = 1e4};
static const int steps_of_all[T] = {0, 1, 2}, layers_of_all[L] = {0, 1};

static float uniform(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(*s >> 40) / (double)(1 << 24)) - 0.5f;
}

static ouro_model *random_model(void)
{
    static const ouro_formats formats = {OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16, OURO_BF16};
    ouro_model *m;
    uint64_t seed = 9;
    CHECK(ouro_model_new(&config, OURO_BFLOAT16, &formats, NULL, &m) == OURO_OK);
    for (int layer = 0; layer < L; layer++)
        for (int t = layer ? OURO_T_Q : 0; t < OURO_N_TENSORS; t++) {
            int rows, cols;
            ouro_tensor_shape(&config, (ouro_tensor)t, &rows, &cols);
            float *w = malloc((size_t)rows * (size_t)cols * sizeof *w);
            for (int i = 0; i < rows * cols; i++) w[i] = t == OURO_T_NORM || t >= OURO_T_LN1 ? 1.0f : uniform(&seed);
            CHECK(ouro_model_put(m, (ouro_tensor)t, layer, OURO_DT_F32, 0, rows, w) == OURO_OK);
            free(w);
        }
    CHECK(ouro_model_finish(m) == OURO_OK);
    return m;
}

static int32_t everywhere[POS];

/* a read or an edit of [step][layer][1][pos][heads][cols] */
static ouro_tap_spec spec_of(ouro_tap_kind kind, ouro_point point, float *data, int heads, int cols)
{
    ptrdiff_t f = sizeof(float), row = heads * cols * f;
    for (int i = 0; i < POS; i++) everywhere[i] = i;
    return (ouro_tap_spec){.kind = kind, .point = point, .steps = steps_of_all, .n_steps = T, .layers = layers_of_all, .n_layers = L,
                           .pos_at = everywhere, .rows = 1, .n_pos = POS, .scale = 1.0f,
                           .array = {.data = data, .size = {T, L, 1, POS, heads}, .cols = cols,
                                     .stride = {L * POS * row, POS * row, 0, row, cols * f}}};
}

static void test_refusals(void)
{
    ouro_plan *p;
    float *data = calloc(T * L * POS * D, sizeof *data);
    const int wrong[] = {0, L};
    CHECK(ouro_plan_new(&config, ouro_kernels_select(NULL), &p) == OURO_OK);
    ouro_tap_spec good = spec_of(OURO_TAP_READ, OURO_P_RESID_POST, data, 1, D), s = good;
    CHECK(ouro_plan_add(p, &s) == OURO_OK);
    s.layers = wrong;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.array.size[OURO_AXIS_POS] = POS - 1;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_SHAPE);
    s = good, s.array.size[OURO_AXIS_STEP] = 2;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_SHAPE);
    s = good, s.pos_at = NULL;
    CHECK(ouro_plan_add(p, &s) != OURO_OK);
    s = good, s.array.data = NULL;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.kind = OURO_TAP_ADD, s.array.bf16 = true;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.kind = OURO_TAP_SCALE, s.scale = NAN;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.kind = OURO_TAP_CALL;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.point = OURO_N_POINTS;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_ARGUMENT);
    s = good, s.point = OURO_P_Z, s.array.size[OURO_AXIS_HEAD] = 3;
    CHECK(ouro_plan_add(p, &s) == OURO_ERR_SHAPE);
    const ouro_observer *o = ouro_plan_observer(p);
    CHECK(o->wants(o, 0, 0) == OURO_BIT(OURO_P_RESID_POST) && o->wants(o, 0, -1) == 0 && o->wants(o, T, 0) == 0);
    ouro_plan_free(p);
    free(data);
}

static void run(const ouro_model *m, int threads, const ouro_plan *p, float *states, float *gate)
{
    static int32_t tokens[POS];
    const int32_t *row = tokens, length = POS;
    for (int i = 0; i < POS; i++) tokens[i] = (i * 7) % V;
    ouro_workspace *ws;
    CHECK(ouro_workspace_new(m, OURO_KV_BF16, threads, &ws) == OURO_OK);
    ouro_trace t = {.tokens = &row, .lengths = &length, .batch = 1, .pos = POS, .n_steps = T, .max_lanes = 23, .states = states,
                    .gate_logit = gate, .observer = p ? ouro_plan_observer(p) : NULL};
    CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_OK);
    ouro_workspace_free(ws);
}

static void test_looking(const ouro_model *m)
{
    size_t states = T * POS * D;
    float *plain = calloc(states, sizeof *plain), *seen = calloc(states, sizeof *seen), gate[2][T * POS];
    float *resid = calloc((size_t)L * states, sizeof *resid), *pattern = calloc((size_t)T * L * POS * H * POS, sizeof *pattern);
    ouro_plan *p;
    run(m, 2, NULL, plain, gate[0]);
    CHECK(ouro_plan_new(&config, ouro_kernels_select(NULL), &p) == OURO_OK);
    ouro_tap_spec a = spec_of(OURO_TAP_READ, OURO_P_RESID_PRE, resid, 1, D), b = spec_of(OURO_TAP_READ, OURO_P_PATTERN, pattern, H, POS);
    CHECK(ouro_plan_add(p, &a) == OURO_OK && ouro_plan_add(p, &b) == OURO_OK);
    for (int threads = 1; threads <= 3; threads++) {
        run(m, threads, p, seen, gate[1]);
        CHECK(!memcmp(plain, seen, states * sizeof *plain) && !memcmp(gate[0], gate[1], sizeof gate[0]));
    }
    CHECK(!memcmp(resid + (size_t)L * POS * D, plain, POS * D * sizeof *plain));     /* step 1 starts from state 0 */
    double sum = 0.0;
    for (int j = 0; j < POS; j++) sum += (double)pattern[((POS - 1) * H + 1) * POS + j];
    CHECK(fabs(sum - 1.0) < 1e-5);
    ouro_plan_free(p);
    /* what was there, put back, changes nothing; something else does */
    CHECK(ouro_plan_new(&config, ouro_kernels_select(NULL), &p) == OURO_OK);
    a.kind = OURO_TAP_SET;
    CHECK(ouro_plan_add(p, &a) == OURO_OK);
    run(m, 2, p, seen, gate[1]);
    CHECK(!memcmp(plain, seen, states * sizeof *plain));
    ouro_tap_spec noise = {.kind = OURO_TAP_NOISE, .point = OURO_P_RESID_MID, .steps = steps_of_all + 1, .n_steps = 1,
                           .layers = layers_of_all + 1, .n_layers = 1, .scale = 0.1f, .seed = 3};
    CHECK(ouro_plan_add(p, &noise) == OURO_OK);
    run(m, 1, p, seen, gate[1]);
    CHECK(!memcmp(plain, seen, POS * D * sizeof *plain) && memcmp(plain, seen, states * sizeof *plain));
    ouro_plan_free(p);
    free(plain), free(seen), free(resid), free(pattern);
}

/* A sequence that grows in three pieces, with its pages kept: the bits of the whole run. */
static void test_kept(const ouro_model *m)
{
    static int32_t tokens[POS];
    const int32_t *row = tokens, ends[] = {POS / 2, POS / 2 + 1, POS};
    float *whole = calloc(T * POS * D, sizeof *whole), *part = calloc(T * POS * D, sizeof *part), gate[T * POS];
    for (int i = 0; i < POS; i++) tokens[i] = (i * 7) % V;
    run(m, 2, NULL, whole, gate);
    ouro_workspace *ws;
    ouro_kept *kept;
    CHECK(ouro_workspace_new(m, OURO_KV_BF16, 2, &ws) == OURO_OK);
    CHECK(ouro_kept_new(ws, 0, T, &kept) == OURO_ERR_ARGUMENT && ouro_kept_new(ws, 1 << 30, T, &kept) == OURO_ERR_CONTEXT);
    CHECK(ouro_kept_new(ws, POS, T, &kept) == OURO_OK);
    for (int k = 0, done = 0; k < 3; done = ends[k++]) {
        ouro_trace t = {.tokens = &row, .lengths = &ends[k], .batch = 1, .pos = ends[k] - done, .n_steps = T, .max_lanes = 5,
                        .states = part, .gate_logit = gate, .kept = kept};
        CHECK(ouro_trace_run(ws, &t, NULL, NULL) == OURO_OK && kept->done == ends[k]);
        for (int step = 0; step < T; step++)
            CHECK(!memcmp(part + (size_t)step * (size_t)t.pos * D, whole + ((size_t)step * POS + (size_t)done) * D,
                          (size_t)t.pos * D * sizeof *part));
    }
    ouro_trace again = {.tokens = &row, .lengths = &ends[2], .batch = 1, .pos = POS, .n_steps = T, .max_lanes = 5, .states = part,
                        .gate_logit = gate, .kept = kept};
    CHECK(ouro_trace_run(ws, &again, NULL, NULL) == OURO_ERR_SHAPE);         /* nothing is new */
    again.n_steps = T - 1;
    CHECK(ouro_trace_run(ws, &again, NULL, NULL) == OURO_ERR_ARGUMENT);      /* other passes */
    ouro_kept_free(kept);
    ouro_workspace_free(ws);
    free(whole), free(part);
}

static void test_noise(void)
{
    double sum = 0.0, squares = 0.0;
    enum { N = 100000 };
    for (int i = 0; i < N; i++) {
        double x = ouro_normal(ouro_noise_key(1, OURO_P_Q, 0, 1, 2, 3, i));
        sum += x, squares += x * x;
    }
    CHECK(fabs(sum / N) < 0.02 && fabs(squares / N - 1.0) < 0.02);
    CHECK(fabs(ouro_normal((uint64_t)1 << 63)) < 1e-12 && isfinite(ouro_normal(0)) && isfinite(ouro_normal(UINT64_MAX)));
    CHECK(fabs(ouro_normal((uint64_t)(0.975 * 0x1p64)) - 1.959963985) < 1e-6);
}

int main(void)
{
    long failed = harness_failed;
    ouro_model *m = random_model();
    test_refusals();
    test_looking(m);
    test_kept(m);
    test_noise();
    ouro_model_free(m);
    return harness_failed != failed;
}
