"""Sweeps under the names and with the arguments of `transformer_lens.patching`, with the step as a further leading axis.

Each takes (model, corrupted_tokens, clean_cache, patching_metric). The metric is a function of logits [1, pos, d_vocab] as
there, with `pos` the last position only (so `logits[0, -1]` is what it was); or whatever `sweep` takes. All of them return a
LabelledArray and pass further arguments on to `sweep`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledArray
from ouro.patching.metric import Metric
from ouro.patching.patterns import pattern_sweep
from ouro.patching.sweep import sweep

if TYPE_CHECKING:
    from ouro.cache import ActivationCache
    from ouro.model import Model, Tokens


def one_by_one(metric: Metric) -> Metric:
    """A metric of one run's logits [1, pos, d_vocab] as one of many."""
    if not callable(metric):
        return metric
    given: Callable[[Any], Any] = metric

    def each(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        values = [np.asarray(given(z[None])) for z in logits]
        for v in values:
            if v.size != 1:
                raise ValueError(f"the metric returned shape {v.shape} for logits of {(1, *logits.shape[1:])}, expected one number")
        return np.array([float(v.item()) for v in values])

    each.__qualname__ = getattr(metric, "__qualname__", str(metric))
    return each


Patch = Callable[..., LabelledArray]


def _named(point: str, axes: tuple[str, ...], what: str) -> Patch:
    def patch(
        model: Model, corrupted_tokens: Tokens, clean_cache: ActivationCache, patching_metric: Metric, **arguments: Any
    ) -> LabelledArray:
        return sweep(model, clean_cache, corrupted_tokens, one_by_one(patching_metric), points=point, axes=axes, **arguments)

    patch.__doc__ = f"Replace {what}: [{', '.join(axes)}]. Arguments as in `transformer_lens.patching`; see `sweep`."
    return patch


def _patterns(axes: tuple[str, ...], what: str) -> Patch:
    def patch(
        model: Model, corrupted_tokens: Tokens, clean_cache: ActivationCache, patching_metric: Metric, **arguments: Any
    ) -> LabelledArray:
        return pattern_sweep(model, corrupted_tokens, clean_cache, one_by_one(patching_metric), axes=axes, **arguments)

    patch.__doc__ = f"Replace {what}: [{', '.join(axes)}], a whole run for each. See `pattern_sweep`."
    return patch


_BY_POSITION, _BY_HEAD, _BY_BOTH = ("step", "layer", "pos"), ("step", "layer", "head"), ("step", "layer", "pos", "head")

get_act_patch_resid_pre = _named("resid_pre", _BY_POSITION, "the residual stream before a layer")
get_act_patch_resid_mid = _named("resid_mid", _BY_POSITION, "the residual stream between attention and feed-forward")
get_act_patch_attn_out = _named("attn_out", _BY_POSITION, "what attention adds")
get_act_patch_mlp_out = _named("mlp_out", _BY_POSITION, "what the feed-forward adds")
get_act_patch_attn_head_out_by_pos = _named("z", _BY_BOTH, "one head's output at one position")
get_act_patch_attn_head_out_all_pos = _named("z", _BY_HEAD, "one head's output at all positions")
get_act_patch_attn_head_q_all_pos = _named("q", _BY_HEAD, "one head's queries at all positions")
get_act_patch_attn_head_k_all_pos = _named("k", _BY_HEAD, "one head's keys at all positions")
get_act_patch_attn_head_v_all_pos = _named("v", _BY_HEAD, "one head's values at all positions")
get_act_patch_attn_head_q_by_pos = _named("q", _BY_BOTH, "one head's query at one position")
get_act_patch_attn_head_k_by_pos = _named("k", _BY_BOTH, "one head's key at one position")
get_act_patch_attn_head_v_by_pos = _named("v", _BY_BOTH, "one head's value at one position")
get_act_patch_attn_head_pattern_all_pos = _patterns(_BY_HEAD, "one head's attention pattern")
get_act_patch_attn_head_pattern_by_pos = _patterns((*_BY_HEAD, "dest_pos"), "one head's attention pattern at one attending position")
get_act_patch_attn_head_pattern_dest_src_pos = _patterns((*_BY_HEAD, "dest_pos", "src_pos"), "one cell of one head's attention pattern")


def get_act_patch_block_every(
    model: Model, corrupted_tokens: Tokens, clean_cache: ActivationCache, patching_metric: Metric, **arguments: Any
) -> LabelledArray:
    """Residual stream, attention output and feed-forward output by position: [point, step, layer, pos]."""
    points = ("resid_pre", "attn_out", "mlp_out")
    return sweep(model, clean_cache, corrupted_tokens, one_by_one(patching_metric), points=points, axes=_BY_POSITION, **arguments)


def _every(axes: tuple[str, ...], what: str) -> Patch:
    def patch(
        model: Model, corrupted_tokens: Tokens, clean_cache: ActivationCache, patching_metric: Metric, **arguments: Any
    ) -> LabelledArray:
        c = model.config
        if c.n_heads != c.n_key_value_heads:
            raise ValueError(f"keys and values have {c.n_key_value_heads} heads, queries {c.n_heads}: sweep them apart")
        points, metric = ("z", "q", "k", "v"), one_by_one(patching_metric)
        found = sweep(model, clean_cache, corrupted_tokens, metric, points=points, axes=axes, **arguments)
        if "pattern" not in clean_cache:
            return found
        if arguments.get("save_to") is not None:
            arguments["save_to"] = Path(arguments["save_to"]).with_suffix(".pattern.npz")
        rest = {k: v for k, v in arguments.items() if k not in ("max_lanes", "max_bytes")}  # which never change a result
        whole = pattern_sweep(model, corrupted_tokens, clean_cache, metric, axes=axes, **rest)
        values, coords = np.concatenate([found.values, whole.values[None]]), {**found._coords, "point": [*points, "pattern"]}
        attrs = {**found.attrs, "point": [*points, "pattern"], "variants": found.attrs["variants"] + whole.attrs["variants"],
                 "forwards": found.attrs["forwards"] + whole.attrs["variants"]}  # fmt: skip
        return LabelledArray(values, found.dims, coords, name=found.name, attrs=attrs, plotter="plot_patching")

    patch.__doc__ = f"""Each head's output, queries, keys and values {what}: [point, {", ".join(axes)}].

    Where the clean cache holds `pattern`, patterns are the fifth point, as in TransformerLens (by position: of the attending one); each
    of their values takes a whole run. With grouped heads keys and values have fewer heads than queries: then sweep them apart."""
    return patch


get_act_patch_attn_head_all_pos_every = _every(_BY_HEAD, "at all positions")
get_act_patch_attn_head_by_pos_every = _every(_BY_BOTH, "at one position")

for _name, _function in list(globals().items()):
    if _name.startswith("get_act_patch_"):
        _function.__name__ = _function.__qualname__ = _name
