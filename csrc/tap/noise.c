/* noise.c - normal deviates that depend on a key alone.
 *
 * The key is hashed (splitmix64's finaliser), its top 53 bits are a uniform number u, and the deviate is the inverse of
 * the normal distribution at u by Acklam's rational approximation (P. J. Acklam, "An algorithm for computing the inverse
 * normal cumulative distribution function", 2003; relative error below 1.2e-9). Plain double arithmetic.
 */
#include <math.h>

#include "kernels/math.h"
#include "tap/plan.h"

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t ouro_noise_key(uint64_t seed, ouro_point point, int step, int layer, int pos, int head, int column)
{
    uint64_t key = mix(seed);
    key = mix(key ^ (((uint64_t)point << 48) | ((uint64_t)(uint16_t)step << 32) | (uint32_t)layer));
    key = mix(key ^ (((uint64_t)(uint32_t)pos << 32) | (uint32_t)head));
    return mix(key ^ (uint32_t)column);
}

static double polynomial(const double *c, int n, double x)
{
    double y = c[0];
    for (int i = 1; i < n; i++) y = y * x + c[i];
    return y;
}

double ouro_normal(uint64_t key)
{
    static const double a[] = {-3.969683028665376e+01, 2.209460984245205e+02, -2.759285104469687e+02,
                               1.383577518672690e+02, -3.066479806614716e+01, 2.506628277459239e+00};
    static const double b[] = {-5.447609879822406e+01, 1.615858368580409e+02, -1.556989798598866e+02,
                               6.680131188771972e+01, -1.328068155288572e+01, 1.0};
    static const double c[] = {-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e+00,
                               -2.549732539343734e+00, 4.374664141464968e+00, 2.938163982698783e+00};
    static const double d[] = {7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00,
                               3.754408661907416e+00, 1.0};
    const double tail = 0.02425;
    double u = ((double)(key >> 11) + 0.5) * 0x1p-53, p = u < 0.5 ? u : 1.0 - u, x;
    if (p < tail) {
        double q = sqrt(-2.0 * ouro_log(p));
        x = polynomial(c, 6, q) / polynomial(d, 5, q);
    } else {
        double q = p - 0.5, r = q * q;
        x = q * polynomial(a, 6, r) / polynomial(b, 6, r);
    }
    return u < 0.5 ? x : -x;
}
