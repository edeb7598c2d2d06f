"""int4 weights chosen by what they are multiplied with, over all recurrent steps.

A looped model multiplies one matrix with other inputs at every step, so the error that counts is `|(W - W') x|^2` over the inputs
of all steps: `tr (W - W') H (W - W')^T` with H = sum x x^T. Columns are rounded one by one, and the error of each is made up for
by those that follow it (GPTQ: Frantar et al., arXiv 2210.17323, section 3), in groups of 64 whose scale is searched first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ouro.checkpoint import Checkpoint
from ouro.errors import CheckpointError
from ouro.model import Model

GROUP = 64
LOW, HIGH = -8, 7
DIVISORS = (-8.0, -7.5, -7.0, -8.5, 7.0, 7.5, -6.5, 8.0)  # of a group's extreme value; as csrc/kernels/pack.c
DAMPING = 0.05  # of the mean of H's diagonal, added to it
MOMENT_BYTES = 1 << 30  # of the H held at a time
INPUTS = {
    "self_attn.q_proj.weight": "ln1.hook_normalized", "self_attn.k_proj.weight": "ln1.hook_normalized",
    "self_attn.v_proj.weight": "ln1.hook_normalized", "self_attn.o_proj.weight": "attn.hook_z",
    "mlp.gate_proj.weight": "ln2.hook_normalized", "mlp.up_proj.weight": "ln2.hook_normalized",
    "mlp.down_proj.weight": "mlp.hook_post",
}  # fmt: skip
"""What each matrix of a layer is multiplied with."""


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of bfloat16, nearest even, denormals to zero as in the core; finite values only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(bits & 0x7F800000 == 0, bits >> 16 & 0x8000, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The value of each."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(w * inverse), LOW, HIGH)


def choose_scales(w: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 scales `[rows]` of one group `w [rows, <= 64]` with the least `sum weight (w - s q)^2` among a few, and one
    least-squares step from the best."""
    extreme = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1)
    scale = best = None
    for divisor in (*DIVISORS, None):
        if divisor is not None:
            tried = from_bf16(to_bf16(extreme / np.float32(divisor)))
        else:
            assert scale is not None
            q = _rounded(w, scale)
            size = (weight * q * q).sum(1, keepdims=True)
            step = np.divide((weight * w * q).sum(1, keepdims=True), size, out=scale.copy(), where=size > 0)
            tried = from_bf16(to_bf16(step))
        error = (weight * (w - tried * _rounded(w, tried)) ** 2).sum(1, keepdims=True)
        if best is None or scale is None:
            scale, best = tried, error
        else:
            scale, best = np.where(error < best, tried, scale), np.minimum(error, best)
    assert scale is not None
    return to_bf16(scale[:, 0])


def _inverse(r: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inverse of an upper triangular matrix, by halves: a sixth of the work of a general one."""
    n = len(r)
    if n <= 128:
        return np.asarray(np.triu(np.linalg.inv(r)), np.float32)
    a, b, out = _inverse(r[: n // 2, : n // 2]), _inverse(r[n // 2 :, n // 2 :]), np.zeros_like(r)
    out[: n // 2, : n // 2], out[n // 2 :, n // 2 :] = a, b
    out[: n // 2, n // 2 :] = -a @ (r[: n // 2, n // 2 :] @ b)
    return out


def feedback(h: NDArray[np.float64]) -> NDArray[np.float32]:
    """Upper triangular U with `U^T U = H^-1` (H damped): row i says how the error of column i goes on to later ones.

    H = R R^T with R upper triangular (Cholesky from the last column backwards), so U = R^-1.
    """
    n = len(h)
    mean = float(np.trace(h)) / n
    damped = h / mean if mean > 0 else np.zeros_like(h)
    damped[np.diag_indices(n)] += DAMPING
    return _inverse(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1].astype(np.float32))


def quantise(
    w: NDArray[np.float32], h: NDArray[np.float64], back: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """int4 values of a matrix.

    Parameters
    ----------
    w : array [rows, cols]
    h : array [cols, cols]
        Second moments `sum x x^T` of its inputs.
    back : array [cols, cols], optional
        `feedback(h)`, where several matrices share their inputs.

    Returns
    -------
    scales : array [rows, ceil(cols / 64)]
        Bits of bfloat16.
    q : int8 array [rows, cols]
        -8..7.
    """
    rows, cols = w.shape
    left, back = np.array(w, np.float32), feedback(h) if back is None else back
    weight = np.asarray(np.diag(h) + 1e-9 * np.trace(h) / cols + 1e-30, np.float32)
    scales, q = np.zeros((rows, -(-cols // GROUP)), np.uint16), np.zeros((rows, cols), np.int8)
    for begin in range(0, cols, GROUP):
        end = min(begin + GROUP, cols)
        block = np.ascontiguousarray(left[:, begin:end].T)  # [col, row]: one column is contiguous
        scales[:, begin // GROUP] = choose_scales(block.T, weight[begin:end])
        scale = from_bf16(scales[:, begin // GROUP])
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        errors = np.empty_like(block)
        for i in range(end - begin):
            rounded = np.clip(np.rint(block[i] * inverse), LOW, HIGH)
            q[:, begin + i] = rounded
            errors[i] = (block[i] - rounded * scale) / back[begin + i, begin + i]
            block[i + 1 :] -= np.outer(back[begin + i, begin + i + 1 : end], errors[i])
        left[:, end:] -= errors.T @ back[begin:end, end:]
    return scales, q


def moments(model: Model, sequences: Sequence[Sequence[int]], layers: range) -> dict[tuple[int, str], NDArray[np.float64]]:
    """`sum x x^T` over positions and steps of every product input of some layers, by (layer, hook name)."""
    names = sorted(set(INPUTS.values()))
    found: dict[tuple[int, str], NDArray[np.float64]] = {}
    for ids in sequences:
        wanted = [f"blocks.{layer}.{name}" for layer in layers for name in names]
        cache = model.run_with_cache(list(ids), wanted, logits="none")[1]
        for layer in layers:
            for name in names:
                x = np.concatenate([cache[f"steps.{t}.blocks.{layer}.{name}"][0] for t in range(model.config.n_steps)])
                x = x.reshape(len(x), -1)
                product = (x.T @ x).astype(np.float64)
                found[layer, name] = found[layer, name] + product if (layer, name) in found else product
    return found


def shrunk(h: NDArray[np.float64], tokens: int) -> NDArray[np.float64]:
    """Moments `[cols, cols]` of few tokens, in place: off the diagonal times `tokens^2 / (tokens^2 + cols^2)`.

    Products of two columns over fewer tokens than columns are mostly noise, and error feedback would fit the rounding to it. The
    steps of a token are nearly alike, so tokens count and not inputs. (Shrinking towards the diagonal: Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices", 2004; the share here is our own, tried in docs/quantization.md.)
    """
    diagonal = np.diag(h).copy()
    h *= tokens**2 / (tokens**2 + len(h) ** 2)
    h[np.diag_indices(len(h))] = diagonal
    return h


def calibrated(
    checkpoint: Checkpoint, model: Model, sequences: Sequence[Sequence[int]], parts: Sequence[str]
) -> Iterator[tuple[str, NDArray[np.uint16], NDArray[np.int8]]]:
    """(tensor name, scales, q) of the matrices `parts` (keys of `INPUTS`) of all layers, a few layers' moments at a time.

    `model` is the checkpoint in a float compute.
    """
    from tqdm.auto import tqdm

    c = model.config
    layer_bytes = 8 * (2 * c.d_model**2 + (c.n_heads * c.d_head) ** 2 + c.d_mlp**2)
    step, tokens = max(1, MOMENT_BYTES // layer_bytes), sum(map(len, sequences))
    with tqdm(total=c.n_layers * len(parts), desc="calibrating", unit="matrix", delay=1.0, leave=False) as bar:
        for begin in range(0, c.n_layers, step):
            layers = range(begin, min(begin + step, c.n_layers))
            seen = {at: shrunk(h, tokens) for at, h in moments(model, sequences, layers).items()}
            for layer in layers:
                back: dict[str, NDArray[np.float32]] = {}
                for part in parts:
                    point = INPUTS[part]
                    if point not in back:
                        back = {point: feedback(seen[layer, point])}  # parts with the same input follow one another
                    name = f"model.layers.{layer}.{part}"
                    w = checkpoint.read_f32(name)
                    if not np.isfinite(w).all():
                        raise CheckpointError("weights are not finite", file=checkpoint.directory, tensor=name)
                    yield name, *quantise(w, seen[layer, point], back[point])
                    bar.update(1)
