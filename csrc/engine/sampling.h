/* sampling.h - from logits to a token: penalties, filters, and noise that depends on (seed, stream, position) only.
 *
 *   token = argmax over the tokens that pass the filters of  logit / temperature + Gumbel noise
 *
 * The noise comes from a counter (Philox 4x32-10), not from a state, so a token is the same in any batch, schedule or
 * speculation. Order: repetition penalty, temperature, top_k, top_p, min_p; the largest logit always passes.
 */
#ifndef OURO_ENGINE_SAMPLING_H
#define OURO_ENGINE_SAMPLING_H

#include <stdint.h>

typedef struct ouro_sampling {
    float temperature;               /* 0: greedy */
    int top_k;                       /* 0: all */
    float top_p, min_p;              /* 1, 0: all */
    float repetition_penalty;        /* 1: none; > 1 makes tokens that occurred less likely */
    uint64_t seed;
    uint32_t stream;                 /* which of several samples of one prompt */
} ouro_sampling;

int ouro_sampling_check(const ouro_sampling *s);

/* Scratch for one vocabulary. */
typedef struct ouro_sampler {
    int d_vocab;
    float *x;                        /* [d_vocab] */
    int32_t *order;                  /* [d_vocab] */
    uint8_t *seen;                   /* [d_vocab], all 0 between calls */
} ouro_sampler;
int ouro_sampler_init(ouro_sampler *p, int d_vocab);
void ouro_sampler_fini(ouro_sampler *p);

/* The token for `position`, from logits [d_vocab] f32 and the tokens before it, history [n]. */
int32_t ouro_sample(ouro_sampler *p, const ouro_sampling *s, const float *logits, const int32_t *history, int n,
                    int position);

/* The filtered logits / temperature of the same call, [d_vocab], -inf where filtered: for tests and inspection. */
void ouro_sample_filter(ouro_sampler *p, const ouro_sampling *s, const float *logits, const int32_t *history, int n,
                        float *out);

/* The k largest logits, largest first, ties by lower index: ids [k], values [k] */
void ouro_top_k(const float *logits, int n, int k, int32_t *ids, float *values);

/* Gumbel noise of (seed, stream, position, token) in double */
double ouro_gumbel(const ouro_sampling *s, int position, int32_t token);

#endif
