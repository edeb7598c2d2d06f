/* pack.c - weights into tiles of 16 rows, in the layouts of kernels.h, one row at a time; and back.
 *
 * int8: scale = max |w| / 127 of a group of 128, rounded to bf16, q = rint(w / scale).
 * int4: q in -8..7 of a group of 64; among a few scales around -w_extreme / 8 the one of least squared error.
 */
#include "kernels/kernels.h"
#include "kernels/math.h"

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

void ouro_matrix_layout(ouro_matrix *m, ouro_format format, int rows, int cols, int tiles)
{
    m->format = (int)format;
    m->rows = rows;
    m->cols = cols;
    m->tiles = tiles;
    m->data = NULL;
    m->next = NULL;
    m->kpad = round_up(cols, format == OURO_INT8 || format == OURO_INT4 ? OURO_GROUP : 8);
    size_t k = (size_t)m->kpad, row = OURO_TILE;
    size_t scales = 0, body = 0;
    switch (format) {
    case OURO_F32: body = k * row * 4; break;
    case OURO_INT8: scales = k / OURO_GROUP * row * 2, body = k * row; break;
    case OURO_INT4: scales = k / OURO_GROUP4 * row * 2, body = k * row / 2; break;
    default: body = k * row * 2; break;
    }
    m->tile_bytes = ((scales + 63) & ~(size_t)63) + body;
    m->unit_bytes = 64;
}

void ouro_matrix_layout_side(ouro_matrix *m, ouro_format format, int rows, int cols, int tiles)
{
    ouro_matrix_layout(m, format, rows, cols, tiles);
    m->tile_bytes = format == OURO_S8 ? OURO_TILE : 64;
    m->unit_bytes = (size_t)tiles * m->tile_bytes;
}

size_t ouro_dtype_size(ouro_dtype dtype) { return dtype == OURO_DT_F32 ? 4 : 2; }

static float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
    if (exponent == 31) return ouro_from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent) return ouro_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
}

void ouro_widen(ouro_dtype dtype, const void *src, size_t n, float *dst)
{
    const uint16_t *half = src;
    if (dtype == OURO_DT_F32) memcpy(dst, src, n * sizeof *dst);
    else if (dtype == OURO_DT_F16) for (size_t i = 0; i < n; i++) dst[i] = f16_to_f32(half[i]);
    else for (size_t i = 0; i < n; i++) dst[i] = ouro_bf16_to_f32(half[i]);
}

typedef struct tile_row {
    uint8_t *scales, *body;
    int row;
} tile_row;

static tile_row locate(const ouro_matrix *m, int slot)
{
    int group = m->format == OURO_INT8 ? OURO_GROUP : OURO_GROUP4;
    size_t scales = m->format >= OURO_INT8 ? (size_t)(m->kpad / group) * 2 * OURO_TILE : 0;
    uint8_t *tile = m->data + (size_t)(slot / OURO_TILE) * m->tile_bytes;
    return (tile_row){tile, tile + ((scales + 63) & ~(size_t)63), slot % OURO_TILE};
}

/* 0, or NaN when a value is not finite: added to a scale it makes the product show what no integer can */
static float poison(const float *w, int n)
{
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += w[i] * 0.0f;
    return sum;
}

static void put_int8(const tile_row *t, int group, const float *w)
{
    float amax = 0.0f;
    for (int i = 0; i < OURO_GROUP; i++) amax = fabsf(w[i]) > amax ? fabsf(w[i]) : amax;
    uint16_t scale = ouro_f32_to_bf16(amax / 127.0f + poison(w, OURO_GROUP));
    float s = ouro_bf16_to_f32(scale), inverse = s > 0.0f ? 1.0f / s : 0.0f;
    ((uint16_t *)(void *)t->scales)[group * OURO_TILE + t->row] = scale;
    for (int i = 0; i < OURO_GROUP; i++) {
        float q = rintf(w[i] * inverse);
        q = q > -127.0f ? q : -127.0f;           /* NaN too */
        q = q < 127.0f ? q : 127.0f;
        t->body[(((size_t)group * 32 + (size_t)(i / 4)) * OURO_TILE + (size_t)t->row) * 4 + (size_t)(i % 4)] =
            (uint8_t)((int)q + 128);
    }
}

/* squared error of one group with one scale; q [64] in 0..15 */
static float quantize4(const float *w, float s, uint8_t *q)
{
    float error = 0.0f, inverse = s != 0.0f ? 1.0f / s : 0.0f;
    for (int i = 0; i < OURO_GROUP4; i++) {
        float v = rintf(w[i] * inverse);
        v = v > -8.0f ? v : -8.0f;               /* NaN too */
        v = v < 7.0f ? v : 7.0f;
        q[i] = (uint8_t)((int)v + 8);
        error += (w[i] - v * s) * (w[i] - v * s);
    }
    return error;
}

static void store4(const tile_row *t, int group, uint16_t scale, const uint8_t *q)
{
    ((uint16_t *)(void *)t->scales)[group * OURO_TILE + t->row] = scale;
    for (int i = 0; i < OURO_GROUP4 / 2; i++)
        t->body[(((size_t)group * 8 + (size_t)(i / 4)) * OURO_TILE + (size_t)t->row) * 4 + (size_t)(i % 4)] =
            (uint8_t)(q[i] | q[i + 32] << 4);
}

static void put_int4(const tile_row *t, int group, const float *w)
{
    static const float divisor[] = {-8.0f, -7.5f, -7.0f, -8.5f, 7.0f, 7.5f, -6.5f, 8.0f};
    float extreme = 0.0f, least = INFINITY;
    for (int i = 0; i < OURO_GROUP4; i++) extreme = fabsf(w[i]) > fabsf(extreme) ? w[i] : extreme;
    uint8_t best[OURO_GROUP4], q[OURO_GROUP4];
    uint16_t scale = 0;
    memset(best, 8, sizeof best);
    for (size_t c = 0; c < sizeof divisor / sizeof *divisor; c++) {
        uint16_t s = ouro_f32_to_bf16(extreme / divisor[c]);
        float error = quantize4(w, ouro_bf16_to_f32(s), q);
        if (error <= least) least = error, scale = s, memcpy(best, q, sizeof q);
    }
    store4(t, group, poison(w, OURO_GROUP4) == 0.0f ? scale : 0x7fc0, best);
}

/* bf16 to bf16 tiles: the case of the released checkpoints, a plain scatter of 32-bit pairs */
static void put_pairs(const tile_row *t, const uint16_t *src, int cols)
{
    uint16_t *body = (uint16_t *)(void *)t->body;
    for (int k = 0; k + 1 < cols; k += 2)
        memcpy(body + (size_t)k * OURO_TILE + (size_t)t->row * 2, src + k, 4);
    if (cols & 1) body[ouro_tile_at(OURO_BF16, t->row, cols - 1)] = src[cols - 1];
}

void ouro_matrix_put_row(ouro_matrix *m, int slot, ouro_dtype dtype, const void *src)
{
    tile_row t = locate(m, slot);
    if (m->format == OURO_BF16 && dtype == OURO_DT_BF16) {
        put_pairs(&t, src, m->cols);
        return;
    }
    for (int k = 0; k < m->cols; k += OURO_GROUP) {
        float w[OURO_GROUP] = {0};
        int n = m->cols - k < OURO_GROUP ? m->cols - k : OURO_GROUP;
        ouro_widen(dtype, (const uint8_t *)src + (size_t)k * ouro_dtype_size(dtype), (size_t)n, w);
        if (m->format == OURO_INT8) put_int8(&t, k / OURO_GROUP, w);
        else if (m->format == OURO_INT4) {
            put_int4(&t, k / OURO_GROUP4, w);
            put_int4(&t, k / OURO_GROUP4 + 1, w + OURO_GROUP4);
        } else for (int i = 0; i < n; i++) {
            size_t at = ouro_tile_at(m->format, t.row, k + i);
            if (m->format == OURO_F32) ((float *)(void *)t.body)[at] = w[i];
            else ((uint16_t *)(void *)t.body)[at] = ouro_f32_to_bf16(w[i]);
        }
    }
}

void ouro_matrix_put_int4(ouro_matrix *m, int slot, const uint16_t *scales, const int8_t *q)
{
    tile_row t = locate(m, slot);
    for (int group = 0; group < m->kpad / OURO_GROUP4; group++) {
        uint8_t stored[OURO_GROUP4];
        int k = group * OURO_GROUP4;
        for (int i = 0; i < OURO_GROUP4; i++) {
            int v = k + i < m->cols ? q[k + i] : 0;
            stored[i] = (uint8_t)((v < -8 ? -8 : v > 7 ? 7 : v) + 8);
        }
        store4(&t, group, k < m->cols ? scales[group] : 0, stored);
    }
}

static float get_one(const ouro_matrix *m, const tile_row *t, int k)
{
    size_t row = (size_t)t->row;
    const uint16_t *scales = (const uint16_t *)(const void *)t->scales;
    if (m->format == OURO_F32) return ((const float *)(const void *)t->body)[ouro_tile_at(OURO_F32, t->row, k)];
    if (m->format == OURO_BF16)
        return ouro_bf16_to_f32(((const uint16_t *)(const void *)t->body)[ouro_tile_at(OURO_BF16, t->row, k)]);
    if (m->format == OURO_INT8) {
        int q = t->body[((size_t)(k / 4) * OURO_TILE + row) * 4 + (size_t)(k % 4)];
        return (float)(q - 128) * ouro_bf16_to_f32(scales[(size_t)(k / OURO_GROUP) * OURO_TILE + row]);
    }
    int group = k / OURO_GROUP4, i = k % OURO_GROUP4, low = i % 32;
    int byte = t->body[(((size_t)group * 8 + (size_t)(low / 4)) * OURO_TILE + row) * 4 + (size_t)(low % 4)];
    int q = i < 32 ? byte & 15 : byte >> 4;
    return (float)(q - 8) * ouro_bf16_to_f32(scales[(size_t)group * OURO_TILE + row]);
}

void ouro_matrix_get_row(const ouro_matrix *m, int slot, float *dst)
{
    tile_row t = locate(m, slot);
    for (int k = 0; k < m->cols; k++) dst[k] = get_one(m, &t, k);
}
