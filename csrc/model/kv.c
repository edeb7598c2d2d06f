/* kv.c - reading and writing cache blocks; see kv.h for the layout. */
#include "model/kv.h"

#include <math.h>
#include <string.h>

#include "kernels/math.h"
#include "ouro_status.h"

static size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

static size_t element_bytes(ouro_kv_dtype d) { return d == OURO_KV_F32 ? 4 : d == OURO_KV_BF16 ? 2 : 1; }

int ouro_kv_layout_init(ouro_kv_layout *y, const ouro_config *c, ouro_kv_dtype dtype)
{
    if ((unsigned)dtype > OURO_KV_INT8) return ouro_fail(OURO_ERR_ARGUMENT, "unknown kv dtype %d", (int)dtype);
    memset(y, 0, sizeof *y);
    y->dtype = dtype;
    y->n_layers = c->n_layers;
    y->n_kv_heads = c->n_kv_heads;
    y->d_head = c->d_head;
    y->k_pad = ouro_round_up(c->d_head, 8);
    y->v_tiles = ouro_head_tiles(c);
    y->k_elements = (size_t)OURO_BLOCK * (size_t)y->k_pad;
    y->v_elements = (size_t)OURO_BLOCK * (size_t)y->v_tiles * OURO_TILE;
    size_t e = element_bytes(dtype), scales = dtype == OURO_KV_INT8 ? OURO_BLOCK * sizeof(float) : 0;
    y->k_scales = align64(y->k_elements * e);
    y->v_scales = y->k_scales + scales;          /* in the order in which they are read */
    y->v_data = y->v_scales + scales;
    y->block_bytes = y->v_data + align64(y->v_elements * e);
    y->layer_bytes = y->block_bytes * (size_t)c->n_kv_heads;
    y->page_bytes = y->layer_bytes * (size_t)c->n_layers;
    y->side_row_bytes = ((size_t)c->d_head * e + (dtype == OURO_KV_INT8 ? 4 : 0) + 3) & ~(size_t)3;
    y->side_layer_bytes = 2 * y->side_row_bytes * (size_t)c->n_kv_heads;
    y->side_bytes = y->side_layer_bytes * (size_t)c->n_layers;
    return OURO_OK;
}

/* How many elements of a position stand together: a pair in bf16. */
static int together(const ouro_kv_layout *y) { return y->dtype == OURO_KV_BF16 ? 2 : 1; }

static int v_pad(const ouro_kv_layout *y) { return y->v_tiles * OURO_TILE; }

/* Element offsets of (position, i) in K [k_pad / n][64 positions][n] and V [64 / n][v_pad][n], n of them together. */
static size_t k_at(const ouro_kv_layout *y, int at, int i)
{
    int n = together(y);
    return (size_t)(i / n * OURO_BLOCK + at) * (size_t)n + (size_t)(i % n);
}

static size_t v_at(const ouro_kv_layout *y, int at, int i)
{
    int n = together(y);
    return (size_t)(at / n * v_pad(y) + i) * (size_t)n + (size_t)(at % n);
}

/* ---- rows --------------------------------------------------------------------------------------------------- */

/* The rules of ouro_f32_to_bf16 without its branches, so that compilers make vectors of it. */
static void round_row(uint16_t *restrict y, const float *restrict x, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t u = ouro_bits(x[i]), magnitude = u & 0x7fffffffu;
        uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, top = u >> 16;
        uint32_t usual = magnitude > 0x7f800000u ? top | 0x40u : rounded;
        y[i] = (uint16_t)(magnitude < 0x00800000u ? top & 0x8000u : usual);
    }
}

/* x [d_head] f32 to a side row of the layout's type; INT8: scale = amax / 127 behind the values */
static void row_from_f32(const ouro_kv_layout *y, uint8_t *row, const float *x)
{
    int n = y->d_head;
    if (y->dtype == OURO_KV_F32) {
        memcpy(row, x, (size_t)n * sizeof *x);
    } else if (y->dtype == OURO_KV_BF16) {
        round_row((uint16_t *)(void *)row, x, n);
    } else {
        float amax = 0.0f;
        for (int i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        float inverse = amax > 0.0f ? 127.0f / amax : 0.0f, scale = amax / 127.0f;
        for (int i = 0; i < n; i++) {
            float q = rintf(x[i] * inverse);
            row[i] = (uint8_t)(int8_t)(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q);
        }
        memcpy(row + n, &scale, sizeof scale);
    }
}

void ouro_side_store(const ouro_kv_layout *y, uint8_t *k_row, uint8_t *v_row, const float *k, const float *v)
{
    row_from_f32(y, k_row, k);
    row_from_f32(y, v_row, v);
}

/* One position's key and value into a block: the order of k_at and v_at with the position's part taken out. This runs for
 * every lane, layer and head, so it is spelt out by element type. */
static void place_bf16(uint16_t *k, uint16_t *v, int at, const uint16_t *k_row, const uint16_t *v_row, int n, int pad)
{
    k += (size_t)at * 2;
    v += (size_t)(at / 2) * 2 * (size_t)pad + (size_t)(at % 2);
    for (int i = 0; i < n; i++) {
        k[(size_t)(i / 2) * 2 * OURO_BLOCK + (size_t)(i % 2)] = k_row[i];
        v[(size_t)i * 2] = v_row[i];
    }
}

#define PLACE_ONES(name, type)                                                                                      \
    static void name(type *k, type *v, int at, const type *k_row, const type *v_row, int n, int pad)                \
    {                                                                                                               \
        for (int i = 0; i < n; i++) k[(size_t)i * OURO_BLOCK + (size_t)at] = k_row[i];                              \
        memcpy(v + (size_t)at * (size_t)pad, v_row, (size_t)n * sizeof *v);                                         \
    }
PLACE_ONES(place_f32, float)
PLACE_ONES(place_s8, uint8_t)

void ouro_side_to_block(const ouro_kv_layout *y, uint8_t *block, int at, const uint8_t *k_row, const uint8_t *v_row)
{
    void *k = block, *v = block + y->v_data;               /* blocks and side rows are aligned for their elements */
    const void *from_k = k_row, *from_v = v_row;
    if (y->dtype == OURO_KV_F32) place_f32(k, v, at, from_k, from_v, y->d_head, v_pad(y));
    else if (y->dtype == OURO_KV_BF16) place_bf16(k, v, at, from_k, from_v, y->d_head, v_pad(y));
    else place_s8(k, v, at, from_k, from_v, y->d_head, v_pad(y));
    if (y->dtype == OURO_KV_INT8) {
        memcpy(block + y->k_scales + (size_t)at * 4, k_row + y->d_head, 4);
        memcpy(block + y->v_scales + (size_t)at * 4, v_row + y->d_head, 4);
    }
}

void ouro_kv_store(const ouro_kv_layout *y, uint8_t *block, int at, const float *k, const float *v)
{
    union { float f32; uint8_t bytes[1024 * 4 + 4]; } k_row, v_row;      /* d_head is at most 1024 */
    ouro_side_store(y, k_row.bytes, v_row.bytes, k, v);
    ouro_side_to_block(y, block, at, k_row.bytes, v_row.bytes);
}

/* The sixteen positions of one tile of keys, rows [16][d] bf16. Where one position at a time touches a line for every pair
 * of elements, this fills lines: the pair (i, i + 1) of a key is one word beside those of its neighbours. */
static void place_keys(uint16_t *k, const uint16_t *rows, int d)
{
    for (int i = 0; i < d; i += 2, k += 2 * OURO_BLOCK)
        for (int r = 0; r < OURO_TILE; r++) memcpy(k + 2 * r, rows + (size_t)r * (size_t)d + i, 2 * sizeof *k);
}

/* the values of an even position and the next, a and b [d]: elements of a and b in turn */
static void place_two_values(uint16_t *restrict v, const uint16_t *restrict a, const uint16_t *restrict b, int d)
{
    for (int i = 0; i < d; i++) v[2 * i] = a[i], v[2 * i + 1] = b[i];
}

void ouro_kv_store_run(const ouro_kv_layout *y, const ouro_kernels *kernels, uint8_t *block, int at, int n, const float *k,
                       const float *v, size_t stride)
{
    size_t d = (size_t)y->d_head;
    if (y->dtype != OURO_KV_BF16 || n != OURO_TILE) {
        for (int r = 0; r < n; r++) ouro_kv_store(y, block, at + r, k + (size_t)r * stride, v + (size_t)r * stride);
        return;
    }
    uint16_t rows[OURO_TILE * 1024], *keys = (uint16_t *)(void *)block, *values = (uint16_t *)(void *)(block + y->v_data);
    for (size_t r = 0; r < OURO_TILE; r++) kernels->to_bf16(k + r * stride, y->d_head, y->d_head, rows + r * d);
    place_keys(keys + (size_t)at * 2, rows, y->d_head);
    for (size_t r = 0; r < OURO_TILE; r++) kernels->to_bf16(v + r * stride, y->d_head, y->d_head, rows + r * d);
    for (size_t r = 0; r < OURO_TILE; r += 2)
        place_two_values(values + ((size_t)at + r) * (size_t)v_pad(y), rows + r * d, rows + (r + 1) * d, y->d_head);
}

static float load_one(const ouro_kv_layout *y, const uint8_t *base, size_t at, const uint8_t *scale)
{
    if (y->dtype == OURO_KV_F32) return ((const float *)(const void *)base)[at];
    if (y->dtype == OURO_KV_BF16) return ouro_bf16_to_f32(((const uint16_t *)(const void *)base)[at]);
    float s;
    memcpy(&s, scale, sizeof s);
    return (float)(int8_t)base[at] * s;
}

void ouro_kv_load(const ouro_kv_layout *y, const uint8_t *block, int at, float *k, float *v)
{
    for (int i = 0; i < y->d_head; i++) {
        k[i] = load_one(y, block, k_at(y, at, i), block + y->k_scales + (size_t)at * 4);
        v[i] = load_one(y, block + y->v_data, v_at(y, at, i), block + y->v_scales + (size_t)at * 4);
    }
}

void ouro_kv_copy_first(const ouro_kv_layout *y, uint8_t *to, const uint8_t *block, int n)
{
    size_t e = element_bytes(y->dtype), line = (size_t)together(y) * OURO_BLOCK * e;
    size_t keys = line / OURO_BLOCK * (size_t)ouro_round_up(n, OURO_TILE);
    for (size_t at = 0; at < y->k_elements * e; at += line) {
        if (block) memcpy(to + at, block + at, keys);
        else memset(to + at, 0, keys);
    }
    size_t values = y->v_elements * e, used = values / OURO_BLOCK * (size_t)ouro_round_up(n, 2);
    if (block) memcpy(to + y->v_data, block + y->v_data, used);
    else memset(to + y->v_data, 0, used);
    memset(to + y->v_data + used, 0, values - used);
    if (y->dtype != OURO_KV_INT8) return;
    size_t scales = OURO_BLOCK * sizeof(float);
    for (int i = 0; i < 2; i++) {
        size_t at = i ? y->v_scales : y->k_scales;
        if (block) memcpy(to + at, block + at, scales);
        else memset(to + at, 0, scales);
    }
}

/* ---- means -------------------------------------------------------------------------------------------------- */

static float row_at(const ouro_kv_layout *y, const uint8_t *row, int i)
{
    return load_one(y, row, (size_t)i, row + y->d_head);
}

void ouro_side_mean(const ouro_kv_layout *y, uint8_t *const *sides, int n, uint8_t *out)
{
    float mean[1024];                                      /* d_head is at most 1024 */
    for (size_t at = 0; at < y->side_bytes; at += y->side_row_bytes) {
        for (int i = 0; i < y->d_head; i++) {
            mean[i] = row_at(y, sides[0] + at, i);
            for (int s = 1; s < n; s++) mean[i] += row_at(y, sides[s] + at, i);
            mean[i] /= (float)n;
        }
        row_from_f32(y, out + at, mean);
    }
}

/* Blocks of f32 and bf16 are plain elements in one order, whatever their place: the mean of each with its like. */
static void mean_elements(const ouro_kv_layout *y, uint8_t *const *pages, int n, uint8_t *out)
{
    size_t count = y->page_bytes / element_bytes(y->dtype);
    for (size_t i = 0; i < count; i++) {
        float mean = load_one(y, pages[0], i, NULL);
        for (int s = 1; s < n; s++) mean += load_one(y, pages[s], i, NULL);
        mean /= (float)n;
        if (y->dtype == OURO_KV_F32) ((float *)(void *)out)[i] = mean;
        else ((uint16_t *)(void *)out)[i] = ouro_f32_to_bf16(mean);
    }
}

/* INT8: the values of each position are dequantised, and their mean quantised anew. */
static void mean_positions(const ouro_kv_layout *y, uint8_t *const *pages, int n, uint8_t *out)
{
    float k[1024], v[1024], k_mean[1024], v_mean[1024];
    for (size_t block = 0; block < y->page_bytes; block += y->block_bytes)
        for (int at = 0; at < OURO_BLOCK; at++) {
            ouro_kv_load(y, pages[0] + block, at, k_mean, v_mean);
            for (int s = 1; s < n; s++) {
                ouro_kv_load(y, pages[s] + block, at, k, v);
                for (int i = 0; i < y->d_head; i++) k_mean[i] += k[i], v_mean[i] += v[i];
            }
            for (int i = 0; i < y->d_head; i++) k_mean[i] /= (float)n, v_mean[i] /= (float)n;
            ouro_kv_store(y, out + block, at, k_mean, v_mean);
        }
}

void ouro_page_mean(const ouro_kv_layout *y, uint8_t *const *pages, int n, uint8_t *out)
{
    if (y->dtype == OURO_KV_INT8) mean_positions(y, pages, n, out);
    else mean_elements(y, pages, n, out);
}

/* ---- views -------------------------------------------------------------------------------------------------- */

/* An int8 matrix at `q` as it is for few rows of activations, or as bf16 in `scratch` where many make up for it. */
#define FEW_ROWS 2
static void view(const ouro_kv_layout *y, const ouro_kernels *kernels, const uint8_t *q, const uint8_t *next, int n_rows,
                 uint16_t *scratch, ouro_matrix *m)
{
    int expands = y->dtype == OURO_KV_INT8 && n_rows > FEW_ROWS, rows = m->tiles * OURO_TILE;
    ouro_format format = y->dtype == OURO_KV_F32 ? OURO_F32 : y->dtype == OURO_KV_BF16 || expands ? OURO_BF16 : OURO_S8;
    ouro_matrix_layout_side(m, format, m->rows, m->cols, m->tiles);
    m->data = expands ? (uint8_t *)scratch : (uint8_t *)(uintptr_t)q;                 /* read only from here on */
    if (expands) kernels->s8_to_bf16((const int8_t *)q, m->kpad, rows, scratch, next);
    else m->next = next;
}

void ouro_kv_view_k(const ouro_kv_layout *y, const ouro_kernels *kernels, const uint8_t *block, int n_rows,
                    uint16_t *scratch, ouro_matrix *k)
{
    *k = (ouro_matrix){.rows = OURO_BLOCK, .cols = y->d_head, .tiles = OURO_BLOCK / OURO_TILE};
    view(y, kernels, block, block + y->v_data, n_rows, scratch, k);
}

void ouro_kv_view_v(const ouro_kv_layout *y, const ouro_kernels *kernels, const uint8_t *block, const uint8_t *next,
                    int n_rows, uint16_t *scratch, ouro_matrix *v)
{
    *v = (ouro_matrix){.rows = y->d_head, .cols = OURO_BLOCK, .tiles = y->v_tiles};
    view(y, kernels, block + y->v_data, next, n_rows, scratch, v);
}

const float *ouro_kv_k_scales(const ouro_kv_layout *y, const uint8_t *block)
{
    return y->dtype == OURO_KV_INT8 ? (const float *)(const void *)(block + y->k_scales) : NULL;
}

const float *ouro_kv_v_scales(const ouro_kv_layout *y, const uint8_t *block)
{
    return y->dtype == OURO_KV_INT8 ? (const float *)(const void *)(block + y->v_scales) : NULL;
}
