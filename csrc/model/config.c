/* config.c - refuses sizes that no kernel could work with; see config.h. */
#include "model/config.h"

#include <stddef.h>

#include "ouro_status.h"

int ouro_config_check(const ouro_config *c)
{
    const struct { const char *name; int32_t value, most; } field[] = {
        {"n_layers", c->n_layers, 4096}, {"n_steps", c->n_steps, OURO_MAX_STEPS},
        {"n_heads", c->n_heads, 4096},   {"n_kv_heads", c->n_kv_heads, 4096},
        {"d_model", c->d_model, 1 << 20}, {"d_head", c->d_head, 1024},
        {"d_mlp", c->d_mlp, 1 << 22},    {"d_vocab", c->d_vocab, 1 << 24},
        {"n_ctx", c->n_ctx, 1 << 24},
    };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++)
        if (field[i].value < 1 || field[i].value > field[i].most)
            return ouro_fail(OURO_ERR_ARGUMENT, "%s is %d, expected 1 to %d", field[i].name, (int)field[i].value,
                             (int)field[i].most);
    if (c->d_head % 2) return ouro_fail(OURO_ERR_ARGUMENT, "d_head is %d, expected an even number", (int)c->d_head);
    if (c->n_heads % c->n_kv_heads)
        return ouro_fail(OURO_ERR_ARGUMENT, "n_heads %d is not a multiple of n_key_value_heads %d", (int)c->n_heads,
                         (int)c->n_kv_heads);
    if (c->n_heads / c->n_kv_heads > OURO_MAX_GROUP)
        return ouro_fail(OURO_ERR_ARGUMENT, "%d query heads share a key/value head, expected at most %d",
                         (int)(c->n_heads / c->n_kv_heads), OURO_MAX_GROUP);
    if ((int64_t)c->n_heads * c->d_head > 1 << 20)
        return ouro_fail(OURO_ERR_ARGUMENT, "n_heads * d_head is %lld, expected at most %d",
                         (long long)c->n_heads * c->d_head, 1 << 20);
    if (!(c->eps > 0.0f && c->eps < 1.0f)) return ouro_fail(OURO_ERR_ARGUMENT, "eps is %g, expected 0 < eps < 1", (double)c->eps);
    if (!(c->rope_theta > 1.0 && c->rope_theta < 1e12))
        return ouro_fail(OURO_ERR_ARGUMENT, "rope_theta is %g, expected 1 < rope_theta < 1e12", c->rope_theta);
    return OURO_OK;
}
