/* blocks.h - register blocks: T tiles times L lanes over all of k, written once over the primitives of vec_*.h. A call does
 * one block after the other for `groups` groups of L lanes: what they share is worked out once.
 *
 * The T * L accumulators stay in registers from the first k to the last (int8 and int4 keep the integer sums there
 * and, for large blocks, the float ones in a scratch). Each accumulator is the one chain that the specification
 * asks for, so the shape of the block never shows in the result. T and L are constants in every instance; drive.h
 * chooses among the instances.
 */
#include "kernels/kernels.h"
#include "kernels/math.h"

#define V_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define V_UNROLL _Pragma("unroll")
#define V_TWICE _Pragma("unroll(2)")
#else
#define V_UNROLL _Pragma("GCC unroll 32")
#define V_TWICE _Pragma("GCC unroll 2")          /* not whole, or requests for memory are made in bursts */
#endif

#define V_MAX_TILES 8
#define V_INT_TILES 4           /* the same of int8 and int4 */
#define V_SIDE_AHEAD 2048       /* bytes ahead that one group of lanes asks for a matrix of tiles side by side */

/* Where the lanes of a block stand: every third has a pointer of its own and the two behind it are reached by one and
 * two strides, which an x86 load adds by itself. One offset a lane would need more registers than there are. */
#define V_BASES ((V_LANES + 2) / 3)
#define V_AT(x, l, stride) ((x)[(l) / 3] + (size_t)((l) % 3) * (stride))

/* what is multiplied by what */
typedef enum v_kind {
    V_F32, V_MIXED, V_BF16, V_INT8, V_INT4,
    V_SIDE_F32, V_SIDE_MIXED, V_SIDE_BF16,      /* tiles side by side */
    V_S8_F32, V_S8_BF16,                        /* s8 side by side, times f32 and times bf16 */
    V_KINDS
} v_kind;
#define V_IS_SIDE(kind) ((kind) >= V_SIDE_F32)

typedef struct v_job {
    const uint8_t *w;           /* first tile */
    size_t tile_bytes;          /* to the next */
    size_t unit_bytes;          /* from one unit of a tile to the next, where tiles stand side by side */
    int groups;                 /* of L lanes, at least 1 */
    const uint8_t *x;           /* first lane */
    size_t stride;              /* bytes to the next */
    int units;                  /* 64-byte units of weights in a tile; groups of 128 or 64 k for int8, int4 */
    size_t scale_bytes;         /* before the units: int8, int4 */
    const float *xs;            /* [lanes][xs_stride] scales of the first lane, sums [lanes][2 xs_stride] */
    const int32_t *sum;
    size_t xs_stride;
    const ouro_matrix *chain;   /* [chained] matrices of which w is in the first; activations and factors of the next are a step on */
    int chained;
    size_t x_step, kept_step;
    float *out;                 /* [lanes][out_stride], T * 16 columns */
    size_t out_stride;
    const float *kept;          /* factors of the lanes for what is there; NULL: accumulators start at 0 */
    float *scratch;             /* [T * L][16] f32, int kinds: accumulators that do not fit in registers */
    size_t far;                 /* bytes ahead that the block asks for its own weights; 0: it does not */
    size_t soon_part;           /* bytes of what is read next that each group of lanes asks for meanwhile */
    uintptr_t soon, soon_end;   /* where the part of this group begins, where that ends */
    int soon_lines;             /* of 64 bytes, for each four units (float kinds) or each group of k */
} v_job;

typedef void (*v_block_fn)(const v_job *);

/* on to the next group of lanes */
V_INLINE void job_next(const int L, v_job *j)
{
    j->x += (size_t)L * j->stride;
    j->out += (size_t)L * j->out_stride;
    if (j->kept) j->kept += L;
    j->soon += j->soon_part;
}

V_INLINE uintptr_t soon_stop(const v_job *j)
{
    return j->soon + j->soon_part < j->soon_end ? j->soon + j->soon_part : j->soon_end;
}

V_INLINE void bases_open(const int L, const uint8_t *x, size_t stride, const uint8_t **at)
{
    V_UNROLL for (int b = 0; b < (L + 2) / 3; b++) at[b] = x + (size_t)(3 * b) * stride;
}

/* On by `step` bytes; the empty statement hides from the compiler that the pointers differ by a constant. */
V_INLINE void bases_step(const int L, int step, const uint8_t **at)
{
    V_UNROLL for (int b = 0; b < (L + 2) / 3; b++) {
        at[b] += step;
        __asm__("" : "+r"(at[b]));
    }
}

/* The address to ask for while the unit at w is read. Past the end of its tile a stream goes on in the tile T further,
 * which the next block reads, not in its neighbour, which this block reads itself. */
V_INLINE uintptr_t ahead(const int T, const v_job *j, const uint8_t *w)
{
    return (uintptr_t)w + j->far + (w + j->far < j->w + j->tile_bytes ? 0 : (size_t)(T - 1) * j->tile_bytes);
}

V_INLINE void block_open(const int T, const int L, const v_job *j, vf *acc)
{
    if (!j->kept) {
        /* the lines of the output, so that its stores do not wait for them at the end and hold up others */
        V_UNROLL for (int l = 0; l < L; l++)
            V_UNROLL for (int t = 0; t < T; t++) V_PREFETCH_OUT(j->out + (size_t)l * j->out_stride + t * OURO_TILE);
        V_UNROLL for (int i = 0; i < T * L; i++) acc[i] = v_zero();
        return;
    }
    V_UNROLL for (int l = 0; l < L; l++) {
        vf kept = v_set1(j->kept[l]);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_mul(v_load(j->out + (size_t)l * j->out_stride + t * OURO_TILE), kept);
    }
}

V_INLINE void block_close(const int T, const int L, const v_job *j, const vf *acc)
{
    V_UNROLL for (int l = 0; l < L; l++) {
        V_UNROLL for (int t = 0; t < T; t++)
            v_store(j->out + (size_t)l * j->out_stride + t * OURO_TILE, acc[t * L + l]);
    }
}

/* one unit of T tiles, `apart` bytes from one to the next, into the accumulators */
V_INLINE void unit_f32(const int T, const int L, const v_job *j, const uint8_t *w, size_t apart, const uint8_t *const *x,
                       int at, vf *acc)
{
    vf wt[V_MAX_TILES];
    V_UNROLL for (int t = 0; t < T; t++) wt[t] = v_load((const float *)(const void *)(w + (size_t)t * apart));
    V_UNROLL for (int l = 0; l < L; l++) {
        vf xl = v_bcast(V_AT(x, l, j->stride) + at);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_fma(wt[t], xl, acc[t * L + l]);
    }
}

V_INLINE void unit_mixed(const int T, const int L, const v_job *j, const uint8_t *w, size_t apart, const uint8_t *const *x,
                         int at, vf *acc)
{
    v_pair wt[V_MAX_TILES];
    V_UNROLL for (int t = 0; t < T; t++) wt[t] = v_load_pair(w + (size_t)t * apart);
    V_UNROLL for (int l = 0; l < L; l++) {
        vf x0 = v_bcast(V_AT(x, l, j->stride) + at);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_fma(wt[t].even, x0, acc[t * L + l]);
    }
    V_UNROLL for (int l = 0; l < L; l++) {
        vf x1 = v_bcast(V_AT(x, l, j->stride) + at + 4);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_fma(wt[t].odd, x1, acc[t * L + l]);
    }
}

V_INLINE void unit_bf16(const int T, const int L, const v_job *j, const uint8_t *w, size_t apart, const uint8_t *const *x,
                        int at, vf *acc)
{
    v_bw wt[V_MAX_TILES];
    V_UNROLL for (int t = 0; t < T; t++) wt[t] = v_load_bw(w + (size_t)t * apart);
    V_UNROLL for (int l = 0; l < L; l++) {
        v_bx xl = v_load_bx(V_AT(x, l, j->stride) + at);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_dot_bf16(acc[t * L + l], wt[t], xl);
    }
}

/* all units of the block; weights are asked for between the products, for in bursts many requests are dropped */
V_INLINE void units_float(const v_kind kind, const int T, const int L, const int asks, const v_job *j, vf *acc)
{
    const uint8_t *w = j->w, *x[V_BASES];
    bases_open(L, j->x, j->stride, x);
    const int step = kind == V_MIXED || kind == V_SIDE_MIXED ? 8 : 4;       /* bytes of a lane that meet one unit */
    const size_t apart = V_IS_SIDE(kind) ? 64 : j->tile_bytes, unit = V_IS_SIDE(kind) ? j->unit_bytes : 64;
    uintptr_t soon = j->soon;
    const uintptr_t stop = soon_stop(j);
    for (int u = 0; u < j->units; u += 4, bases_step(L, 4 * step, x)) {
        const uintptr_t far = !asks ? 0 : V_IS_SIDE(kind) ? (uintptr_t)w + V_SIDE_AHEAD : ahead(T, j, w);
        for (int i = 0; !asks && i < j->soon_lines && soon < stop; i++, soon += 64) V_PREFETCH(soon);
        V_UNROLL for (int i = 0; i < 4; i++, w += unit) {
            if (asks) V_UNROLL for (int t = 0; t < T; t++) V_PREFETCH(far + (size_t)t * apart + (size_t)i * unit);
            if (kind == V_F32 || kind == V_SIDE_F32) unit_f32(T, L, j, w, apart, x, step * i, acc);
            else if (kind == V_MIXED || kind == V_SIDE_MIXED) unit_mixed(T, L, j, w, apart, x, step * i, acc);
            else unit_bf16(T, L, j, w, apart, x, step * i, acc);
        }
    }
}

/* the same units of the i-th matrix of a chain, onto what was there */
V_INLINE void chain_float(const v_kind kind, const int T, const int L, const v_job *j, int i, vf *acc)
{
    v_job part = *j;
    const float *kept = j->kept + (size_t)i * j->kept_step;
    const uintptr_t next = (uintptr_t)j->chain[i].next - (uintptr_t)j->chain[0].next;
    part.w = j->chain[i].data + (j->w - j->chain[0].data);
    part.x = j->x + (size_t)i * j->x_step;
    part.soon += next;
    part.soon_end += next;
    if (!j->chain[i].next) part.soon = part.soon_end;
    V_UNROLL for (int l = 0; l < L; l++) {
        vf factor = v_set1(kept[l]);
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_mul(acc[t * L + l], factor);
    }
    units_float(kind, T, L, 0, &part, acc);
}

V_INLINE void block_float(const v_kind kind, const int T, const int L, const v_job *j)
{
    vf acc[V_MAX_TILES * V_LANES];
    block_open(T, L, j, acc);
    if (j->far) units_float(kind, T, L, 1, j, acc);
    else units_float(kind, T, L, 0, j, acc);
    if (V_IS_SIDE(kind)) for (int i = 1; i < j->chained; i++) chain_float(kind, T, L, j, i, acc);
    block_close(T, L, j, acc);
}

/* one k of T s8 tiles times a number of each lane */
V_INLINE void unit_s8(const int T, const int L, const uint8_t *w, const vf *x, vf *acc)
{
    vf wt[V_MAX_TILES];
    V_UNROLL for (int t = 0; t < T; t++) wt[t] = v_widen_s8((const int8_t *)w + t * OURO_TILE);
    V_UNROLL for (int l = 0; l < L; l++) {
        V_UNROLL for (int t = 0; t < T; t++) acc[t * L + l] = v_fma(wt[t], x[l], acc[t * L + l]);
    }
}

/* Two k at a time: in the order of f32 activations, or of bf16 ones, the odd one first. Nothing is asked for: the hardware sees
 * the stream, and requests of this slower loop were only dropped. */
V_INLINE void block_s8(const v_kind kind, const int T, const int L, const v_job *j)
{
    vf acc[V_MAX_TILES * V_LANES], even[V_LANES], odd[V_LANES];
    const uint8_t *w = j->w, *x = j->x;
    const size_t step = kind == V_S8_F32 ? 8 : 4;
    block_open(T, L, j, acc);
    for (int k = 0; k < j->units; k += 2, w += 2 * j->unit_bytes, x += step) {
        V_UNROLL for (int l = 0; l < L; l++) {
            const uint8_t *at = x + (size_t)l * j->stride;
            uint32_t pair;
            memcpy(&pair, at, sizeof pair);
            even[l] = kind == V_S8_F32 ? v_bcast(at) : v_set1(ouro_from_bits(pair << 16));
            odd[l] = kind == V_S8_F32 ? v_bcast(at + 4) : v_set1(ouro_from_bits(pair & 0xffff0000u));
        }
        if (kind == V_S8_F32) unit_s8(T, L, w, even, acc);
        unit_s8(T, L, w + j->unit_bytes, odd, acc);
        if (kind == V_S8_BF16) unit_s8(T, L, w, even, acc);
    }
    block_close(T, L, j, acc);
}

/* ---- int8 and int4 --------------------------------------------------------------------------------------------- */

/* integer sums of one group: 32 units of int8, 8 of int4 */
V_INLINE void group_int8(const int T, const int L, const int asks, const v_job *j, int g, vi *sum)
{
    const uint8_t *w = j->w + j->scale_bytes + (size_t)g * 32 * 64, *x[V_BASES];
    const uintptr_t far = asks ? ahead(T, j, w) - (uintptr_t)w : 0;
    bases_open(L, j->x + (size_t)g * OURO_GROUP, j->stride, x);
    int32_t start[V_LANES];
    V_UNROLL for (int l = 0; l < L; l++) {
        const int32_t *s = j->sum + (size_t)l * 2 * j->xs_stride + 2 * (size_t)g;
        start[l] = -128 * (s[0] + s[1]);
    }
    V_UNROLL for (int l = 0; l < L; l++) {
        V_UNROLL for (int t = 0; t < T; t++) sum[t * L + l] = V_INT8_START(start[l]);
    }
    for (int v = 0; v < 32; v += 2, w += 128, bases_step(L, 8, x)) {
        V_UNROLL for (int i = 0; i < 2; i++) {
            v_iw wt[V_MAX_TILES];
            V_UNROLL for (int t = 0; t < T; t++) {
                wt[t] = v_load_int8(w + 64 * i + (size_t)t * j->tile_bytes);
                if (asks) V_PREFETCH((uintptr_t)w + far + 64 * i + (size_t)t * j->tile_bytes);
                if (asks && V_AGAIN(V_INT8, L)) V_PREFETCH((uintptr_t)w + V_AGAIN(V_INT8, L) + 64 * i + (size_t)t * j->tile_bytes);
            }
            V_UNROLL for (int l = 0; l < L; l++) {
                v_ix xl = v_load_ix(V_AT(x, l, j->stride) + 4 * i);
                V_UNROLL for (int t = 0; t < T; t++) sum[t * L + l] = v_dot_int8(sum[t * L + l], wt[t], xl);
            }
        }
    }
}

V_INLINE void group_int4(const int T, const int L, const int asks, const v_job *j, int g, vi *sum)
{
    const uint8_t *w = j->w + j->scale_bytes + (size_t)g * 8 * 64, *x[V_BASES];
    const uintptr_t far = asks ? ahead(T, j, w) - (uintptr_t)w : 0;
    bases_open(L, j->x + (size_t)g * OURO_GROUP4, j->stride, x);
    V_UNROLL for (int l = 0; l < L; l++) {
        int32_t start = -8 * j->sum[(size_t)l * 2 * j->xs_stride + (size_t)g];
        V_UNROLL for (int t = 0; t < T; t++) sum[t * L + l] = V_INT4_START(start);
    }
    for (int from = 0; from < 8; from += V_PART_UNITS) {
        v_part part[V_MAX_TILES * V_LANES];
        V_UNROLL for (int i = 0; i < T * L; i++) part[i] = v_part_begin(sum[i]);
        V_TWICE for (int v = 0; v < V_PART_UNITS; v++, w += 64, bases_step(L, 4, x)) {
            v_iw low[V_MAX_TILES], high[V_MAX_TILES];
            V_UNROLL for (int t = 0; t < T; t++) {
                v_load_int4(w + (size_t)t * j->tile_bytes, &low[t], &high[t]);
                if (asks) V_PREFETCH((uintptr_t)w + far + (size_t)t * j->tile_bytes);
                if (asks && V_AGAIN(V_INT4, L)) V_PREFETCH((uintptr_t)w + V_AGAIN(V_INT4, L) + (size_t)t * j->tile_bytes);
            }
            V_UNROLL for (int l = 0; l < L; l++) {
                v_ix xl = v_load_ix(V_AT(x, l, j->stride));
                V_UNROLL for (int t = 0; t < T; t++) part[t * L + l] = v_dot_int4(part[t * L + l], low[t], xl);
            }
            V_UNROLL for (int l = 0; l < L; l++) {
                v_ix xl = v_load_ix(V_AT(x, l, j->stride) + 32);
                V_UNROLL for (int t = 0; t < T; t++) part[t * L + l] = v_dot_int4(part[t * L + l], high[t], xl);
            }
        }
        V_UNROLL for (int i = 0; i < T * L; i++) sum[i] = v_part_end(sum[i], part[i]);
    }
}

/* Small blocks keep their float accumulators in registers. The others keep them in the scratch, which is touched once a
 * group, and leave the registers to the sums; not in the output, whose rows tend to fall into one cache set. */
V_INLINE void block_int(const v_kind kind, const int T, const int L, const v_job *j)
{
    const int keep = T * L <= V_KEEP;
    vf acc[V_MAX_TILES * V_LANES];
    block_open(T, L, j, acc);
    if (!keep) V_UNROLL for (int i = 0; i < T * L; i++) v_store(j->scratch + i * OURO_TILE, acc[i]);
    uintptr_t soon = j->soon;
    const uintptr_t stop = soon_stop(j);
    for (int g = 0; g < j->units; g++) {
        vi sum[V_MAX_TILES * V_LANES];
        if (kind == V_INT8) {
            if (j->far) group_int8(T, L, 1, j, g, sum);
            else group_int8(T, L, 0, j, g, sum);
        } else {
            if (j->far) group_int4(T, L, 1, j, g, sum);
            else group_int4(T, L, 0, j, g, sum);
        }
        for (int i = 0; i < j->soon_lines && soon < stop; i++, soon += 64) V_PREFETCH(soon);
        if (j->far && g % 2 == 0)      /* the units come after the scales: of the next tiles what their streams leave out */
            V_UNROLL for (int t = 0; t < T; t++)
                V_PREFETCH((uintptr_t)j->w + (size_t)(T + t) * j->tile_bytes + j->far + (size_t)g * 2 * OURO_TILE);
        vf ws[V_MAX_TILES];
        V_UNROLL for (int t = 0; t < T; t++)
            ws[t] = v_widen_bf16((const uint16_t *)(const void *)(j->w + (size_t)t * j->tile_bytes) + g * OURO_TILE);
        float *scratch = j->scratch;
        __asm__("" : "+r"(scratch));    /* or gcc keeps a second copy of the accumulators on the stack */
        V_UNROLL for (int l = 0; l < L; l++) {
            vf xs = v_set1(j->xs[(size_t)l * j->xs_stride + (size_t)(kind == V_INT8 ? g : g / 2)]);
            V_UNROLL for (int t = 0; t < T; t++) {
                float *kept = scratch + (t * L + l) * OURO_TILE;
                vf scale = v_mul(ws[t], xs), part = v_from_int(sum[t * L + l]);
                if (keep) acc[t * L + l] = v_fma(part, scale, acc[t * L + l]);
                else v_store(kept, v_fma(part, scale, v_load(kept)));
            }
        }
    }
    if (!keep) V_UNROLL for (int i = 0; i < T * L; i++) acc[i] = v_load(j->scratch + i * OURO_TILE);
    block_close(T, L, j, acc);
}

/* the copy of the job is one that no store can alias */
V_INLINE void blocks_float(const v_kind kind, const int T, const int L, const v_job *given)
{
    v_job j = *given;
    for (int n = j.groups; n > 0; n--, job_next(L, &j)) block_float(kind, T, L, &j);
}

V_INLINE void blocks_s8(const v_kind kind, const int T, const int L, const v_job *given)
{
    v_job j = *given;
    for (int n = j.groups; n > 0; n--, job_next(L, &j)) block_s8(kind, T, L, &j);
}

V_INLINE void blocks_int(const v_kind kind, const int T, const int L, const v_job *given)
{
    v_job j = *given;
    for (int n = j.groups; n > 0; n--, job_next(L, &j)) {
        block_int(kind, T, L, &j);
        j.xs += (size_t)L * j.xs_stride;
        j.sum += (size_t)L * 2 * j.xs_stride;
    }
}
