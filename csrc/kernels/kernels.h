/* kernels.h - the kernel table: every arithmetic routine that differs by instruction set.
 *
 * scalar.c is the specification. Each other file (avx2.c, avx512.c, neon.c) fills the same table and must return
 * the same bits for the same arguments, in every mode, because a lane's result may not depend on the machine
 * (docs/internals.md, "One answer"). The rules that make this possible:
 *
 *   - every output element of a product is ONE accumulation chain over k, ascending, in the order given below;
 *   - reductions over a row use 16 partial sums (element i goes to partial i % 16, ascending i) folded by the
 *     fixed tree 16 -> 8 -> 4 -> 2 -> 1 (partial j with partial j + half);
 *   - all code runs with denormals flushed (ouro_ftz_enter), round to nearest even, and no contraction: a fused
 *     multiply-add stands in the code as one, or there is none;
 *   - exp is the polynomial of math.h, operation by operation.
 *
 * `kernels` knows no model: only packed matrices, rows of activations, and blocks of 64 scores.
 */
#ifndef OURO_KERNELS_KERNELS_H
#define OURO_KERNELS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define OURO_TILE 16         /* output rows of a packed tile */
#define OURO_BLOCK 64        /* positions of an attention block */
#define OURO_GROUP 128       /* k elements that share an int8 weight scale and an activation scale */
#define OURO_GROUP4 64       /* k elements that share an int4 weight scale; also the unit of `sum` below */

/* How a packed matrix stores its weights. One tile holds 16 rows, all of k, contiguous, 64-byte aligned:
 *   F32   [kpad][16] f32
 *   BF16  [kpad/2][16][2] bf16: the pair (k, k+1) of a row is one 32-bit word, k in the low half
 *   INT8  [groups][16] bf16 scales (padded to a multiple of 64 bytes), then [groups][32][16][4] u8 = q + 128:
 *         four successive k of a row are one 32-bit word
 *   INT4  [2 groups][16] bf16 scales (padded likewise), then per 64 k: [8][16][4] bytes; the low nibble of byte
 *         (v, row, j) is q + 8 of k = 4 v + j, the high nibble of k = 32 + 4 v + j
 * kpad is cols rounded up to 8 (F32, BF16, S8) or to 128 (INT8, INT4); padding holds zero weights.
 *
 * In weights a tile is contiguous, and few lanes read several tiles as so many streams. A block of the cache is too short for
 * that: its tiles stand side by side, the first units of all tiles before the second ones, and it is one stream in whatever
 * way it is read: F32 [kpad][tiles][16], BF16 [kpad/2][tiles][16][2], S8 [kpad][tiles][16] s8 whose unit has 16 bytes. */
typedef enum ouro_format {
    OURO_F32 = 0, OURO_BF16 = 1, OURO_INT8 = 2, OURO_INT4 = 3, OURO_N_FORMATS,     /* of weights */
    OURO_S8 = OURO_N_FORMATS, OURO_N_MATRICES                                     /* and of int8 cache blocks */
} ouro_format;

typedef struct ouro_matrix {
    int format;              /* ouro_format */
    int rows, cols;          /* logical size; rows that no tile slot names are zero */
    int tiles;               /* number of 16-row tiles */
    int kpad;                /* padded cols */
    size_t tile_bytes;       /* bytes from one tile to the next: a multiple of 64; of tiles side by side, a unit */
    size_t unit_bytes;       /* bytes from one unit (64 bytes) of a tile to the next: 64; of tiles side by side, all their units */
    uint8_t *data;           /* [tiles][tile_bytes], 64-byte aligned, owned by whoever made it */
    const uint8_t *next;     /* a hint, tiles side by side: what of the same size is read after it, or NULL */
} ouro_matrix;

/* Rows of activations in the form that a weight format multiplies:
 *   F32 and BF16 weights in float32 compute: f32;  BF16 weights in bfloat16 compute: bf16;  INT8 and INT4: s8 with
 *   one f32 scale per group of 128 and the sum of q over each 64 (to take the weights' offset out). An s8 is -127..127,
 *   never -128: avx2.c moves signs from weights to activations. */
typedef enum ouro_act_kind { OURO_ACT_F32 = 0, OURO_ACT_BF16 = 1, OURO_ACT_S8 = 2, OURO_N_ACTS } ouro_act_kind;

typedef struct ouro_acts {
    int kind;                /* ouro_act_kind */
    int kpad;                /* elements per row, padding included (a multiple of 128 for S8, of 8 else) */
    size_t stride;           /* bytes from one row to the next: a multiple of 64, odd in units of 64 */
    uint8_t *data;           /* [lanes][stride] */
    float *scale;            /* [lanes][kpad / 128] f32, S8 only */
    int32_t *sum;            /* [lanes][kpad / 64] i32, S8 only */
} ouro_acts;

/* out[lane * out_stride + tile * 16 + r] = sum_k w[tile][r][k] x[lane][k]   for tiles [tile0, tile1), lanes [lane0, lane1)
 *   f32 acts:  acc = fma(w, x, acc), k ascending (bf16 and S8 widened)
 *   bf16 acts: per pair acc = fma(w[k+1], x[k+1], acc) then acc = fma(w[k], x[k], acc)   (what vdpbf16ps does)
 *   s8 acts:   per group g, i = exact integer sum of (stored - offset) * q; acc = fma((float)i, ws * xs, acc)
 *              with ws * xs rounded to f32 first; groups ascending (int4: 64 k a group, xs of the 128 around it)
 * acc starts at 0 or, with `kept` (float kinds only), at the product of `out` and kept[lane], rounded: the chain goes on. */
typedef void (*ouro_matmul_fn)(const ouro_matrix *w, int tile0, int tile1, const ouro_acts *x, int lane0, int lane1,
                               float *out, size_t out_stride, const float *kept);

/* n matrices of one layout with tiles side by side one after the other: for i in 0..n-1 what matmul makes of all tiles of w[i] and
 * the activations i * x_step bytes behind x, kept + i * kept_step. Sums of F32 and BF16 stay in registers between them where there
 * are several groups of lanes. */
typedef void (*ouro_chain_fn)(const ouro_matrix *w, int n, const ouro_acts *x, size_t x_step, int lane0, int lane1, float *out,
                              size_t out_stride, const float *kept, size_t kept_step);

/* The same as matmul for a matrix whose tiles alternate gate, up, gate, up: for pairs [pair0, pair1)
 *   out[lane][pair * 16 + r] = silu(gate) * up,  silu(g) = g / (1 + exp(-g))
 * stored as bf16 when x is bf16 (out_stride in elements of what is stored), f32 otherwise. */
typedef void (*ouro_swiglu_fn)(const ouro_matrix *w, int pair0, int pair1, const ouro_acts *x, int lane0, int lane1,
                               void *out, size_t out_stride);

/* One block of 64 scores of each of n query rows, online softmax. s [n][64] raw products; the first visible[r] (1..64) of row r
 * are seen. For each row, with scale > 0:
 *   x_i = s_i * scale;  m' = max(m, max x_i);  alpha = exp(m - m');  p_i = exp(x_i - m'), 0 beyond visible
 *   l = fma(l, alpha, tree sum of p_i as stored);  m = m'
 * p [n] rows of 64 f32 or bf16, `stride` bytes apart; m, l, alpha [n] f32. */
typedef void (*ouro_softmax_fn)(const float *s, int n, const int *visible, float scale, float *m, float *l, float *alpha,
                                void *p, size_t stride);

typedef struct ouro_kernels {
    const char *name;        /* "scalar", "avx2", "avx_vnni" ...: the name of its file */

    ouro_matmul_fn matmul[OURO_N_MATRICES][OURO_N_ACTS];    /* NULL where the pair makes no sense */
    ouro_swiglu_fn swiglu[OURO_N_FORMATS][OURO_N_ACTS];
    ouro_chain_fn chain;

    /* y[n] = silu(g[n]) * u[n], bits of the fused form (used where gate and up are observed) */
    void (*swiglu_rows)(const float *g, const float *u, int n, float *y);

    /* y[d] = (x * r) * w, r = 1 / sqrt(sum(x^2) / d + eps), the sum by the fixed tree with fma; returns r */
    float (*rmsnorm)(const float *x, const float *w, float eps, int d, float *y);
    /* h[d] = h + rmsnorm(a): (a * r) * w is rounded, then added */
    void (*add_rmsnorm)(float *h, const float *a, const float *w, float eps, int d);

    /* sum_i x[i] w[i]: fma into 16 partials, fixed tree */
    float (*dot)(const float *x, const float *w, int n);

    /* y[npad] = x[n] rounded to bf16 (nearest even; denormals to signed zero), zeros after n */
    void (*to_bf16)(const float *x, int n, int npad, uint16_t *y);
    /* groups of 128: amax; scale = amax / 127; q = rint(x * (127 / amax)); all 0 when amax is 0; zeros after n;
     * scale [npad/128], sum [npad/64] */
    void (*to_s8)(const float *x, int n, int npad, int8_t *q, float *scale, int32_t *sum);

    /* in place on one head [dh]: a = x[i], b = x[i + dh/2]:
     *   x[i] = fma(-b, s[i], a * c[i]);  x[i + dh/2] = fma(a, s[i], b * c[i]);  c, s [dh/2] f32 */
    void (*rope)(float *x, const float *c, const float *s, int dh);

    ouro_softmax_fn softmax[OURO_N_ACTS];                  /* F32, BF16: what p is stored as */

    /* x[n] *= a */
    void (*scale_row)(float *x, float a, int n);

    /* y[n] = x[n], for rows that nobody reads soon: past the caches where y is 64-byte aligned and n a multiple of 16 */
    void (*keep_row)(const float *x, int n, float *y);
    /* behind the last keep_row of a thread, before others may read what it wrote */
    void (*keep_done)(void);

    /* one block of 64 with a factor each: s = s * scale; p (bf16) = p * scale rounded as in to_bf16 */
    void (*scale_scores)(float *s, const float *scale);
    void (*scale_weights)(uint16_t *p, const float *scale);

    /* maximum m of z[n], index of the first maximum, s = sum exp(z - m), u = sum exp(z - m) * (z - m): 16 partials
     * each (u by fma), fixed tree. log sum exp = m + log s; entropy = log s - u / s. */
    void (*softmax_stats)(const float *z, int n, float *m, int *argmax, float *s, float *u);

    /* an S8 matrix of tiles side by side as BF16, q being exact in bf16: q [k][rows] to y [k / 2][rows][2], k even and rows a
     * multiple of 16. `next` is a hint, as many bytes that will be read after these, or NULL */
    void (*s8_to_bf16)(const int8_t *q, int k, int rows, uint16_t *y, const void *next);
} ouro_kernels;

extern const ouro_kernels ouro_kernels_scalar;
#ifdef OURO_HAVE_AVX2
extern const ouro_kernels ouro_kernels_avx2;
#endif
#ifdef OURO_HAVE_AVX_VNNI
extern const ouro_kernels ouro_kernels_avx_vnni;
#endif
#ifdef OURO_HAVE_AVX_VNNI_VL
extern const ouro_kernels ouro_kernels_avx_vnni_vl;
#endif
#ifdef OURO_HAVE_AVX512
extern const ouro_kernels ouro_kernels_avx512;
#endif
#ifdef OURO_HAVE_NEON
extern const ouro_kernels ouro_kernels_neon;
#endif
#ifdef OURO_HAVE_NEON_DOT
extern const ouro_kernels ouro_kernels_neon_dot;
#endif
#ifdef OURO_HAVE_NEON_I8MM
extern const ouro_kernels ouro_kernels_neon_i8mm;
#endif

/* The best table this machine can run and whose products agree with the specification on a self-test; the
 * environment variable OURO_ISA (or `want`, when not NULL) asks for a lower one by name. NULL with a status
 * detail when the name is unknown or not available here. */
const ouro_kernels *ouro_kernels_select(const char *want);

/* ---- packing (pack.c): plain C, shared by all tables ------------------------------------------------------- */

/* Fills in sizes for a matrix of `tiles` tiles and `cols` columns; `data` is left NULL. */
void ouro_matrix_layout(ouro_matrix *m, ouro_format format, int rows, int cols, int tiles);
/* the same with tiles side by side, F32, BF16 or S8 */
void ouro_matrix_layout_side(ouro_matrix *m, ouro_format format, int rows, int cols, int tiles);
/* of contiguous tiles */
static inline size_t ouro_matrix_bytes(const ouro_matrix *m) { return (size_t)m->tiles * m->tile_bytes; }

/* Source types of ouro_matrix_put_row. */
typedef enum ouro_dtype { OURO_DT_BF16 = 0, OURO_DT_F16 = 1, OURO_DT_F32 = 2 } ouro_dtype;
size_t ouro_dtype_size(ouro_dtype dtype);
void ouro_widen(ouro_dtype dtype, const void *src, size_t n, float *dst);

/* Packs one row: src [cols] of dtype into tile slot `slot` (tile slot / 16, row slot % 16). Rows are independent, so
 * several threads may put different rows at once when they do not share a tile... sharing one is fine too: no byte
 * of a tile belongs to two rows. BF16 rounds to nearest even; INT8 and INT4 choose their scales here. */
void ouro_matrix_put_row(ouro_matrix *m, int slot, ouro_dtype dtype, const void *src);

/* Packs one row of an INT4 matrix that is quantised already: scales [cols / 64, rounded up] bf16, q [cols] -8..7 (others are
 * clamped). */
void ouro_matrix_put_int4(ouro_matrix *m, int slot, const uint16_t *scales, const int8_t *q);

/* Reads one row back, as f32 [cols] (dequantised). Used for embeddings and for tests. */
void ouro_matrix_get_row(const ouro_matrix *m, int slot, float *dst);

/* offset in elements of (row, k) inside a contiguous F32 or BF16 tile */
static inline size_t ouro_tile_at(int format, int row, int k)
{
    return format == OURO_F32 ? (size_t)k * OURO_TILE + (size_t)row
                              : (size_t)(k >> 1) * (2 * OURO_TILE) + (size_t)row * 2 + (size_t)(k & 1);
}

#endif
