"""The looped forward in plain PyTorch, as a peer to time against. One sequence, a growing cache, the last step's logits.

tests/test_bench.py holds it against the reference files where torch is installed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ouro.checkpoint import open_checkpoint

Cache = dict[tuple[int, int], tuple[Tensor, Tensor]]


class Reference:
    """Weights of a checkpoint directory in one dtype."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        with open_checkpoint(directory) as checkpoint:
            self.config = checkpoint.config
            self.w = {name: torch.from_numpy(checkpoint.read_f32(name)).to(dtype) for name in checkpoint.tensors}
        self.head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        c = self.config
        self.frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.d_head, 2, dtype=torch.float32) / c.d_head)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm, variance in float32."""
        y = x.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.config.eps)).to(x.dtype) * self.w[name]

    def attention(self, x: Tensor, layer: str, turn: tuple[Tensor, Tensor], cache: Cache, slot: tuple[int, int]) -> Tensor:
        """Causal attention of new positions over the cache of this (step, layer)."""
        c, n = self.config, len(x)
        q, k, v = ((x @ self.w[f"{layer}self_attn.{s}_proj.weight"].T).view(n, -1, c.d_head).transpose(0, 1) for s in "qkv")
        q, k = (rotate(s, *turn) for s in (q, k))
        if slot in cache:
            k, v = torch.cat([cache[slot][0], k], 1), torch.cat([cache[slot][1], v], 1)
        cache[slot] = k, v
        group = c.n_heads // c.n_key_value_heads
        if group > 1:
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        past = k.shape[1] - n
        mask = torch.ones(n, past + n, dtype=torch.bool).tril(past) if n > 1 else None
        z = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
        return z.transpose(0, 1).reshape(n, -1) @ self.w[f"{layer}self_attn.o_proj.weight"].T

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def states(self, ids: Tensor, cache: Cache) -> list[Tensor]:
        """Normed states [n, d_model] of every step for new positions behind those in the cache."""
        past = cache[0, 0][0].shape[1] if cache else 0
        h = self.w["model.embed_tokens.weight"][ids]
        angle = torch.arange(past, past + len(ids), dtype=torch.float32)[:, None] * self.frequency
        turn = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
        out = []
        for step in range(self.config.n_steps):
            for i in range(self.config.n_layers):
                layer = f"model.layers.{i}."
                a = self.attention(self.norm(h, layer + "input_layernorm.weight"), layer, turn, cache, (step, i))
                h = h + self.norm(a, layer + "input_layernorm_2.weight")
                u = self.norm(h, layer + "post_attention_layernorm.weight")
                gate, up = (u @ self.w[f"{layer}mlp.{s}_proj.weight"].T for s in ("gate", "up"))
                m = (functional.silu(gate) * up) @ self.w[layer + "mlp.down_proj.weight"].T
                h = h + self.norm(m, layer + "post_attention_layernorm_2.weight")
            h = self.norm(h, "model.norm.weight")
            out.append(h)
        return out

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self, ids: Tensor, cache: Cache | None = None) -> Cache:
        """Runs new positions to the last position's logits; returns the cache."""
        cache = {} if cache is None else cache
        (self.states(ids, cache)[-1][-1] @ self.head.T).argmax()
        return cache


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding, half-rotation layout."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
