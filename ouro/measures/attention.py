"""What the heads look at, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.labelled import LabelledSet
from ouro.measures.source import captured, labelled
from ouro.model import Batch, Model

FORMULAS = {
    "stability": "1 - mean_i sum_j |p_t[i,j] - p_{t-1}[i,j]| / 2",
    "entropy": "mean_i -sum_j p[i,j] log p[i,j]",
    "first_token": "mean_i p[i,0], i > 0",
    "previous_token": "mean_i p[i,i-1], i > 0",
    "induction": "mean_i sum_{j <= i, x_{j-1} = x_i} p[i,j]",
    "duplicate_token": "mean_i sum_{j < i, x_j = x_i} p[i,j]",
}


def induction_mask(tokens: ArrayLike) -> NDArray[np.bool_]:
    """`mask[i, j]`: j follows an earlier occurrence of token i (`j <= i` and `x_{j-1} = x_i`, `j - 1 < i`)."""
    x = np.asarray(tokens)
    n = len(x)
    mask = np.zeros((n, n), bool)
    mask[:, 1:] = x[:, None] == x[None, :-1]
    return np.tril(mask)


def duplicate_mask(tokens: ArrayLike) -> NDArray[np.bool_]:
    """`mask[i, j]`: j is an earlier occurrence of token i (`j < i` and `x_j = x_i`)."""
    x = np.asarray(tokens)
    return np.tril(x[:, None] == x[None, :], -1)


def _rows(pattern: NDArray[np.float64], tokens: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Each score for each row that counts for it `[step, ..., row]`."""
    n = pattern.shape[-1]
    positive = np.where(pattern > 0, pattern, 1.0)
    out = {"entropy": -(positive * np.log(positive)).sum(-1)}
    change = np.abs(np.diff(pattern, axis=0)).sum(-1) / 2
    out["stability"] = np.concatenate([np.full_like(out["entropy"][:1], np.nan), 1 - change])
    later = np.arange(1, n)
    out["first_token"] = pattern[..., 1:, 0]
    out["previous_token"] = pattern[..., later, later - 1]
    for name, mask in (("induction", induction_mask(tokens)), ("duplicate_token", duplicate_mask(tokens))):
        some = mask.any(1)
        out[name] = (pattern * mask).sum(-1)[..., some]
    return out


def head_scores(pattern: ArrayLike, tokens: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """The scores of `attention_drift` for one sequence.

    Parameters
    ----------
    pattern : array [step, ..., pos, pos]
        Attention after softmax: from (rows) to.
    tokens : int array [pos]

    Returns
    -------
    dict of array [step, ...]
        NaN where a score has no row to count (no repeated token; no step before).
    """
    p = np.asarray(pattern, np.float64)
    if p.shape[-2:] != (len(np.asarray(tokens)),) * 2:
        raise ValueError(f"pattern has {p.shape[-2]} rows of {p.shape[-1]}, expected {len(np.asarray(tokens))} of both")
    return {n: a.mean(-1) if a.shape[-1] else np.full(a.shape[:-1], np.nan) for n, a in _rows(p, tokens).items()}


def repeated_tokens(model: Model, length: int = 24, *, batch: int = 4, seed: int = 0) -> NDArray[np.int64]:
    """Random tokens, each row said twice `[batch, 2 * length]`: the input that induction heads are measured on (Olsson et al.).

    Special tokens and padding of the vocabulary are left out; without a tokenizer all ids are taken.

    >>> import ouro
    >>> from ouro.measures import repeated_tokens
    >>> ids = repeated_tokens(ouro.load("ouro-tiny"), 5, batch=2)
    >>> ids.shape, bool((ids[:, :5] == ids[:, 5:]).all())
    ((2, 10), True)
    """
    usable = np.arange(model.config.d_vocab)
    if model.tokenizer is not None:
        texts = model.tokenizer.token_strings(usable.tolist())
        usable = np.array([i for i, t in enumerate(texts) if t and not (t.startswith("<|") and t.endswith("|>"))])
    once = np.random.default_rng(seed).choice(usable, (batch, length))
    return np.concatenate([once, once], axis=1).astype(np.int64)


def attention_drift(source: Model | Any, x: Batch | Any = None, *, n_steps: int | None = None) -> LabelledSet:
    """What each head does at each step, and whether it does the same at the next.

    Arrays `[step, layer, head]`, means over the rows (attending positions) of all sequences; p is the pattern, x the tokens:

    | name | formula |
    |---|---|
    | stability | `1 - mean_i sum_j |p_t[i,j] - p_{t-1}[i,j]| / 2` (one minus total variation): 1 is the same as the step before |
    | entropy | `mean_i -sum_j p[i,j] log p[i,j]`, nats |
    | first_token | `mean p[i,0]`, i > 0 |
    | previous_token | `mean p[i,i-1]`, i > 0 |
    | induction | mean over the i whose token came before: mass on what followed it then, `sum_{j <= i, x_{j-1} = x_i} p[i,j]` |
    | duplicate_token | the same for `x_j = x_i`, j < i |

    Induction heads are measured on random tokens said twice: `attention_drift(model, repeated_tokens(model))`.

    Parameters
    ----------
    source, x
        A model and texts or ids, or a cache with `pattern`.
    n_steps
        Recurrent steps to run.

    Raises
    ------
    TypeError, KeyError
        As `angular_distance`, of `pattern`.

    Source
    ------
    Induction and previous-token scores: Olsson et al., "In-context learning and induction heads", arXiv 2209.11895; mass on the
    first token ("attention sink"): Xiao et al., arXiv 2309.17453.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import attention_drift, repeated_tokens
    >>> model = ouro.load("ouro-tiny")
    >>> heads = attention_drift(model, repeated_tokens(model, 12))
    >>> heads["induction"].dims, heads["induction"].shape
    (('step', 'layer', 'head'), (4, 4, 4))
    """
    cache = captured(source, x, ["pattern"], n_steps=n_steps)
    pattern = cache.stack("pattern")  # [step, layer, batch, head, dest_pos, src_pos]
    steps, layers, _, heads = pattern.shape[:4]
    total = {name: np.zeros((steps, layers, heads)) for name in FORMULAS}
    count = dict.fromkeys(FORMULAS, 0)
    for row, ids in enumerate(cache.token_ids):
        n = len(ids)
        for layer in range(layers):  # one at a time: several float64 copies are made of it
            for name, a in _rows(pattern[:, layer, row, :, :n, :n].astype(np.float64), ids).items():
                total[name][:, layer] += a.sum(-1)
                count[name] += a.shape[-1] if layer == 0 else 0
    coords = {"step": cache.steps("pattern"), "layer": cache.layers("pattern")}
    arrays = {}
    for name, formula in FORMULAS.items():
        values = total[name] / count[name] if count[name] else np.full_like(total[name], np.nan)
        units = "nats" if name == "entropy" else ""
        arrays[name] = labelled(values, ("step", "layer", "head"), coords, units=units, formula=formula, plotter="plot_heads")
    return LabelledSet(arrays, title="heads by step", plotter="plot_attention_drift")
