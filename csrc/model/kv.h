/* kv.h - keys and values: one page holds 64 positions of one sequence at one step, all layers.
 *
 *   page     [layer][kv head] blocks
 *   block    K then V, each a packed matrix of kernels.h with its tiles side by side, so that attention is two products:
 *            K: 4 tiles of 16 positions, k = d_head        scores  = K q
 *            V: d_head / 16 tiles, k = 64 positions        output += V p
 *   INT8     the same in s8, one element after the other, and one f32 scale per position for K and for V
 *
 * One lane reads a block from its first byte to its last, and the blocks of several heads one behind the other: a stream
 * that the hardware follows. A page is zero when new, so that masked positions hold finite numbers. A *side row* is the key
 * and value of one position outside of any page (a speculative token): [layer][kv head][K, V][d_head] in the type of the page.
 */
#ifndef OURO_MODEL_KV_H
#define OURO_MODEL_KV_H

#include <stddef.h>
#include <stdint.h>

#include "model/model.h"

typedef enum ouro_kv_dtype { OURO_KV_F32 = 0, OURO_KV_BF16 = 1, OURO_KV_INT8 = 2 } ouro_kv_dtype;

typedef struct ouro_kv_layout {
    ouro_kv_dtype dtype;
    int n_layers, n_kv_heads, d_head;
    int k_pad;                   /* d_head rounded up to 8 */
    int v_tiles;                 /* tiles of 16 rows of V */
    size_t k_elements, v_elements;           /* of one block */
    size_t k_scales, v_scales, v_data;       /* byte offsets inside a block; K data is at 0 */
    size_t block_bytes, layer_bytes, page_bytes;
    size_t side_row_bytes;       /* one K or V row of a side row */
    size_t side_layer_bytes, side_bytes;     /* of one layer; of all layers (one step) */
} ouro_kv_layout;

/* dtype F32 for float32 compute; BF16 or INT8 otherwise. */
int ouro_kv_layout_init(ouro_kv_layout *y, const ouro_config *c, ouro_kv_dtype dtype);

static inline uint8_t *ouro_kv_block(const ouro_kv_layout *y, uint8_t *page, int layer, int head)
{
    return page + (size_t)layer * y->layer_bytes + (size_t)head * y->block_bytes;
}

static inline uint8_t *ouro_side_row(const ouro_kv_layout *y, const uint8_t *side, int layer, int head, int is_v)
{
    return (uint8_t *)(uintptr_t)side + (size_t)layer * y->side_layer_bytes + (size_t)(2 * head + is_v) * y->side_row_bytes;
}

/* k, v [d_head] f32 to slot `at` (0..63) of a block */
void ouro_kv_store(const ouro_kv_layout *y, uint8_t *block, int at, const float *k, const float *v);
/* the same for slots [at, at + n), n at most 16 and all in one tile of keys; k, v [n][stride] */
void ouro_kv_store_run(const ouro_kv_layout *y, const ouro_kernels *kernels, uint8_t *block, int at, int n, const float *k,
                       const float *v, size_t stride);
/* the same to the two rows of a side row, and from there to a block: the bits of ouro_kv_store */
void ouro_side_store(const ouro_kv_layout *y, uint8_t *k_row, uint8_t *v_row, const float *k, const float *v);
void ouro_side_to_block(const ouro_kv_layout *y, uint8_t *block, int at, const uint8_t *k_row, const uint8_t *v_row);
/* The first n positions of a block (NULL: zeros), where a few more will be laid over them: values behind them are zero,
 * keys behind their tile are left as they were. */
void ouro_kv_copy_first(const ouro_kv_layout *y, uint8_t *to, const uint8_t *block, int n);
/* The mean of n side rows, or of n pages, element by element: f32 sum in ascending order, divided by n, rounded to the
 * layout's type as a fresh entry would be. `out` may be one of them. The two agree bit by bit for the same entries. */
void ouro_side_mean(const ouro_kv_layout *y, uint8_t *const *sides, int n, uint8_t *out);
void ouro_page_mean(const ouro_kv_layout *y, uint8_t *const *pages, int n, uint8_t *out);
/* slot `at` of a block back as f32 [d_head], for inspection */
void ouro_kv_load(const ouro_kv_layout *y, const uint8_t *block, int at, float *k, float *v);

/* Views of a block as matrices for the product kernels, K first, that n_rows rows will be multiplied with. For INT8 and more than
 * a few rows `scratch` (as many bf16 as K or V has elements, 64-byte aligned; the same for both) receives it expanded; the scales
 * stay outside: see ouro_kv_k_scales. `next` is the block that will be read after this one, or NULL: it is asked for meanwhile. */
void ouro_kv_view_k(const ouro_kv_layout *y, const ouro_kernels *kernels, const uint8_t *block, int n_rows,
                    uint16_t *scratch, ouro_matrix *k);
void ouro_kv_view_v(const ouro_kv_layout *y, const ouro_kernels *kernels, const uint8_t *block, const uint8_t *next,
                    int n_rows, uint16_t *scratch, ouro_matrix *v);
/* [64] f32 scales of K and V rows; NULL unless INT8 */
const float *ouro_kv_k_scales(const ouro_kv_layout *y, const uint8_t *block);
const float *ouro_kv_v_scales(const ouro_kv_layout *y, const uint8_t *block);

#endif
