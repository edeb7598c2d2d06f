"""Which tensors a checkpoint must hold, in which shape, and what the C core calls them."""

from __future__ import annotations

from ouro.config import ModelConfig

# Released name -> number of the tensor in the core (csrc/model/model.h, `ouro_tensor`).
MODEL_TENSORS = {
    "model.embed_tokens.weight": 0,
    "lm_head.weight": 1,
    "model.norm.weight": 2,
    "model.early_exit_gate.weight": 3,
    "model.early_exit_gate.bias": 4,
}
LAYER_TENSORS = {
    "self_attn.q_proj.weight": 5,
    "self_attn.k_proj.weight": 6,
    "self_attn.v_proj.weight": 7,
    "self_attn.o_proj.weight": 8,
    "mlp.gate_proj.weight": 9,
    "mlp.up_proj.weight": 10,
    "mlp.down_proj.weight": 11,
    "input_layernorm.weight": 12,
    "input_layernorm_2.weight": 13,
    "post_attention_layernorm.weight": 14,
    "post_attention_layernorm_2.weight": 15,
}


def expected_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, by released name (rows are outputs)."""
    d, f, q, kv = c.d_model, c.d_mlp, c.n_heads * c.d_head, c.n_key_value_heads * c.d_head
    layer = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.d_vocab, d)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.d_vocab, d)
    shapes["model.norm.weight"] = (d,)
    shapes["model.early_exit_gate.weight"] = (1, d)
    shapes["model.early_exit_gate.bias"] = (1,)
    for i in range(c.n_layers):
        for name in LAYER_TENSORS:
            shapes[f"model.layers.{i}.{name}"] = layer.get(name, (d,))
    return shapes


def core_tensor(name: str) -> tuple[int, int]:
    """(tensor number, layer) of a released name, as the core wants them."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name], 0
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return LAYER_TENSORS[rest], int(layer)
