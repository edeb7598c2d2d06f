"""What a model costs, and how fast a machine can be with it at most.

A token that is decoded reads the shared layers once per step, the head once, and the keys and values of its context. A prompt
is bound by its operations, a multiply-add counting two: `2 n T params(layers) + 2 params(head)` for the products, and
`4 T L H d_head n (n + 1) / 2` for attention. Bytes over the measured read rate, or operations over the measured peak, is time
that no program can save on this machine with weights of this size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ouro.config import ModelConfig

UNIT = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}  # the products of a compute mode run on it
PREFILL_LANES = 256  # positions that share one pass over the weights


@dataclass(frozen=True)
class Cost:
    """Sizes that decide speed.

    Attributes
    ----------
    n_steps
        Passes over the layers for a token.
    layer_params, head_params
        Weights in products: of all shared layers, of the head.
    layer_bytes, head_bytes
        What they take in memory, scales and padding included.
    attention
        Operations of one token's attention per position of its context: `4 T L H d_head`.
    kv_bytes
        Keys and values of one position, all steps.
    """

    n_steps: int
    layer_params: int
    head_params: int
    layer_bytes: float
    head_bytes: float
    attention: int
    kv_bytes: float

    @classmethod
    def of(cls, c: ModelConfig, layer_bytes: float, head_bytes: float, kv_bytes: float) -> Cost:
        """The cost of a model whose weights take so many bytes."""
        q, kv = c.n_heads * c.d_head, c.n_key_value_heads * c.d_head
        layers = c.n_layers * (2 * c.d_model * q + 2 * c.d_model * kv + 3 * c.d_model * c.d_mlp)
        attention = 4 * c.n_steps * c.n_layers * q
        return cls(c.n_steps, layers, c.d_vocab * c.d_model, layer_bytes, head_bytes, attention, kv_bytes)

    @classmethod
    def of_formats(cls, c: ModelConfig, layer_bits: float, head_bits: float, kv_bits: float = 16) -> Cost:
        """The same from bits per weight and per cached value."""
        plain = cls.of(c, 0, 0, 0)
        kv = c.kv_bytes_per_token(bytes_per_value=1) * kv_bits / 8
        return cls.of(c, plain.layer_params * layer_bits / 8, plain.head_params * head_bits / 8, kv)

    def decode_bytes(self, context: int) -> float:
        """Read for one token behind `context` others."""
        return self.n_steps * self.layer_bytes + self.head_bytes + context * self.kv_bytes

    def decode_operations(self, context: int) -> float:
        """Done for one token behind `context` others."""
        return 2 * (self.n_steps * self.layer_params + self.head_params) + self.attention * context

    def prefill_bytes(self, n: int) -> float:
        """Weights read for a prompt of n tokens."""
        return -(-n // PREFILL_LANES) * self.n_steps * self.layer_bytes + self.head_bytes

    def prefill_operations(self, n: int) -> float:
        """Done for a prompt of n tokens and the logits of its last."""
        return 2 * (n * self.n_steps * self.layer_params + self.head_params) + self.attention * n * (n + 1) / 2

    def bound(self, kind: str, n: int, read: float, peak: float) -> float:
        """Tokens per second at most.

        Parameters
        ----------
        kind, n
            "prefill" of n tokens, or "decode" behind n tokens.
        read, peak
            Bytes and operations per second of the machine.
        """
        if kind == "prefill":
            return n / max(self.prefill_operations(n) / peak, self.prefill_bytes(n) / read)
        return 1 / max(self.decode_operations(n) / peak, self.decode_bytes(n) / read)

    def operations(self, kind: str, n: int) -> float:
        """Per token."""
        return self.prefill_operations(n) / n if kind == "prefill" else self.decode_operations(n)

    def intensity(self, kind: str, n: int) -> float:
        """Operations per byte that has to be read."""
        if kind == "prefill":
            return self.prefill_operations(n) / self.prefill_bytes(n)
        return self.decode_operations(n) / self.decode_bytes(n)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)
