"""Random checkpoints of any size in the released format, for timing and memory tests.

    python benchmarks/make_weights.py DIR --size 1.4b|2.6b|small [--alpha A] [--seed S]

Speed does not depend on the values. `--alpha` is the weight of the two norms that close each block: a small one makes each
step change the state little, so that early readouts agree with the last one more often.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

from ouro.checkpoint import expected_shapes
from ouro.config import ModelConfig

SHAPES = {"1.4b": (24, 2048, 16, 128, 5632, 49152), "2.6b": (48, 2048, 16, 128, 5632, 49152), "small": (6, 512, 8, 64, 1408, 4096)}
PIECE = 1 << 22  # values made at a time


def config_of(size: str, n_steps: int = 4) -> dict[str, object]:
    """The released config.json with the sizes of `size`."""
    layers, d, heads, d_head, d_mlp, vocab = SHAPES[size]
    return {
        "model_type": "ouro", "architectures": ["OuroForCausalLM"], "hidden_act": "silu", "hidden_size": d, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": d_head, "intermediate_size": d_mlp, "vocab_size": vocab,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 65536, "tie_word_embeddings": False,
        "use_sliding_window": False, "layer_types": ["full_attention"] * layers, "total_ut_steps": n_steps, "early_exit_threshold": 1.0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def values(name: str, shape: tuple[int, ...], alpha: float, rng: np.random.Generator):
    """Pieces of one tensor, float32."""
    left = int(np.prod(shape))
    if name.endswith("_2.weight") or "norm" in name or name.endswith("bias"):
        yield np.full(left, alpha if name.endswith("_2.weight") else -0.4 if name.endswith("bias") else 1.0)
        return
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    while left:
        n = min(left, PIECE)
        yield rng.standard_normal(n, dtype=np.float32) * np.float32(scale)
        left -= n


def make(directory: Path, size: str, alpha: float = 0.02, seed: int = 0) -> Path:
    """Write the checkpoint; what is there and complete already is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    found = config_of(size)
    shapes = dict(sorted(expected_shapes(ModelConfig.from_dict(found, directory)).items()))
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    path = directory / "model.safetensors"
    if not path.exists() or path.stat().st_size != 8 + len(raw) + at:
        rng = np.random.default_rng(seed)
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            for name, shape in shapes.items():
                for piece in values(name, shape, alpha, rng):
                    out.write(to_bf16(piece).tobytes())
    (directory / "config.json").write_text(json.dumps(found, indent=2))
    return directory


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", type=Path)
    p.add_argument("--size", choices=SHAPES, default="1.4b")
    p.add_argument("--alpha", type=float, default=0.02)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    print(make(a.directory, a.size, a.alpha, a.seed))
