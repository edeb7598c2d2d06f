/* signals.c - see signals.h. Sums in double, in one order. */
#include "engine/signals.h"

#include <math.h>
#include <string.h>

static double distance(const float *a, const float *b, int d)
{
    double s = 0.0;
    for (int i = 0; i < d; i++) s += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(s);
}

static double length(const float *a, int d)
{
    double s = 0.0;
    for (int i = 0; i < d; i++) s += (double)a[i] * (double)a[i];
    return sqrt(s);
}

void ouro_signal_begin(ouro_exit_signal *s)
{
    *s = (ouro_exit_signal){.state_delta = NAN, .state_relative = NAN, .acceleration = NAN, .kl = NAN, .entropy = NAN,
                            .confidence = NAN, .top_token = -1, .previous_top_token = s->top_token};
}

void ouro_signal_states(ouro_exit_signal *s, const float *h, const float *before, const float *before2, int d)
{
    if (!before || s->step < 1) return;
    double delta = distance(h, before, d);
    s->state_delta = (float)delta;
    s->state_relative = (float)(delta / length(before, d));
    if (s->step < 2) return;
    double bend = 0.0;
    for (int i = 0; i < d; i++) {
        double x = (double)h[i] - 2.0 * (double)before[i] + (double)before2[i];
        bend += x * x;
    }
    s->acceleration = (float)(sqrt(bend) / length(h, d));
}

/* KL(p || q), nats, of softmax(a) against softmax(b) */
static double divergence(const float *a, double log_za, const float *b, double log_zb, int n)
{
    double kl = 0.0;
    for (int i = 0; i < n; i++) {
        double la = (double)a[i] - log_za, lb = (double)b[i] - log_zb;
        kl += exp(la) * (la - lb);
    }
    return kl > 0.0 ? kl : 0.0;
}

void ouro_signal_readout(ouro_exit_signal *s, const ouro_readout *read, float *z_before, double *log_z_before, int v)
{
    s->entropy = *read->entropy;
    s->top_token = *read->argmax;
    s->confidence = (float)exp((double)read->logits[s->top_token] - (double)*read->log_z);
    if (!z_before) return;
    if (s->step > 0) s->kl = (float)divergence(z_before, *log_z_before, read->logits, (double)*read->log_z, v);
    memcpy(z_before, read->logits, (size_t)v * sizeof(float));
    *log_z_before = (double)*read->log_z;
}
