/* bench_pass.c - what whole passes cost: the 1.4B shape (d 2048, 16 heads of 128, FFN 5632) with as many layers as asked.
 *
 *   bench_pass [bf16|int8|int4|f32] [lanes|token|prefill|context|attend|threads] [layers = 6] [threads] [kv = bf16|int8]
 *
 *   lanes      a pass of 1 to 8 lanes: time, ratio to one lane, GB/s of weights against a plain read of the same bytes
 *   token      four passes of one lane and the readout of 49 152 logits, medians, beside a plain read of the same minute
 *   prefill    512 positions in chunks of 64 to 512, tokens/s as 24 layers and 4 steps would have it
 *   context    one lane at 64 to 32 K positions: time, and bytes of weights and cache per second
 *   attend     256 positions behind 0 to 8 K others
 *   threads    one lane and 256 with 1, as many, twice and four times as many threads as processors
 *
 * Each figure is the least of a few repeats, candidates in turns; with one thread, of its processor time. Speed does not
 * depend on the values: one layer is packed from noise and copied to the others. Build: make -C csrc bench.
 */
#include "base/cpu.h"
#include "base/memory.h"
#include "bench/limits.h"
#include "kernels/kernels.h"
#include "model/lane.h"
#include "model/workspace.h"
#include "ouro_status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define REPEATS 15
#define MAX_PASS_LANES 8
#define TOKENS 31
#define STEPS 4
#define CHUNK 256
#define PROMPT 512               /* positions of a prompt, and most lanes of a pass */

/* With one thread its processor time, which others on the machine disturb less; else the clock on the wall. */
static clockid_t which_clock = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec t;
    clock_gettime(which_clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* the least of n: what the pass takes when nothing else runs for its short time */
static double least(const double *x, int n)
{
    double y = x[0];
    for (int i = 1; i < n; i++) y = x[i] < y ? x[i] : y;
    return y;
}

static void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, ouro_last_error());
    exit(1);
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

static uint32_t state = 1;
static uint16_t noise(void)              /* bf16 of some 0.01 to 0.03, either sign */
{
    state = state * 1664525u + 1013904223u;
    return (uint16_t)(0x3c00u + (state >> 16 & 0xffu) + (state >> 8 & 0x8000u));
}

static void put(ouro_model *m, ouro_tensor tensor)
{
    int rows, cols;
    ouro_tensor_shape(&m->config, tensor, &rows, &cols);
    uint16_t *row = malloc((size_t)cols * sizeof *row);
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < cols; i++) row[i] = noise();
        if (ouro_model_put(m, tensor, 0, OURO_DT_BF16, r, 1, row)) die("put");
    }
    free(row);
}

static void copy(ouro_matrix *to, const ouro_matrix *from) { memcpy(to->data, from->data, ouro_matrix_bytes(from)); }

static ouro_model *make_model(const char *compute, int layers, int vocab)
{
    static const char *names[] = {"f32", "bf16", "int8", "int4"};
    static const ouro_format formats[] = {OURO_BF16, OURO_BF16, OURO_INT8, OURO_INT4};
    ouro_config c = {.n_layers = layers, .n_steps = 4, .n_heads = 16, .n_kv_heads = 16, .d_model = 2048, .d_head = 128,
                     .d_mlp = 5632, .d_vocab = vocab, .n_ctx = 65536, .eps = 1e-6f, .rope_theta = 1e6};
    int kind = 0;
    while (kind < 4 && strcmp(names[kind], compute)) kind++;
    if (kind == 4) die(compute);
    ouro_format f = formats[kind], high = f == OURO_INT4 ? OURO_INT8 : f;
    ouro_formats which = {.layers = f, .o = f, .down = f, .head = high, .embed = high};
    ouro_model *m;
    if (ouro_model_new(&c, (ouro_compute)kind, &which, NULL, &m)) die("model");
    for (int t = 0; t < OURO_N_TENSORS; t++) put(m, (ouro_tensor)t);
    for (int l = 1; l < layers; l++) {
        ouro_layer *a = &m->layers[l], *b = &m->layers[0];
        copy(&a->qkv, &b->qkv), copy(&a->o, &b->o), copy(&a->gate_up, &b->gate_up), copy(&a->down, &b->down);
        size_t n = (size_t)c.d_model * sizeof(float);
        memcpy(a->ln1, b->ln1, n), memcpy(a->ln1_post, b->ln1_post, n), memcpy(a->ln2, b->ln2, n);
        memcpy(a->ln2_post, b->ln2_post, n);
    }
    m->ready = 1;
    return m;
}

static double layer_bytes(const ouro_model *m)
{
    const ouro_layer *y = &m->layers[0];
    size_t one = ouro_matrix_bytes(&y->qkv) + ouro_matrix_bytes(&y->o) + ouro_matrix_bytes(&y->gate_up)
                 + ouro_matrix_bytes(&y->down);
    return (double)one * m->config.n_layers;
}

/* ---- lanes and pages ----------------------------------------------------------------------------------------------- */

typedef struct seat { uint8_t **pages; } seat;          /* the pages of one (sequence, step) */

static seat seat_new(const ouro_workspace *ws, int positions)
{
    int n = (positions + OURO_BLOCK - 1) / OURO_BLOCK;
    seat s = {calloc((size_t)n, sizeof *s.pages)};
    for (int i = 0; i < n; i++) {
        s.pages[i] = ouro_big_alloc(ws->kv.page_bytes);
        if (!s.pages[i]) die("pages");
        memset(s.pages[i], i || ws->kv.dtype != OURO_KV_INT8 ? 0 : 1, ws->kv.page_bytes);
    }
    return s;
}

static void seat_free(const ouro_workspace *ws, seat s, int positions)
{
    for (int i = 0; i < (positions + OURO_BLOCK - 1) / OURO_BLOCK; i++) ouro_big_free(s.pages[i], ws->kv.page_bytes);
    free(s.pages);
}

static float *hidden;                                   /* [PROMPT][d_model] */

static double pass(ouro_workspace *ws, ouro_lane *lanes, int n)
{
    int d = ws->model->config.d_model;
    for (int i = 0; i < n * d; i++) hidden[i] = (float)(i * 37 % 101) * 0.01f - 0.5f;
    for (int i = 0; i < n; i++) lanes[i].h = hidden + (size_t)i * (size_t)d;
    double begin = now();
    if (ouro_pass(ws, lanes, n, NULL, NULL)) die("pass");
    return now() - begin;
}

/* ---- a plain read of the layers ------------------------------------------------------------------------------------- */

static double plain_read(ouro_workspace *ws)
{
    const ouro_extent layers = {ws->model->layers[0].qkv.data, (size_t)layer_bytes(ws->model)};    /* they lie side by side */
    double seconds, begin = now();                  /* by the clock of the passes, not the seconds of the read */
    if (ouro_measure_extents(ws->pool, &layers, 1, &seconds)) die("read");
    return now() - begin;
}

/* ---- tables -------------------------------------------------------------------------------------------------------- */

static void lanes_table(ouro_workspace *ws)
{
    double took[MAX_PASS_LANES + 1][REPEATS], bytes = layer_bytes(ws->model) * 1e-9;
    seat seats[MAX_PASS_LANES];
    ouro_lane lanes[MAX_PASS_LANES] = {{0}};
    for (int i = 0; i < MAX_PASS_LANES; i++) {
        seats[i] = seat_new(ws, 64);
        lanes[i] = (ouro_lane){.pos = 40, .pages = seats[i].pages};
    }
    for (int r = 0; r < REPEATS; r++) {
        took[0][r] = plain_read(ws);
        for (int n = 1; n <= MAX_PASS_LANES; n++) took[n][r] = pass(ws, lanes, n);
    }
    double read = least(took[0], REPEATS), one = 0.0;
    printf("%7s %9s %9s %8s %12s\n", "lanes", "ms", "to one", "GB/s", "of a read");
    printf("%7s %9.2f %9s %8.1f\n", "read", read * 1e3, "", bytes / read);
    for (int n = 1; n <= MAX_PASS_LANES; n++) {
        double t = least(took[n], REPEATS);
        if (n == 1) one = t;
        printf("%7d %9.2f %9.2f %8.1f %11.0f%%\n", n, t * 1e3, t / one, bytes / t, 100.0 * read / t);
    }
    for (int i = 0; i < MAX_PASS_LANES; i++) seat_free(ws, seats[i], 64);
}

/* a chunk of positions [from, from + n), one step */
static double chunk_pass(ouro_workspace *ws, seat s, int from, int n)
{
    static ouro_lane lanes[PROMPT];
    for (int i = 0; i < n; i++) lanes[i] = (ouro_lane){.pos = from + i, .pages = s.pages};
    return pass(ws, lanes, n);
}

/* the median of n, which are put in order */
static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, ascending);
    return x[n / 2];
}

/* What moves from minute to minute moves for all: each part is compared with the reads right before and behind its token. */
static void token_table(ouro_workspace *ws)
{
    double read[TOKENS + 1], part[3][TOKENS], share[3][TOKENS];
    double layers = layer_bytes(ws->model) * 1e-9, head = (double)ouro_matrix_bytes(&ws->model->head) * 1e-9;
    const double bytes[3] = {STEPS * layers, head, STEPS * layers + head};
    seat seats[STEPS];
    int32_t best;
    for (int t = 0; t < STEPS; t++) seats[t] = seat_new(ws, 64);
    read[0] = layers / plain_read(ws);
    for (int r = 0; r < TOKENS; r++) {
        part[0][r] = 0.0;
        for (int t = 0; t < STEPS; t++) {
            ouro_lane lane = {.pos = 30 + r % 32, .pages = seats[t].pages};
            part[0][r] += pass(ws, &lane, 1);
        }
        ouro_readout row = {.state = hidden, .argmax = &best};
        double begin = now();
        if (ouro_read_out(ws, &row, 1, NULL, NULL)) die("readout");
        part[1][r] = now() - begin;
        part[2][r] = part[0][r] + part[1][r];
        read[r + 1] = layers / plain_read(ws);
        for (int i = 0; i < 3; i++) share[i][r] = bytes[i] / part[i][r] / (0.5 * (read[r] + read[r + 1]));
    }
    static const char *const names[] = {"passes", "readout", "token"};
    printf("%7s %9s %8s %12s\n%7s %18.1f\n", "", "ms", "GB/s", "of a read", "read", median(read, TOKENS + 1));
    for (int i = 0; i < 3; i++) {
        double t = median(part[i], TOKENS);
        printf("%7s %9.2f %8.1f %11.0f%%\n", names[i], t * 1e3, bytes[i] / t, 100.0 * median(share[i], TOKENS));
    }
    for (int t = 0; t < STEPS; t++) seat_free(ws, seats[t], 64);
}

static void prefill_table(ouro_workspace *ws)
{
    double took[4][5], layers = ws->model->config.n_layers;
    double work = 2.0 * layers * (4.0 * 2048 * 2048 + 3.0 * 2048 * 5632) * PROMPT * 1e-9;
    seat s = seat_new(ws, PROMPT);
    for (int r = 0; r < 5; r++)
        for (int i = 0; i < 4; i++) {
            took[i][r] = 0.0;
            for (int from = 0, n = 64 << i; from < PROMPT; from += n) took[i][r] += chunk_pass(ws, s, from, n);
        }
    printf("%d positions; tokens/s with 24 layers and 4 steps\n%7s %9s %25s\n", PROMPT, "chunk", "tokens/s", "GFLOP/s of products");
    for (int i = 0; i < 4; i++) {
        double t = least(took[i], 5);
        printf("%7d %9.2f %25.0f\n", 64 << i, PROMPT / (t * 4.0 * 24.0 / layers), work / t);
    }
    seat_free(ws, s, PROMPT);
}

static void attend_table(ouro_workspace *ws)
{
    static const int behind[] = {0, 1024, 2048, 4096, 8192 - CHUNK};
    seat s = seat_new(ws, 8192);
    double base = 0.0, layers = ws->model->config.n_layers, from = CHUNK / 2.0;
    printf("%7s %9s %30s\n", "behind", "ms", "GFLOP/s beyond the first row");
    for (int i = 0; i < 5; i++) {
        double took[3];
        for (int r = 0; r < 3; r++) took[r] = chunk_pass(ws, s, behind[i], CHUNK);
        double t = least(took, 3), work = 4.0 * 2048 * CHUNK * (behind[i] + from) * layers * 1e-9;
        if (i == 0) base = t;
        double more = work - 4.0 * 2048 * CHUNK * from * layers * 1e-9;
        printf("%7d %9.1f %30.0f\n", behind[i], t * 1e3, i ? more / (t - base) : 0.0);
    }
    seat_free(ws, s, 8192);
}

static void context_table(ouro_workspace *ws)
{
    static const int at[] = {63, 1023, 4095, 8191, 32767};
    int most = ws->model->config.n_layers > 8 ? 4 : 5;
    seat s = seat_new(ws, at[most - 1] + 1);
    double took[5][REPEATS], read[REPEATS], weights = layer_bytes(ws->model) * 1e-9;
    for (int r = 0; r < REPEATS; r++) {
        read[r] = plain_read(ws);
        for (int i = 0; i < most; i++) {
            ouro_lane lane = {.pos = at[i], .pages = s.pages};
            took[i][r] = pass(ws, &lane, 1);
        }
    }
    double rate = weights / least(read, REPEATS);
    printf("plain read %.1f GB/s\n%9s %9s %8s %12s\n", rate, "positions", "ms", "GB/s", "of a read");
    for (int i = 0; i < most; i++) {
        double t = least(took[i], REPEATS);
        double bytes = weights + (double)(at[i] / OURO_BLOCK + 1) * (double)ws->kv.page_bytes * 1e-9;
        printf("%9d %9.2f %8.1f %11.0f%%\n", at[i] + 1, t * 1e3, bytes / t, 100.0 * bytes / t / rate);
    }
    seat_free(ws, s, at[most - 1] + 1);
}

static void threads_table(const ouro_model *m, ouro_kv_dtype kv)
{
    int processors = ouro_cpu_count(), counts[4] = {1, processors, 2 * processors, 4 * processors};
    double took[4][REPEATS], chunk[4][3];
    ouro_workspace *ws[4];
    for (int i = 0; i < 4; i++)
        if (ouro_workspace_new(m, kv, counts[i], &ws[i])) die("workspace");
    seat s = seat_new(ws[0], CHUNK);
    ouro_lane lane = {.pos = 40, .pages = s.pages};
    for (int r = 0; r < REPEATS; r++)
        for (int i = 0; i < 4; i++) took[i][r] = pass(ws[i], &lane, 1);
    for (int r = 0; r < 3; r++)
        for (int i = 0; i < 4; i++) chunk[i][r] = chunk_pass(ws[i], s, 0, CHUNK);
    printf("%d processors\n%8s %14s %16s\n", processors, "threads", "one lane, ms", "256 lanes, ms");
    for (int i = 0; i < 4; i++)
        printf("%8d %14.2f %16.1f\n", counts[i], least(took[i], REPEATS) * 1e3, least(chunk[i], 3) * 1e3);
    seat_free(ws[0], s, CHUNK);
    for (int i = 0; i < 4; i++) ouro_workspace_free(ws[i]);
}

int main(int argc, char **argv)
{
    const char *compute = argc > 1 ? argv[1] : "bf16", *what = argc > 2 ? argv[2] : "lanes";
    int layers = argc > 3 ? atoi(argv[3]) : 6, threads = argc > 4 ? atoi(argv[4]) : 0;
    ouro_kv_dtype kv = argc > 5 && !strcmp(argv[5], "int8") ? OURO_KV_INT8 : OURO_KV_BF16;
    if (!strcmp(compute, "f32")) kv = OURO_KV_F32;
    ouro_model *m = make_model(compute, layers, strcmp(what, "token") ? 1024 : 49152);
    hidden = ouro_alloc((size_t)PROMPT * 2048 * sizeof(float));
    ouro_workspace *ws;
    if (ouro_workspace_new(m, kv, threads, &ws)) die("workspace");
    if (ws->n_threads == 1 && strcmp(what, "threads")) which_clock = CLOCK_THREAD_CPUTIME_ID;
    printf("%s, %s, %d layers, %d threads, keys and values %s\n", compute, m->kernels->name, layers, ws->n_threads,
           kv == OURO_KV_F32 ? "f32" : kv == OURO_KV_INT8 ? "int8" : "bf16");
    if (!strcmp(what, "lanes")) lanes_table(ws);
    else if (!strcmp(what, "token")) token_table(ws);
    else if (!strcmp(what, "prefill")) prefill_table(ws);
    else if (!strcmp(what, "attend")) attend_table(ws);
    else if (!strcmp(what, "context")) context_table(ws);
    else if (!strcmp(what, "threads")) threads_table(m, kv);
    ouro_workspace_free(ws);
    ouro_model_free(m);
    return 0;
}
