/* config.h - the sizes of a looped model (MODEL section 1 of the paper: L layers shared by T steps).
 *
 * Names follow the Python side: n_layers L, n_steps T, n_heads H, n_kv_heads Hkv, d_model d, d_head dh, d_mlp f,
 * d_vocab V, n_ctx the longest sequence.
 */
#ifndef OURO_MODEL_CONFIG_H
#define OURO_MODEL_CONFIG_H

#include <stdint.h>

#define OURO_MAX_STEPS 64        /* more recurrent steps than this in one call are refused */
#define OURO_MAX_GROUP 48        /* most query heads that share one key/value head */

typedef struct ouro_config {
    int32_t n_layers, n_steps, n_heads, n_kv_heads;
    int32_t d_model, d_head, d_mlp, d_vocab, n_ctx;
    int32_t tied;                /* 1: the head is the embedding */
    float eps;                   /* of every RMSNorm */
    double rope_theta;
} ouro_config;

/* OURO_OK, or OURO_ERR_ARGUMENT with a detail that names the field. */
int ouro_config_check(const ouro_config *c);

#endif
