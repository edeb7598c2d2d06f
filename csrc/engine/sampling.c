/* sampling.c - see sampling.h. Scalar double and float arithmetic in one fixed order. */
#include "engine/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/math.h"
#include "ouro_status.h"

int ouro_sampling_check(const ouro_sampling *s)
{
    if (!(s->temperature >= 0.0f) || isinf(s->temperature))
        return ouro_fail(OURO_ERR_ARGUMENT, "temperature is %g, expected 0 or more", (double)s->temperature);
    if (s->top_k < 0) return ouro_fail(OURO_ERR_ARGUMENT, "top_k is %d, expected 0 or more", s->top_k);
    if (!(s->top_p > 0.0f && s->top_p <= 1.0f))
        return ouro_fail(OURO_ERR_ARGUMENT, "top_p is %g, expected 0 < top_p <= 1", (double)s->top_p);
    if (!(s->min_p >= 0.0f && s->min_p <= 1.0f))
        return ouro_fail(OURO_ERR_ARGUMENT, "min_p is %g, expected 0 to 1", (double)s->min_p);
    if (!(s->repetition_penalty > 0.0f) || isinf(s->repetition_penalty))
        return ouro_fail(OURO_ERR_ARGUMENT, "repetition_penalty is %g, expected more than 0", (double)s->repetition_penalty);
    return OURO_OK;
}

int ouro_sampler_init(ouro_sampler *p, int d_vocab)
{
    p->d_vocab = d_vocab;
    p->x = malloc((size_t)d_vocab * sizeof *p->x);
    p->order = malloc((size_t)d_vocab * sizeof *p->order);
    p->seen = calloc((size_t)d_vocab, 1);
    if (p->x && p->order && p->seen) return OURO_OK;
    ouro_sampler_fini(p);
    return ouro_fail(OURO_ERR_MEMORY, "no memory for sampling over %d tokens", d_vocab);
}

void ouro_sampler_fini(ouro_sampler *p)
{
    free(p->x);
    free(p->order);
    free(p->seen);
    *p = (ouro_sampler){0};
}

/* ---- noise --------------------------------------------------------------------------------------------------- */

/* Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). */
static void philox(uint32_t c[4], uint64_t key)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        memcpy(c, next, sizeof next);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* Uniform in (0, 1) on a grid of 2^-24, offset by half: never 0 or 1. Four neighbouring tokens share one block. */
static double uniform_of(const uint32_t c[4], int32_t token) { return ((double)(c[token & 3] >> 8) + 0.5) * 0x1p-24; }

static void noise_block(const ouro_sampling *s, int position, int32_t token, uint32_t c[4])
{
    c[0] = (uint32_t)token >> 2;
    c[1] = (uint32_t)position;
    c[2] = s->stream;
    c[3] = 0;
    philox(c, s->seed);
}

double ouro_gumbel(const ouro_sampling *s, int position, int32_t token)
{
    uint32_t c[4];
    noise_block(s, position, token, c);
    return -ouro_log(-ouro_log(uniform_of(c, token)));
}

/* A power of two that is at least exp(-gap), for gap in 0 .. most_noise: made from its exponent. */
static double power_above(double gap)
{
    uint64_t bits = (uint64_t)(1023 - (int)(gap * 1.4426)) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* argmax of x + noise. A token can only win when -log u < exp(x - best), and 1 - u <= -log u, so most are dismissed
 * by a comparison, first with a power of two above the exponential, and no logarithm; the largest noise on the grid,
 * log(2^25), dismisses the rest outright. */
static int32_t noisy_argmax(const ouro_sampling *s, const float *x, int n, int32_t start, int position)
{
    const double most_noise = 17.33;
    double best = (double)x[start] + ouro_gumbel(s, position, start);
    int32_t winner = start;
    uint32_t c[4] = {0};
    int block = -1;
    for (int32_t i = 0; i < n; i++) {
        double gap = best - (double)x[i];
        if (!(gap < most_noise) || i == start) continue;
        if (block != i >> 2) noise_block(s, position, i, c), block = i >> 2;
        double u = uniform_of(c, i);
        if (gap > 0.0 && 1.0 - u > 1.0001 * power_above(gap)) continue;
        if (gap > 0.0 && 1.0 - u > (double)ouro_expf((float)-gap) * 1.0001) continue;
        double score = (double)x[i] - ouro_log(-ouro_log(u));
        if (score > best || (score == best && i < winner)) best = score, winner = i;
    }
    return winner;
}

/* ---- filters ------------------------------------------------------------------------------------------------- */

static int32_t argmax(const float *x, int n)
{
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static void penalize(ouro_sampler *p, float penalty, const int32_t *history, int n)
{
    if (penalty == 1.0f) return;
    for (int i = 0; i < n; i++) {
        int32_t t = history[i];
        if (p->seen[t]) continue;
        p->seen[t] = 1;
        p->x[t] = p->x[t] > 0.0f ? p->x[t] / penalty : p->x[t] * penalty;
    }
    for (int i = 0; i < n; i++) p->seen[history[i]] = 0;
}

/* heap order for selection: larger value first, lower index first among equals */
static int before(const float *x, int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); }

static void sift(const float *x, int32_t *h, int n, int at)
{
    for (int child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && before(x, h[child + 1], h[child])) child++;
        if (!before(x, h[child], h[at])) return;
        int32_t t = h[at];
        h[at] = h[child], h[child] = t;
    }
}

/* A heap of h [n], best first. */
static void make_heap(const float *x, int32_t *h, int n)
{
    for (int i = n / 2 - 1; i >= 0; i--) sift(x, h, n, i);
}

/* The best of a heap of n goes to its end; the heap is one shorter. */
static int32_t pop_best(const float *x, int32_t *h, int n)
{
    int32_t best = h[0];
    h[0] = h[n - 1];
    sift(x, h, n - 1, 0);
    return h[n - 1] = best;
}

static double weight_of(const ouro_sampler *p, int32_t token, int32_t top) { return exp((double)p->x[token] - (double)p->x[top]); }

/* The `keep` best, and of them the best whose share reaches top_p; the rest become -inf. */
static void keep_best(ouro_sampler *p, int keep, float top_p)
{
    int n = 0;
    int32_t top = argmax(p->x, p->d_vocab);
    for (int32_t i = 0; i < p->d_vocab; i++)
        if (p->x[i] > -INFINITY) p->order[n++] = i;
    if (keep > n) keep = n;
    make_heap(p->x, p->order, n);
    for (int i = 0; i < keep; i++) pop_best(p->x, p->order, n - i);      /* the best stand at the end, best last */
    if (top_p < 1.0f) {
        double total = 0.0, reached = 0.0;
        int kept = 0;
        for (int i = 0; i < keep; i++) total += weight_of(p, p->order[n - 1 - i], top);
        while (kept < keep && reached < (double)top_p * total) reached += weight_of(p, p->order[n - 1 - kept++], top);
        keep = kept;
    }
    for (int i = 0; i < n - keep; i++) p->x[p->order[i]] = -INFINITY;
}

#define SLICES 1024                  /* of the distance to the best logit, 1/16 nat each; the last holds all that is further */

static int slice_of(const ouro_sampler *p, int32_t token, int32_t top)
{
    double gap = 16.0 * ((double)p->x[top] - (double)p->x[token]);
    return gap < SLICES - 1 ? (int)gap : SLICES - 1;
}

/* The best whose share of all reaches top_p; the rest become -inf. Only the slice in which that happens is put in order. */
static void keep_share(ouro_sampler *p, float top_p)
{
    double weight[SLICES] = {0}, total = 0.0, reached = 0.0;
    int32_t top = argmax(p->x, p->d_vocab);
    int cut = 0, n = 0;
    for (int32_t i = 0; i < p->d_vocab; i++)
        if (p->x[i] > -INFINITY) weight[slice_of(p, i, top)] += weight_of(p, i, top);
    for (int s = 0; s < SLICES; s++) total += weight[s];
    while (cut < SLICES - 1 && reached + weight[cut] < (double)top_p * total) reached += weight[cut++];
    for (int32_t i = 0; i < p->d_vocab; i++) {
        if (!(p->x[i] > -INFINITY)) continue;
        int s = slice_of(p, i, top);
        if (s == cut) p->order[n++] = i;
        else if (s > cut) p->x[i] = -INFINITY;
    }
    make_heap(p->x, p->order, n);
    while (n > 0 && reached < (double)top_p * total) reached += weight_of(p, pop_best(p->x, p->order, n), top), n--;
    for (int i = 0; i < n; i++) p->x[p->order[i]] = -INFINITY;
}

/* p->x = filtered logits / temperature */
static void filter(ouro_sampler *p, const ouro_sampling *s, const float *logits, const int32_t *history, int n)
{
    memcpy(p->x, logits, (size_t)p->d_vocab * sizeof *p->x);
    penalize(p, s->repetition_penalty, history, n);
    if (s->temperature == 0.0f) return;
    for (int i = 0; i < p->d_vocab; i++) p->x[i] = p->x[i] / s->temperature;
    if (s->top_k > 0 && s->top_k < p->d_vocab) keep_best(p, s->top_k, s->top_p);
    else if (s->top_p < 1.0f) keep_share(p, s->top_p);
    if (s->min_p > 0.0f) {
        float least = p->x[argmax(p->x, p->d_vocab)] + (float)log((double)s->min_p);
        for (int i = 0; i < p->d_vocab; i++)
            if (p->x[i] < least) p->x[i] = -INFINITY;
    }
}

int32_t ouro_sample(ouro_sampler *p, const ouro_sampling *s, const float *logits, const int32_t *history, int n,
                    int position)
{
    if (s->temperature == 0.0f && s->repetition_penalty == 1.0f) return argmax(logits, p->d_vocab);
    filter(p, s, logits, history, n);
    int32_t top = argmax(p->x, p->d_vocab);
    return s->temperature == 0.0f ? top : noisy_argmax(s, p->x, p->d_vocab, top, position);
}

void ouro_sample_filter(ouro_sampler *p, const ouro_sampling *s, const float *logits, const int32_t *history, int n,
                        float *out)
{
    filter(p, s, logits, history, n);
    memcpy(out, p->x, (size_t)p->d_vocab * sizeof *out);
}

void ouro_top_k(const float *logits, int n, int k, int32_t *ids, float *values)
{
    int have = 0;
    for (int32_t i = 0; k > 0 && i < n; i++) {
        if (have == k && !(logits[i] > values[k - 1])) continue;
        int at = have < k ? have++ : k - 1;
        for (; at > 0 && logits[i] > values[at - 1]; at--) ids[at] = ids[at - 1], values[at] = values[at - 1];
        ids[at] = i;
        values[at] = logits[i];
    }
}
