"""`config.json` of an Ouro checkpoint, read strictly: a missing key that matters is an error, never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro.errors import CheckpointError
from ouro.files import read_json

MAX_HEADS_PER_GROUP = 48  # query heads on one key/value head that the core can attend together


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of a looped model (names as in the docs: `step` is a pass through the shared stack).

    Attributes
    ----------
    n_layers, n_steps
        Layers of the shared stack, and how often it is applied (the trained number of recurrent steps).
    n_heads, n_key_value_heads, d_head
        Query heads, key/value heads, and the size of each.
    d_model, d_mlp, d_vocab, n_ctx
        Width of the residual stream and of the feed-forward, vocabulary, longest sequence.
    eps, rope_theta
        Of every RMSNorm; base of the rotary embedding.
    tie_word_embeddings
        Whether the head is the embedding.
    exit_threshold
        The checkpoint's `early_exit_threshold`; informative, no call uses it unless told to.
    """

    n_layers: int
    n_steps: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    eps: float
    rope_theta: float
    tie_word_embeddings: bool
    exit_threshold: float

    @property
    def n_params(self) -> int:
        """Parameters of the checkpoint, the exit gate included."""
        d, q, kv = self.d_model, self.n_heads * self.d_head, self.n_key_value_heads * self.d_head
        layer = 2 * d * q + 2 * d * kv + 3 * d * self.d_mlp + 4 * d
        tables = self.d_vocab * d * (1 if self.tie_word_embeddings else 2)
        return self.n_layers * layer + tables + d + d + 1

    def kv_bytes_per_token(self, n_steps: int | None = None, *, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that one position takes (bf16 unless told otherwise), all steps together."""
        steps = self.n_steps if n_steps is None else n_steps
        return steps * self.n_layers * 2 * self.n_key_value_heads * self.d_head * bytes_per_value

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], file: Path) -> ModelConfig:
        """Read the keys of a released `config.json`; harmless extra keys are passed over.

        Raises
        ------
        CheckpointError
            For another model type, an unsupported option, a missing key or a value out of range.
        """
        return _Reader(found, file).config()


class _Reader:
    """Takes checked values out of a config dictionary."""

    def __init__(self, found: Mapping[str, Any], file: Path) -> None:
        self.found, self.file = found, file

    def fail(self, what: str, found: object = None, expected: object = None) -> CheckpointError:
        return CheckpointError(what, file=self.file, found=found, expected=expected)

    def need(self, key: str) -> Any:
        if self.found.get(key) is None:
            raise self.fail(f"config has no '{key}'")
        return self.found[key]

    def integer(self, key: str, most: int) -> int:
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.fail(f"config: '{key}' is out of range", value, f"an integer from 1 to {most}")
        return value

    def number(self, key: str, low: float, high: float, value: Any = None) -> float:
        value = self.need(key) if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.fail(f"config: '{key}' is out of range", value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.need(key)
        if not isinstance(value, bool):
            raise self.fail(f"config: '{key}' is not a boolean", value, "true or false")
        return value

    def refuse_other_models(self) -> None:
        if self.need("model_type") != "ouro":
            raise self.fail("not an Ouro model", self.found["model_type"], "model_type 'ouro'")
        if self.need("hidden_act") != "silu":
            raise self.fail("unsupported activation", self.found["hidden_act"], "'silu'")
        if self.found.get("use_sliding_window"):
            raise self.fail("sliding window attention is not supported", True, "use_sliding_window false")
        for key in ("attention_bias", "mlp_bias"):
            if self.found.get(key):
                raise self.fail(f"'{key}' is not supported", self.found[key], "false")

    def refuse_other_layers(self, n_layers: int) -> None:
        kinds = self.found.get("layer_types")
        if kinds is None:
            return
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(k != "full_attention" for k in kinds):
            raise self.fail("unsupported layer_types", str(kinds)[:80], f"{n_layers} times 'full_attention'")

    def rope_theta(self) -> float:
        scaling = self.found.get("rope_scaling")
        if scaling is not None and not (isinstance(scaling, dict) and _is_plain_rope(scaling)):
            raise self.fail("rope scaling is not supported", str(scaling)[:80], "null")
        parameters = self.found.get("rope_parameters")
        if parameters is None:
            return self.number("rope_theta", 1.5, 1e11)
        if not isinstance(parameters, dict) or not _is_plain_rope(parameters):
            raise self.fail("rope scaling is not supported", str(parameters)[:80], "rope_type 'default'")
        theta = parameters.get("rope_theta", self.found.get("rope_theta"))
        if theta is None:
            raise self.fail("config has no 'rope_theta'")
        return self.number("rope_theta", 1.5, 1e11, theta)

    def config(self) -> ModelConfig:
        self.refuse_other_models()
        n_layers = self.integer("num_hidden_layers", 4096)
        self.refuse_other_layers(n_layers)
        d_model, n_heads = self.integer("hidden_size", 1 << 20), self.integer("num_attention_heads", 4096)
        n_kv = self.integer("num_key_value_heads", 4096)
        if n_heads % n_kv or n_heads // n_kv > MAX_HEADS_PER_GROUP:
            raise self.fail("query heads do not fit key/value heads", f"{n_heads} and {n_kv}",
                            f"a multiple, at most {MAX_HEADS_PER_GROUP} each")
        if self.found.get("head_dim") is None:
            if d_model % n_heads:
                raise self.fail("config has no 'head_dim' and hidden_size is no multiple of the heads",
                                f"{d_model} and {n_heads}")
            d_head = d_model // n_heads
        else:
            d_head = self.integer("head_dim", 1024)
        if d_head % 2 or d_head > 1024:
            raise self.fail("unsupported head_dim", d_head, "an even number up to 1024")
        threshold = self.found.get("early_exit_threshold", 1.0)
        return ModelConfig(
            n_layers=n_layers, n_steps=self.integer("total_ut_steps", 64), n_heads=n_heads, n_key_value_heads=n_kv,
            d_model=d_model, d_head=d_head, d_mlp=self.integer("intermediate_size", 1 << 22),
            d_vocab=self.integer("vocab_size", 1 << 24), n_ctx=self.integer("max_position_embeddings", 1 << 24),
            eps=self.number("rms_norm_eps", 1e-12, 0.5), rope_theta=self.rope_theta(),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            exit_threshold=self.number("early_exit_threshold", 0.0, 1.0, threshold),
        )  # fmt: skip


def _is_plain_rope(parameters: Mapping[str, Any]) -> bool:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return kind == "default" and not set(parameters) - {"rope_type", "type", "rope_theta"}


def load_config(directory: Path) -> ModelConfig:
    """The configuration of a checkpoint directory."""
    path = directory / "config.json"
    return ModelConfig.from_dict(read_json(path), path)
