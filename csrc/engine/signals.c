/* signals.c - the numbers of one step that exit rules look at (exit.h), from states and readouts. */
#include "engine/inside.h"

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

/* The signal's part that comes from states (the node's h is that of step - 1 = t). */
void ouro_signal_states(ouro_node *n, int d)
{
    ouro_exit_signal *s = &n->signal;
    s->state_delta = s->state_relative = s->acceleration = NAN;
    if (!n->before || s->step < 1) return;
    double delta = distance(n->h, n->before, d);
    s->state_delta = (float)delta;
    s->state_relative = (float)(delta / length(n->before, d));
    if (s->step < 2) return;
    double bend = 0.0;
    for (int i = 0; i < d; i++) {
        double x = (double)n->h[i] - 2.0 * (double)n->before[i] + (double)n->before2[i];
        bend += x * x;
    }
    s->acceleration = (float)(sqrt(bend) / length(n->h, d));
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

void ouro_signal_readout(ouro_request *r, ouro_node *n, const ouro_readout *read, int v)
{
    ouro_exit_signal *s = &n->signal;
    s->entropy = *read->entropy;
    s->top_token = *read->argmax;
    s->confidence = (float)exp((double)read->logits[s->top_token] - (double)*read->log_z);
    if (!(r->exit_needs & OURO_NEED_LOGITS)) return;
    if (s->step > 0) s->kl = (float)divergence(n->z_before, n->log_z_before, read->logits, (double)*read->log_z, v);
    memcpy(n->z_before, read->logits, (size_t)v * sizeof(float));
    n->log_z_before = (double)*read->log_z;
}
