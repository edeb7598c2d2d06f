"""Path patching: the part of a head's effect that goes to given receivers without passing through other heads.

Wang et al. 2022, "Interpretability in the wild" (arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969). With a
loop there is one sender for each (step, layer, head), and a path may run through any number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ouro.cache import ActivationCache
from ouro.edits import Edit, Swap
from ouro.hooks import point
from ouro.labelled import LabelledArray
from ouro.patching.metric import Metric, measure_of, metric_name
from ouro.patching.store import ValueStore
from ouro.patching.sweep import places_of, sweep_key

if TYPE_CHECKING:
    from ouro.model import Model, Tokens


class Receiver(NamedTuple):
    """Where a path ends: an input of a layer, 0-based, e.g. `Receiver("q", step=3, layer=2, heads=[1])`."""

    point: str
    step: int
    layer: int
    heads: Sequence[int] | None = None


def _frozen(corrupted: ActivationCache, through_mlp: bool) -> list[Edit]:
    """Every head (and feed-forward) says what it said in the corrupted run."""
    return [Swap("z", corrupted)] if through_mlp else [Swap("z", corrupted), Swap("mlp_out", corrupted)]


def path_patching(
    model: Model,
    clean: Tokens,
    corrupted: Tokens,
    metric: Metric,
    *,
    receivers: Sequence[Receiver] | None = None,
    through_mlp: bool = True,
    n_steps: int | None = None,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    at: int | Sequence[int] = -1,
    save_to: str | Path | None = None,
    progress: bool = True,
) -> LabelledArray:
    """Replace what each head sends by what it sent in the clean run, along paths to the receivers only.

    For each sender: the corrupted run with the sender's output from the clean run and all other heads held at what they said
    gives the receivers' inputs; the corrupted run with these inputs gives the value. Without receivers the paths end in the last
    readout (the sender's direct effect), and the first of the two runs is enough.

    Parameters
    ----------
    model : Model
    clean, corrupted
        Text or token ids of the same length.
    metric
        As for `sweep`.
    receivers
        Where paths end; None: the last readout.
    through_mlp
        Let feed-forward layers react (they belong to the path, as in Wang et al.); False holds them too.
    n_steps
        Recurrent steps; the trained number unless given.
    steps, layers, heads
        Senders; all unless given.
    at
        Positions whose logits the metric sees.
    save_to
        A file that keeps the values as they come; path patching that was stopped goes on from it.
    progress
        Show a progress bar.

    Returns
    -------
    LabelledArray
        `[step, layer, head]` of the sender. `attrs`: `clean` and `corrupted`, the metric of the unchanged runs. A sender that no receiver
        lies behind has the corrupted value.
    """
    c, n_steps = model.config, model.config.n_steps if n_steps is None else n_steps
    tokens, good = model._one(corrupted), model._one(clean)
    if len(tokens) != len(good):
        raise ValueError(f"the clean prompt has {len(good)} tokens, the corrupted one {len(tokens)}: they must have the same length")
    measure, seen = measure_of(model, metric), places_of("position", len(tokens), [at] if isinstance(at, int) else at)
    ends = [_checked(r, model, n_steps) for r in receivers] if receivers is not None else None
    points = ["z"] if through_mlp else ["z", "mlp_out"]
    _, bad_cache = model.run_with_cache(tokens, points, n_steps=n_steps, logits="none")
    _, good_cache = model.run_with_cache(good, "z", n_steps=n_steps, logits="none")

    def value(x: list[int], edits: list[Edit]) -> float:
        logits = model.trace(x, n_steps=n_steps, logits="last", edits=edits).logits
        assert logits is not None
        return float(measure(logits[-1][:, seen])[0])

    coords = {"step": places_of("step", n_steps, steps), "layer": places_of("layer", c.n_layers, layers),
              "head": places_of("head", c.n_heads, heads)}  # fmt: skip
    baseline = value(tokens, [])
    todo = list(itertools.product(*coords.values()))
    where = None if ends is None else [list(r) for r in ends]
    key = sweep_key(model, tokens, good_cache.stack("z"), None, point="path", coords=coords, at=seen, metric=metric_name(metric),
                    corrupted=baseline, n_steps=n_steps, through_mlp=through_mlp, receivers=where)  # fmt: skip
    store = ValueStore(save_to, key, len(todo))

    def sender(step: int, layer: int, head: int) -> float:
        behind = None if ends is None else [r for r in ends if (r.step, r.layer) > (step, layer)]
        if behind == []:
            return baseline
        sent = [*_frozen(bad_cache, through_mlp), Swap("z", good_cache, steps=[step], layers=[layer], heads=[head])]
        return value(tokens, sent if behind is None else _received(model, tokens, n_steps, sent, behind))

    store.fill(todo, lambda place: sender(*place), desc="path patching", unit="sender", progress=progress)
    attrs = {"clean": value(good, []), "corrupted": baseline, "metric": metric_name(metric),
             "source": "Wang et al. 2022, arXiv 2211.00593"}  # fmt: skip
    values = store.values.reshape([len(x) for x in coords.values()])
    return LabelledArray(values, tuple(coords), coords, name="path_patched", attrs=attrs, plotter="plot_patching")


def _checked(r: Receiver, model: Model, n_steps: int) -> Receiver:
    if not isinstance(r, Receiver):
        raise TypeError(f"a receiver is Receiver(point, step, layer, heads), got {r!r}")
    p = point(r.point)
    if p.of != "layer" or p.square or p.core >= point("attn_scores").core:
        raise ValueError(f"{r.point!r} is no input of a layer; receivers are q, k, v, rot_q, rot_k, resid_pre, ln1_normalized")
    (step,), (layer,) = places_of("step", n_steps, [r.step]), places_of("layer", model.config.n_layers, [r.layer])
    return r._replace(point=p.short, step=step, layer=layer)


def _received(model: Model, tokens: list[int], n_steps: int, sent: list[Edit], ends: list[Receiver]) -> list[Edit]:
    """The receivers' inputs in the run where only the sender is changed, as edits."""
    names = [point(r.point).name(r.step, r.layer) for r in ends]
    _, cache = model.run_with_cache(tokens, names, n_steps=n_steps, logits="none", edits=sent)
    more: list[dict[str, Any]] = [{} if r.heads is None else {"heads": list(r.heads)} for r in ends]
    return [Swap(name, cache, **m) for name, m in zip(names, more, strict=True)]
