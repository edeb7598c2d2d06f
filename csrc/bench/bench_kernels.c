/* bench_kernels.c - how near the products come to the limits of the machine.
 *
 * Decoding (1 to 8 lanes) is measured in GB/s of weights against a plain read of the same bytes, prefill (64 to 512
 * lanes) in GFLOP/s against the peak of the multiply-add that the format uses, measured here by a loop of independent
 * instructions, one and two threads. Each figure is the best of a few repeats, by the processor time of the slowest thread.
 *
 *   bench_kernels [MEGABYTES of weights for decoding = 512] [table = the best] [decode|prefill|all]
 *   bench_kernels 1 best sgemm LIBRARY      own float32 products and those of an OpenBLAS (ouro/_libs), taking turns; with
 *                                           OPENBLAS_CORETYPE unset, so that it takes the kernels it has for the machine
 */
#include "base/blas.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "bench/loops.h"
#include "kernels/kernels.h"
#include "ouro_status.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COLS 2048
#define MAX_THREADS 2
#define MAX_LANES 512

static const struct { const char *name; int format, acts; } kinds[] = {
    {"bf16", OURO_BF16, OURO_ACT_BF16}, {"int8", OURO_INT8, OURO_ACT_S8}, {"int4", OURO_INT4, OURO_ACT_S8},
    {"bf16*f32", OURO_BF16, OURO_ACT_F32}, {"f32", OURO_F32, OURO_ACT_F32}};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* processor time of this thread: what others on the machine do disturbs it less than the clock on the wall */
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile float sink;

/* ---- threads ---------------------------------------------------------------------------------------------------- */

typedef struct work {
    void (*run)(struct work *, int thread, int threads);
    const ouro_kernels *k;
    const ouro_matrix *w;
    const ouro_acts *x;
    float *out;
    size_t out_stride;
    int lanes, acts, repeats;
    ouro_unit unit;
} work;

typedef struct start { work *job; int thread, threads; double took; } start;

static void *enter(void *p)
{
    start *s = p;
    ouro_ftz_enter();
    s->took = now();
    s->job->run(s->job, s->thread, s->threads);
    s->took = now() - s->took;
    return NULL;
}

/* seconds of the slowest thread, in the best of `tries` */
static double best_time(work *job, int threads, int tries)
{
    double best = 1e9;
    for (int i = 0; i < tries; i++) {
        pthread_t id[MAX_THREADS];
        start s[MAX_THREADS];
        for (int t = 0; t < threads; t++) {
            s[t] = (start){job, t, threads, 0.0};
            if (pthread_create(&id[t], NULL, enter, &s[t])) exit(1);
        }
        double took = 0.0;
        for (int t = 0; t < threads; t++) {
            pthread_join(id[t], NULL);
            if (s[t].took > took) took = s[t].took;
        }
        if (took < best) best = took;
    }
    return best;
}

/* ---- what is measured -------------------------------------------------------------------------------------------- */

static void run_product(work *j, int thread, int threads)
{
    int begin = j->w->tiles * thread / threads, end = j->w->tiles * (thread + 1) / threads;
    for (int i = 0; i < j->repeats; i++)
        j->k->matmul[j->w->format][j->acts](j->w, begin, end, j->x, 0, j->lanes, j->out, j->out_stride, NULL);
}

static void run_read(work *j, int thread, int threads)
{
    size_t bytes = ouro_matrix_bytes(j->w) / 512, begin = bytes * (size_t)thread / (size_t)threads;
    size_t end = bytes * ((size_t)thread + 1) / (size_t)threads;
    sink = (float)ouro_read_loop_of_machine()(j->w->data + 512 * begin, 512 * (end - begin));
}

#define PEAK_TURNS 2000000

static void run_peak(work *j, int thread, int threads)
{
    (void)thread;
    (void)threads;
    sink = (float)ouro_peak_loop_of(j->unit).run(PEAK_TURNS);
}

/* GFLOP/s */
static double peak(int acts, int threads)
{
    work j = {.run = run_peak,
              .unit = acts == OURO_ACT_BF16 ? OURO_UNIT_BF16 : acts == OURO_ACT_S8 ? OURO_UNIT_INT8 : OURO_UNIT_F32};
    return ouro_peak_loop_of(j.unit).operations * PEAK_TURNS * threads / best_time(&j, threads, 3) * 1e-9;
}

/* ---- data ------------------------------------------------------------------------------------------------------ */

static uint32_t state = 1;
static uint32_t noise(void) { return state = state * 1664525u + 1013904223u; }

/* Every tile a copy of the first, which is packed from random rows. */
static ouro_matrix make_matrix(int format, size_t bytes)
{
    ouro_matrix m;
    ouro_matrix_layout(&m, (ouro_format)format, OURO_TILE, COLS, 1);
    int tiles = (int)(bytes / m.tile_bytes) & ~1;
    ouro_matrix_layout(&m, (ouro_format)format, tiles * OURO_TILE, COLS, tiles);
    m.data = ouro_big_alloc(ouro_matrix_bytes(&m));
    if (!m.data) {
        fprintf(stderr, "no memory for %zu bytes\n", ouro_matrix_bytes(&m));
        exit(1);
    }
    float row[COLS];
    for (int r = 0; r < OURO_TILE; r++) {
        for (int i = 0; i < COLS; i++) row[i] = (float)(noise() >> 8) * 0x1p-24f - 0.5f;
        ouro_matrix_put_row(&m, r, OURO_DT_F32, row);
    }
    for (int t = 1; t < tiles; t++) memcpy(m.data + (size_t)t * m.tile_bytes, m.data, m.tile_bytes);
    return m;
}

static ouro_acts make_acts(int kind, int kpad, int lanes)
{
    size_t size = kind == OURO_ACT_F32 ? 4 : kind == OURO_ACT_BF16 ? 2 : 1;
    ouro_acts x = {.kind = kind, .kpad = kpad, .stride = (((size_t)kpad * size + 63) / 64 | 1) * 64};
    x.data = ouro_alloc(x.stride * (size_t)lanes);
    x.scale = ouro_alloc((size_t)lanes * (size_t)(kpad / OURO_GROUP + 1) * sizeof(float));
    x.sum = ouro_alloc((size_t)lanes * (size_t)(kpad / OURO_GROUP4 + 2) * sizeof(int32_t));
    float *row = calloc((size_t)kpad, sizeof *row);
    for (int l = 0; l < lanes; l++) {
        uint8_t *to = x.data + (size_t)l * x.stride;
        for (int i = 0; i < kpad; i++) row[i] = (float)(noise() >> 8) * 0x1p-24f - 0.5f;
        if (kind == OURO_ACT_F32) memcpy(to, row, (size_t)kpad * 4);
        else if (kind == OURO_ACT_BF16) ouro_kernels_scalar.to_bf16(row, kpad, kpad, (uint16_t *)(void *)to);
        else ouro_kernels_scalar.to_s8(row, kpad, kpad, (int8_t *)to, x.scale + l * (kpad / OURO_GROUP),
                                       x.sum + l * (kpad / OURO_GROUP4));
    }
    free(row);
    return x;
}

static void free_acts(ouro_acts *x)
{
    ouro_free(x->data);
    ouro_free(x->scale);
    ouro_free(x->sum);
}

/* ---- tables ---------------------------------------------------------------------------------------------------- */

static void decode(const ouro_kernels *k, size_t bytes)
{
    static const int lanes[] = {1, 2, 4, 6, 8};
    printf("\ndecode, %s, %zu MB of weights, GB/s (share of a plain read)\n%-9s %7s %7s", k->name, bytes >> 20, "format",
           "threads", "read");
    for (int i = 0; i < 5; i++) printf("   %2d lanes   ", lanes[i]);
    printf("\n");
    for (int f = 0; f < KINDS; f++) {
        ouro_matrix w = make_matrix(kinds[f].format, bytes);
        ouro_acts x = make_acts(kinds[f].acts, w.kpad, 8);
        float *out = ouro_alloc((size_t)w.tiles * OURO_TILE * 8 * sizeof *out);
        memset(out, 0, (size_t)w.tiles * OURO_TILE * 8 * sizeof *out);
        work j = {.k = k, .w = &w, .x = &x, .out = out, .out_stride = (size_t)w.tiles * OURO_TILE, .acts = kinds[f].acts,
                  .repeats = 1};
        for (int threads = 1; threads <= MAX_THREADS; threads++) {
            double gigabytes = (double)ouro_matrix_bytes(&w) * 1e-9;
            j.run = run_read;
            double read = gigabytes / best_time(&j, threads, 4);
            printf("%-9s %7d %7.1f", kinds[f].name, threads, read);
            j.run = run_product;
            for (int i = 0; i < 5; i++) {
                j.lanes = lanes[i];
                double rate = gigabytes / best_time(&j, threads, 4);
                printf("  %5.1f (%3.0f%%)", rate, 100.0 * rate / read);
            }
            printf("\n");
            fflush(stdout);
        }
        ouro_free(out);
        free_acts(&x);
        ouro_big_free(w.data, ouro_matrix_bytes(&w));
    }
}

static void prefill(const ouro_kernels *k)
{
    static const int lanes[] = {12, 64, 256, 512};
    printf("\nprefill, %s, 2048 x %d weights, GFLOP/s (share of the unit's peak)\n%-9s %7s %7s", k->name, COLS, "format",
           "threads", "peak");
    for (int i = 0; i < 4; i++) printf("   %3d lanes   ", lanes[i]);
    printf("\n");
    for (int f = 0; f < KINDS; f++) {
        ouro_matrix w;
        ouro_matrix_layout(&w, (ouro_format)kinds[f].format, 2048, COLS, 128);
        w = make_matrix(kinds[f].format, 128 * w.tile_bytes);
        ouro_acts x = make_acts(kinds[f].acts, w.kpad, MAX_LANES);
        float *out = ouro_alloc((size_t)2048 * MAX_LANES * sizeof *out);
        memset(out, 0, (size_t)2048 * MAX_LANES * sizeof *out);
        for (int threads = 1; threads <= MAX_THREADS; threads++) {
            double top = peak(kinds[f].acts, threads);
            printf("%-9s %7d %7.0f", kinds[f].name, threads, top);
            for (int i = 0; i < 4; i++) {
                work j = {.run = run_product, .k = k, .w = &w, .x = &x, .out = out, .out_stride = 2048,
                          .acts = kinds[f].acts, .lanes = lanes[i], .repeats = 1024 / lanes[i]};
                double flops = 2.0 * 2048 * COLS * lanes[i] * j.repeats * 1e-9;
                double rate = flops / best_time(&j, threads, 4);
                printf("  %6.0f (%3.0f%%)", rate, 100.0 * rate / top);
            }
            printf("\n");
            fflush(stdout);
        }
        ouro_free(out);
        free_acts(&x);
        ouro_big_free(w.data, ouro_matrix_bytes(&w));
    }
}

/* ---- the same products by a BLAS ------------------------------------------------------------------------------------ */

static ouro_blas *blas;
static float *dense;                     /* [2048][COLS] */

static void run_sgemm(work *j, int thread, int threads)
{
    int begin = 2048 * thread / threads, end = 2048 * (thread + 1) / threads;
    for (int i = 0; i < j->repeats; i++)
        ouro_blas_sgemm_nt(blas, j->lanes, end - begin, COLS, (const float *)(const void *)j->x->data,
                           j->x->stride / sizeof(float), dense + (size_t)begin * COLS, COLS, j->out + begin, j->out_stride);
}

static void sgemm(const ouro_kernels *k, const char *library)
{
    static const int lanes[] = {1, 4, 12, 64, 256, 512};
    if (ouro_blas_open(library, &blas)) {
        fprintf(stderr, "%s\n", ouro_last_error());
        exit(1);
    }
    ouro_matrix w[2];
    for (int i = 0; i < 2; i++) {
        ouro_matrix_layout(&w[i], i ? OURO_BF16 : OURO_F32, 2048, COLS, 128);
        w[i] = make_matrix(w[i].format, 128 * w[i].tile_bytes);
    }
    ouro_acts x = make_acts(OURO_ACT_F32, COLS, MAX_LANES);
    size_t outputs = (size_t)2048 * MAX_LANES;
    float *out = ouro_alloc(outputs * sizeof *out);
    dense = ouro_alloc((size_t)2048 * COLS * sizeof *dense);
    memset(out, 0, outputs * sizeof *out);
    for (int r = 0; r < 2048; r++) ouro_matrix_get_row(&w[0], r, dense + (size_t)r * COLS);
    printf("%s\nfloat32, 2048 x %d weights, GFLOP/s\n%7s %7s %12s %12s %12s %7s\n", ouro_blas_config(blas), COLS, "threads",
           "lanes", "own, f32", "own, bf16", "OpenBLAS", "peak");
    for (int threads = 1; threads <= MAX_THREADS; threads++)
        for (int i = 0; i < 6; i++) {
            double best[3] = {0};
            for (int turn = 0; turn < 3; turn++)
                for (int c = 0; c < 3; c++) {
                    work j = {.run = c < 2 ? run_product : run_sgemm, .k = k, .w = &w[c & 1], .x = &x, .out = out,
                              .out_stride = 2048, .acts = OURO_ACT_F32, .lanes = lanes[i], .repeats = 1 + 512 / lanes[i]};
                    double rate = 2.0 * 2048 * COLS * lanes[i] * j.repeats * 1e-9 / best_time(&j, threads, 2);
                    if (rate > best[c]) best[c] = rate;
                }
            printf("%7d %7d %12.0f %12.0f %12.0f %7.0f\n", threads, lanes[i], best[0], best[1], best[2],
                   peak(OURO_ACT_F32, threads));
        }
    for (int i = 0; i < 2; i++) ouro_big_free(w[i].data, ouro_matrix_bytes(&w[i]));
    ouro_free(out);
    ouro_free(dense);
    free_acts(&x);
    ouro_blas_close(blas);
}

int main(int argc, char **argv)
{
    size_t bytes = (size_t)(argc > 1 ? atoi(argv[1]) : 512) << 20;
    const ouro_kernels *k = ouro_kernels_select(argc > 2 && strcmp(argv[2], "best") ? argv[2] : NULL);
    const char *what = argc > 3 ? argv[3] : "all";
    if (!k || bytes == 0) {
        fprintf(stderr, "%s\n", k ? "expected megabytes above 0" : ouro_last_error());
        return 1;
    }
    int all = !strcmp(what, "all");
    if (all || !strcmp(what, "decode")) decode(k, bytes);
    if (all || !strcmp(what, "prefill")) prefill(k);
    if (!strcmp(what, "sgemm") && argc > 4) sgemm(k, argv[4]);
    return 0;
}
