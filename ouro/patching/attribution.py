"""Direct attribution: which step, layer and head put an answer's logit where it is.

Along the residual stream a looped model is a chain of sums and norms:

    h_t = state_(t-1) + sum_l (attn_out + mlp_out),    state_t = h_t / scale_t * w_norm,    z = W_head state_(T-1)

With the scales of the norms held at what they were, the last logits are a linear function of everything that was ever added,
so they split exactly into what each step's layers and heads wrote, however many norms lie behind (Elhage et al. 2021, "A
mathematical framework for transformer circuits", direct paths; here through the loop).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledArray, LabelledSet
from ouro.patching.metric import token_id

if TYPE_CHECKING:
    from ouro.model import Model, Tokens

POINTS = ["hook_embed", "attn_out", "mlp_out", "result", "ln1_post_scale", "ln_final_scale"]
Doubles = NDArray[np.float64]


def _direction(model: Model, answer: str | int, other: str | int | None) -> Doubles:
    """The row of the head that the answer's logit is a product with; less the other's."""

    def row(token: str | int) -> Doubles:
        i = token_id(model, token)
        return np.asarray(model.weight("lm_head.weight", slice(i, i + 1))[0], np.float64)

    return row(answer) if other is None else row(answer) - row(other)


def logit_attribution(
    model: Model, x: Tokens, answer: str | int, other: str | int | None = None, *, at: int = -1, n_steps: int | None = None
) -> LabelledSet:
    """Split an answer's logit (less another's) into what each step, layer and head adds to it directly.

    Parameters
    ----------
    model : Model
    x
        Text or token ids of one sequence.
    answer, other
        Tokens; without `other` the logit itself is split, which moves with everything that moves all logits.
    at
        The position whose readout counts.
    n_steps
        Recurrent steps; the trained number unless given.

    Returns
    -------
    LabelledSet
        `head [step, layer, head]`, `attn [step, layer]` (their sums), `mlp [step, layer]`, `embed []`; logits. All of `attn`, `mlp`
        and `embed` add up to `attrs["total"]`; `attrs["logit"]` is the logit that the model computed, which differs by the rounding of
        its compute.

    Examples
    --------
    >>> import ouro
    >>> model = ouro.load("ouro-tiny", compute="float32")
    >>> parts = ouro.patching.logit_attribution(model, "Ann is the boss of", " Dan", " Ann")
    >>> bool(abs(parts.attrs["total"] - parts.attrs["logit"]) < 1e-3)
    True
    """
    tokens = model._one(x)
    if not -len(tokens) <= at < len(tokens):
        raise IndexError(f"position {at} is out of range, expected {-len(tokens)} to {len(tokens) - 1}")
    place = at % len(tokens)
    logits, cache = model.run_with_cache(tokens, names_filter=POINTS, pos=[place], n_steps=n_steps, logits="none")
    del logits
    attn, mlp, result = (np.asarray(cache.stack(p), np.float64)[:, :, 0, 0] for p in ("attn_out", "mlp_out", "result"))
    post_scale = np.asarray(cache.stack("ln1_post_scale"), np.float64)[:, :, 0, 0].reshape(attn.shape[:2])
    final_scale = np.asarray(cache.stack("ln_final_scale"), np.float64)[:, 0, 0].reshape(-1)
    steps, layers = attn.shape[:2]
    norm = model.weight("model.norm.weight").astype(np.float64)
    behind = np.stack([model.weight(f"model.layers.{i}.input_layernorm_2.weight") for i in range(layers)]).astype(np.float64)
    u = np.zeros((steps, model.config.d_model))
    along = _direction(model, answer, other)
    for t in reversed(range(steps)):  # u_t: what one unit in the residual stream of step t does to the logit
        along = along * norm / final_scale[t]
        u[t] = along
    heads = np.einsum("td,tlhd,ld,tl->tlh", u, result, behind, 1 / post_scale)
    kind: dict[str, Any] = {"attrs": {"units": "logits"}, "plotter": "plot_patching"}
    parts = {
        "head": LabelledArray(heads, ("step", "layer", "head"), **kind),
        "attn": LabelledArray(np.einsum("td,tld->tl", u, attn), ("step", "layer"), **kind),
        "mlp": LabelledArray(np.einsum("td,tld->tl", u, mlp), ("step", "layer"), **kind),
        "embed": LabelledArray(u[0] @ np.asarray(cache["hook_embed"], np.float64).reshape(-1), (), **kind),
    }
    total = float(parts["attn"].values.sum() + parts["mlp"].values.sum() + parts["embed"].values)
    attrs = {"total": total, "logit": _logit(model, tokens, answer, other, place, steps), "at": place,
             "source": "Elhage et al. 2021; norms with their scales held, through all steps"}  # fmt: skip
    return LabelledSet(parts, title="direct logit attribution", attrs=attrs, plotter="plot_patching")


def _logit(model: Model, tokens: list[int], answer: str | int, other: str | int | None, at: int, steps: int) -> float:
    """What the model itself computed."""
    state = model.trace(tokens, n_steps=steps, logits="none").states[-1, 0, at : at + 1]
    z = model._core.readout(np.ascontiguousarray(state), True)[0][0]
    return float(z[token_id(model, answer)]) - (0.0 if other is None else float(z[token_id(model, other)]))
