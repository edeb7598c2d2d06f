/* dispatch.c - chooses the kernel table: by what was compiled in, what the processor has, what the caller or OURO_ISA
 * asks for, and whether the products agree with the specification.
 *
 * The last point is a self-test of a few microseconds: small matrices of every format, values that make a different
 * order or rounding show, compared with scalar.c bit for bit. A processor whose bf16 dot product rounds differently
 * fails it and gets the next table down, which is slower and right.
 */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include "base/cpu.h"
#include "ouro_status.h"

#include <stdbool.h>
#include <stdlib.h>

#define MOST_TABLES 5                                   /* of one architecture */
#define TEST_TILES 2
#define TEST_LANES 2
#define TEST_COLS 136                                   /* one group of 128 and a bit */
#define TEST_KPAD 256
#define TEST_STRIDE 1088                                /* bytes: 256 f32, and an odd multiple of 64 */
#define TEST_BYTES (TEST_TILES * TEST_COLS * OURO_TILE * sizeof(float))

typedef struct candidate {
    const ouro_kernels *table;
    bool available;
} candidate;

/* best first */
static int candidates(candidate *c)
{
    const ouro_cpu *cpu = ouro_cpu_get();
    int n = 0;
    (void)cpu;
#ifdef OURO_HAVE_AVX512
    c[n++] = (candidate){&ouro_kernels_avx512, cpu->avx2 && cpu->fma && cpu->avx512f && cpu->avx512bw && cpu->avx512vl &&
                                               cpu->avx512dq && cpu->avx512_bf16 && cpu->avx512_vnni};
#endif
#ifdef OURO_HAVE_AVX_VNNI_VL
    c[n++] = (candidate){&ouro_kernels_avx_vnni_vl, cpu->avx2 && cpu->fma && cpu->avx512f && cpu->avx512vl && cpu->avx512_vnni};
#endif
#ifdef OURO_HAVE_AVX_VNNI
    c[n++] = (candidate){&ouro_kernels_avx_vnni, cpu->avx2 && cpu->fma && cpu->avx_vnni};
#endif
#ifdef OURO_HAVE_AVX2
    c[n++] = (candidate){&ouro_kernels_avx2, cpu->avx2 && cpu->fma};
#endif
#ifdef OURO_HAVE_NEON_I8MM
    c[n++] = (candidate){&ouro_kernels_neon_i8mm, cpu->i8mm};
#endif
#ifdef OURO_HAVE_NEON_DOT
    c[n++] = (candidate){&ouro_kernels_neon_dot, cpu->dotprod};
#endif
#ifdef OURO_HAVE_NEON
    c[n++] = (candidate){&ouro_kernels_neon, cpu->neon};
#endif
    c[n++] = (candidate){&ouro_kernels_scalar, true};
    return n;
}

/* ---- self-test ------------------------------------------------------------------------------------------------- */

typedef struct test_data {
    _Alignas(64) uint8_t weights[TEST_BYTES];
    _Alignas(64) uint8_t acts[TEST_LANES * TEST_STRIDE];
    float x[TEST_LANES][TEST_COLS];
    float row[TEST_COLS];
    float scale[TEST_LANES * TEST_KPAD / OURO_GROUP];
    int32_t sum[TEST_LANES * TEST_KPAD / OURO_GROUP4];
    float out[2][TEST_LANES][TEST_TILES * OURO_TILE];
} test_data;

/* values of both signs over some twenty powers of two, now and then zero or denormal */
static float awkward(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    uint32_t u = *state >> 8;
    if (u % 61 == 0) return 0.0f;
    if (u % 67 == 0) return ouro_from_bits(u & 0xffffu);
    return ouro_from_bits((u & 1u) << 31 | (117u + (u >> 1) % 20u) << 23 | (u >> 1 & 0x7fffffu));
}

static void fill_acts(test_data *d, ouro_acts *x)
{
    for (int l = 0; l < TEST_LANES; l++) {
        uint8_t *row = d->acts + (size_t)l * TEST_STRIDE;
        if (x->kind == OURO_ACT_F32) memcpy(row, d->x[l], sizeof d->x[l]);
        else if (x->kind == OURO_ACT_BF16)
            ouro_kernels_scalar.to_bf16(d->x[l], TEST_COLS, x->kpad, (uint16_t *)(void *)row);
        else
            ouro_kernels_scalar.to_s8(d->x[l], TEST_COLS, x->kpad, (int8_t *)row, d->scale + l * x->kpad / OURO_GROUP,
                                      d->sum + l * x->kpad / OURO_GROUP4);
    }
}

/* the table's product and fused product of one pair of kinds, against the specification */
static bool agrees(const ouro_kernels *k, int format, int kind, test_data *d)
{
    ouro_matrix w;
    ouro_matrix_layout(&w, (ouro_format)format, TEST_TILES * OURO_TILE, TEST_COLS, TEST_TILES);
    if (ouro_matrix_bytes(&w) > sizeof d->weights) return false;
    w.data = d->weights;
    memset(w.data, 0, ouro_matrix_bytes(&w));
    uint32_t state = 7u + (uint32_t)format;
    for (int r = 0; r < w.rows; r++) {
        for (int i = 0; i < TEST_COLS; i++) d->row[i] = awkward(&state);
        ouro_matrix_put_row(&w, r, OURO_DT_F32, d->row);
    }
    ouro_acts x = {.kind = kind, .kpad = w.kpad, .stride = TEST_STRIDE, .data = d->acts};
    if (kind == OURO_ACT_S8) x.scale = d->scale, x.sum = d->sum;
    for (int l = 0; l < TEST_LANES; l++)
        for (int i = 0; i < TEST_COLS; i++) d->x[l][i] = awkward(&state);
    fill_acts(d, &x);

    size_t stride = TEST_TILES * OURO_TILE;
    const ouro_kernels *both[2] = {&ouro_kernels_scalar, k};
    for (int i = 0; i < 2; i++) both[i]->matmul[format][kind](&w, 0, TEST_TILES, &x, 0, TEST_LANES, d->out[i][0], stride, NULL);
    if (memcmp(d->out[0], d->out[1], sizeof d->out[0])) return false;
    memset(d->out, 0, sizeof d->out);
    for (int i = 0; i < 2; i++) both[i]->swiglu[format][kind](&w, 0, TEST_TILES / 2, &x, 0, TEST_LANES, d->out[i][0], stride);
    return !memcmp(d->out[0], d->out[1], sizeof d->out[0]);
}

static bool self_test(const ouro_kernels *k)
{
    test_data d;                                        /* 30 KB */
    memset(&d, 0, sizeof d);
    unsigned mode = ouro_ftz_enter();
    bool good = true;
    for (int format = 0; format < OURO_N_FORMATS; format++)
        for (int kind = 0; kind < OURO_N_ACTS; kind++)
            if (ouro_kernels_scalar.matmul[format][kind]) good = good && agrees(k, format, kind, &d);
    ouro_ftz_leave(mode);
    return good;
}

/* ---- choice ---------------------------------------------------------------------------------------------------- */

static const char *name_list(const candidate *c, int n, char *buffer, size_t size)
{
    size_t used = 0;
    for (int i = 0; i < n; i++)
        if (c[i].available && used + 16 < size) {
            if (used) buffer[used++] = ' ';
            size_t length = strlen(c[i].table->name);
            memcpy(buffer + used, c[i].table->name, length);
            used += length;
        }
    buffer[used] = '\0';
    return buffer;
}

const ouro_kernels *ouro_kernels_select(const char *want)
{
    candidate c[MOST_TABLES];
    int n = candidates(c), first = 0;
    char names[96];
    if (!want || !*want) want = getenv("OURO_ISA");
    if (want && *want) {
        while (first < n && strcmp(c[first].table->name, want)) first++;
        if (first == n || !c[first].available) {
            ouro_fail(OURO_ERR_UNSUPPORTED, "instruction set '%s' is not available here; expected one of: %s", want,
                      name_list(c, n, names, sizeof names));
            return NULL;
        }
        if (c[first].table == &ouro_kernels_scalar || self_test(c[first].table)) return c[first].table;
        ouro_fail(OURO_ERR_UNSUPPORTED, "instruction set '%s' does not round as specified on this processor", want);
        return NULL;
    }
    for (int i = 0; i < n; i++)
        if (c[i].available && (c[i].table == &ouro_kernels_scalar || self_test(c[i].table))) return c[i].table;
    return &ouro_kernels_scalar;
}
