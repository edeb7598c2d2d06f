"""A checkpoint as a GGUF file that llama.cpp runs with the same products over the same bytes, for timing.

llama.cpp has no Ouro. Its `nanbeige` with `num_loops` is a looped stack too: the same layers run `num_loops` times, each loop
with keys and values of its own and the final norm behind it. Two things differ: it has two norms in a block where Ouro has
four, and it pairs the rotary halves otherwise. So it does the same work, up to some vector operations, and computes another
function: its speed is comparable, its text is not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ouro.bench.errors import PeerError
from ouro.checkpoint import Checkpoint, open_checkpoint
from ouro.config import ModelConfig

ARCHITECTURE = "nanbeige"
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def metadata(c: ModelConfig) -> dict[str, int | float | str]:
    """Keys and values of the file, but for the architecture's name."""
    a = ARCHITECTURE
    return {
        f"{a}.block_count": c.n_layers, f"{a}.num_loops": c.n_steps, f"{a}.context_length": c.n_ctx,
        f"{a}.embedding_length": c.d_model, f"{a}.feed_forward_length": c.d_mlp, f"{a}.attention.head_count": c.n_heads,
        f"{a}.attention.head_count_kv": c.n_key_value_heads, f"{a}.attention.key_length": c.d_head,
        f"{a}.attention.value_length": c.d_head, f"{a}.rope.dimension_count": c.d_head, f"{a}.rope.freq_base": c.rope_theta,
        f"{a}.attention.layer_norm_rms_epsilon": c.eps, f"{a}.vocab_size": c.d_vocab, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip


def tensor_names(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """(name in the GGUF, name in the checkpoint) in the order of the file."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    for layer in range(c.n_layers):
        for ours, theirs in LAYER_NAMES.items():
            yield f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight"
    yield "output_norm.weight", "model.norm.weight"
    if not c.tie_word_embeddings:
        yield "output.weight", "lm_head.weight"


def _bf16(checkpoint: Checkpoint, name: str) -> NDArray[np.uint8]:
    """A matrix as bytes of bf16, [rows, 2 * cols] uint8."""
    info = checkpoint.tensors[name]
    if info.dtype == "BF16":
        raw = np.empty(info.nbytes, np.uint8)
        checkpoint.read_into(info, 0, memoryview(raw.data))
        return raw.reshape(info.shape[0], -1)
    bits = checkpoint.read_f32(name).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)


def _set(writer: Any, key: str, value: int | float | str) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
    add(key, value)


def write_gguf(directory: Path, to: Path) -> Path:
    """Write a checkpoint as bf16 GGUF; a file that is there is kept.

    Raises
    ------
    PeerError
        Without the package `gguf`.
    """
    if to.exists():
        return to
    try:
        import gguf
    except ImportError:
        raise PeerError("writing a GGUF needs the package gguf (pip install gguf)") from None
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_suffix(".partial")
    with open_checkpoint(directory) as checkpoint:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        for key, value in metadata(checkpoint.config).items():
            _set(writer, key, value)
        names = list(tensor_names(checkpoint.config))
        for theirs, ours in names:
            shape = checkpoint.tensors[ours].shape
            count = int(np.prod(shape))
            if len(shape) == 1:
                writer.add_tensor_info(theirs, shape, np.dtype(np.float32), 4 * count)
            else:
                bf16 = gguf.GGMLQuantizationType.BF16
                writer.add_tensor_info(theirs, (shape[0], 2 * shape[1]), np.dtype(np.uint8), 2 * count, raw_dtype=bf16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, ours in names:
            one = len(checkpoint.tensors[ours].shape) == 1
            writer.write_tensor_data(checkpoint.read_f32(ours) if one else _bf16(checkpoint, ours))
        writer.close()
    os.replace(partial, to)
    return to
