"""Hook points: the names of everything that a step of a loop computes, and how a filter picks among them.

Names are those of TransformerLens with the loop in front: `steps.{t}.blocks.{l}.attn.hook_pattern`, both numbers 0-based.
Whoever selects may write

* a full name: `"steps.1.blocks.3.hook_resid_post"`
* a name without a step, for all steps: `"blocks.3.hook_resid_post"`
* the short name of a point, for all steps and layers: `"resid_post"`, `"pattern"`, `"state"`, `"logits"`
* a short name with a layer and perhaps a step: `("resid_post", 3)`, `("resid_post", 3, 1)`
* a pattern with `*`, `?` or `[...]`: `"steps.*.blocks.12.*"`, `"blocks.*.attn.*"`, `"gate_*"`
* a function of a full name: `lambda name: name.endswith("hook_z")`
* a list of any of these.

`hook_normalized` is what comes out of a norm with its weight (nothing is folded here), `hook_scale` the number it was divided
by; `hook_attn_out` and `hook_mlp_out` are what is added to the residual, behind the second norm of the sandwich.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any

from ouro.config import ModelConfig

Filter = str | tuple[str, int] | tuple[str, int, int] | Callable[[str], bool] | Iterable["Filter"]


@dataclass(frozen=True)
class Point:
    """One kind of hook point.

    Attributes
    ----------
    short : str
        Its name in `cache["resid_post", 5]`.
    path : str
        The end of its full name.
    of : "run", "step" or "layer"
        What there is one of each.
    dims : tuple of str
        Axes behind (step, layer, batch, pos), in the order of a captured array. Scores and patterns are
        (head, dest_pos, src_pos), with dest_pos in the place of pos.
    core : int
        Its number in the core (csrc/model/observe.h); -1 for what is derived from the gate's logits.
    about : str
    """

    short: str
    path: str
    of: str
    dims: tuple[str, ...]
    core: int
    about: str

    @property
    def square(self) -> bool:
        """Whether it has a row for each position that attends and a column for each that is attended."""
        return "src_pos" in self.dims

    @property
    def by_head(self) -> bool:
        """Whether it has an axis of heads."""
        return "head" in self.dims or "kv_head" in self.dims

    def heads(self, c: ModelConfig) -> int:
        """Size of its axis of heads; 1 without one."""
        return c.n_heads if "head" in self.dims else c.n_key_value_heads if "kv_head" in self.dims else 1

    def columns(self, c: ModelConfig, longest: int) -> int:
        """Numbers in one row."""
        size = {"d_model": c.d_model, "d_head": c.d_head, "d_mlp": c.d_mlp, "d_vocab": c.d_vocab, "src_pos": longest}
        return size[self.dims[-1]] if self.dims else 1

    def name(self, step: int, layer: int) -> str:
        """Its full name at a step and a layer."""
        if self.of == "run":
            return self.path
        return f"steps.{step}.{self.path}" if self.of == "step" else f"steps.{step}.blocks.{layer}.{self.path}"


_D, _HD, _KV = ("d_model",), ("head", "d_head"), ("kv_head", "d_head")
_SQUARE, _F = ("head", "dest_pos", "src_pos"), ("d_mlp",)
_TABLE: tuple[tuple[str, str, str, tuple[str, ...], str], ...] = (
    ("embed", "hook_embed", "run", _D, "the embedding, once"),
    ("step_resid_pre", "hook_resid_pre", "step", _D, "what the step starts from: the embedding, or the state before"),
    ("resid_pre", "hook_resid_pre", "layer", _D, "residual stream before the layer"),
    ("ln1_scale", "ln1.hook_scale", "layer", (), "sqrt(mean(x^2) + eps) of the norm before attention"),
    ("ln1_normalized", "ln1.hook_normalized", "layer", _D, "what attention reads"),
    ("q", "attn.hook_q", "layer", _HD, "queries before the rotation"),
    ("k", "attn.hook_k", "layer", _KV, "keys before the rotation"),
    ("v", "attn.hook_v", "layer", _KV, "values"),
    ("rot_q", "attn.hook_rot_q", "layer", _HD, "queries after the rotation"),
    ("rot_k", "attn.hook_rot_k", "layer", _KV, "keys after the rotation"),
    ("attn_scores", "attn.hook_attn_scores", "layer", _SQUARE, "q k / sqrt(d_head), -inf ahead of the position"),
    ("pattern", "attn.hook_pattern", "layer", _SQUARE, "softmax of the scores, 0 ahead of the position"),
    ("z", "attn.hook_z", "layer", _HD, "values mixed by the pattern"),
    ("result", "attn.hook_result", "layer", ("head", "d_model"), "each head's share of the output projection, before its norm"),
    ("ln1_post_scale", "ln1_post.hook_scale", "layer", (), "of the norm behind attention"),
    ("ln1_post_normalized", "ln1_post.hook_normalized", "layer", _D, "its output"),
    ("attn_out", "hook_attn_out", "layer", _D, "what attention adds to the residual"),
    ("resid_mid", "hook_resid_mid", "layer", _D, "residual stream between attention and feed-forward"),
    ("ln2_scale", "ln2.hook_scale", "layer", (), "of the norm before the feed-forward"),
    ("ln2_normalized", "ln2.hook_normalized", "layer", _D, "what the feed-forward reads"),
    ("pre", "mlp.hook_pre", "layer", _F, "gate before the nonlinearity"),
    ("pre_linear", "mlp.hook_pre_linear", "layer", _F, "up"),
    ("post", "mlp.hook_post", "layer", _F, "silu(pre) pre_linear"),
    ("ln2_post_scale", "ln2_post.hook_scale", "layer", (), "of the norm behind the feed-forward"),
    ("ln2_post_normalized", "ln2_post.hook_normalized", "layer", _D, "its output"),
    ("mlp_out", "hook_mlp_out", "layer", _D, "what the feed-forward adds to the residual"),
    ("resid_post", "hook_resid_post", "layer", _D, "residual stream behind the layer"),
    ("step_resid_post", "hook_resid_post", "step", _D, "residual stream behind the last layer, before the shared norm"),
    ("ln_final_scale", "ln_final.hook_scale", "step", (), "of the shared norm"),
    ("state", "ln_final.hook_normalized", "step", _D, "the state of the step: what the next step, the gate and the head read"),
    ("gate_logit", "exit_gate.hook_logit", "step", (), "exit gate before the sigmoid"),
    ("logits", "unembed.hook_out", "step", ("d_vocab",), "readout of the step"),
)
POINTS: tuple[Point, ...] = (
    *(Point(short, path, of, dims, i, about) for i, (short, path, of, dims, about) in enumerate(_TABLE)),
    Point("gate_lambda", "exit_gate.hook_lambda", "step", (), -1, "probability of leaving, given that the token came this far"),
    Point("gate_pdf", "exit_gate.hook_pdf", "step", (), -1, "probability of leaving at the step"),
    Point("gate_cdf", "exit_gate.hook_cdf", "step", (), -1, "probability of having left"),
)
BY_SHORT = {p.short: p for p in POINTS}
ALIASES = {"ln_final_normalized": "state", "unembed": "logits", "mlp_pre": "pre", "mlp_pre_linear": "pre_linear", "mlp_post": "post",
           "scores": "attn_scores", "exit_lambda": "gate_lambda", "exit_pdf": "gate_pdf", "exit_cdf": "gate_cdf"}  # fmt: skip
Place = tuple[int, int]  # (step, layer); layer -1 for points of a step, both -1 for the embedding


def point(short: str) -> Point:
    """A point by its short name.

    >>> point("pattern").dims
    ('head', 'dest_pos', 'src_pos')
    """
    found = BY_SHORT.get(ALIASES.get(short, short))
    if found is None:
        raise KeyError(unknown(short, [*BY_SHORT, *ALIASES]))
    return found


def unknown(name: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest that do."""
    text = str(name)
    pool = list(known)
    near = difflib.get_close_matches(text, pool, 3, 0.5)
    near += [n for n in difflib.get_close_matches(text.rpartition(".")[2].removeprefix("hook_"), pool, 2, 0.5) if n not in near]
    return f"no hook point is called {text!r}" + (f"; near: {', '.join(near)}" if near else "")


@dataclass(frozen=True)
class HookNames:
    """All hook points of a model that runs `n_steps` steps.

    >>> import ouro
    >>> names = HookNames(ouro.load("ouro-tiny").config, 4)
    >>> len(names), next(iter(names))
    (437, 'hook_embed')
    >>> names.select("blocks.3.hook_z")
    Traceback (most recent call last):
    ...
    KeyError: "no hook point is called 'blocks.3.hook_z'; near: blocks.3.attn.hook_z, blocks.3.attn.hook_v, blocks.3.attn.hook_q, z"
    """

    config: ModelConfig
    n_steps: int

    def places(self, p: Point) -> list[Place]:
        """Where a point exists."""
        if p.of == "run":
            return [(-1, -1)]
        layers = range(self.config.n_layers) if p.of == "layer" else (-1,)
        return [(t, layer) for t in range(self.n_steps) for layer in layers]

    @cached_property
    def by_name(self) -> dict[str, tuple[Point, Place]]:
        """Full name to (point, (step, layer))."""
        return {p.name(*at): (p, at) for p in POINTS for at in self.places(p)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @cached_property
    def _without_step(self) -> dict[str, list[tuple[Point, Place]]]:
        short: dict[str, list[tuple[Point, Place]]] = {}
        for name, found in self.by_name.items():
            short.setdefault(name.split(".", 2)[2] if name.startswith("steps.") else name, []).append(found)
        return short

    def _tuple(self, item: tuple[object, ...]) -> list[tuple[Point, Place]]:
        p = point(str(item[0]))
        numbers: list[int | None] = [None, None]
        for i, (value, size, what) in enumerate(zip(item[1:], (self.config.n_layers, self.n_steps), ("layer", "step"), strict=False)):
            if not isinstance(value, int) or not -size <= value < size:
                raise IndexError(f"{what} of {item!r} is {value!r}, expected {-size} to {size - 1}")
            numbers[i] = value % size
        return [(p, at) for at in self.places(p) if numbers[0] in (None, at[1]) and numbers[1] in (None, at[0])]

    def _one(self, item: Any) -> list[tuple[Point, Place]]:
        if callable(item):
            return [found for name, found in self.by_name.items() if item(name)]
        if isinstance(item, tuple) and item and isinstance(item[0], str) and all(isinstance(i, int) for i in item[1:]):
            return self._tuple(item)
        if not isinstance(item, str):
            if not isinstance(item, Iterable):
                raise TypeError(f"a filter is a name, a pattern, a function of a name, or a list of these, got {item!r}")
            return [found for part in item for found in self._one(part)]
        if item in self.by_name:
            return [self.by_name[item]]
        if ALIASES.get(item, item) in BY_SHORT:
            p = point(item)
            return [(p, at) for at in self.places(p)]
        if item in self._without_step:
            return self._without_step[item]
        if any(c in item for c in "*?["):
            hit = [found for name, found in self.by_name.items() if fnmatchcase(name, item)]
            hit = hit or [found for name, all_steps in self._without_step.items() if fnmatchcase(name, item) for found in all_steps]
            hit = hit or [(p, at) for p in POINTS if fnmatchcase(p.short, item) for at in self.places(p)]
            if hit:
                return hit
        raise KeyError(unknown(item, [*BY_SHORT, *self._without_step] + (list(self.by_name) if item.startswith("steps.") else [])))

    def select(self, names_filter: Filter | None, steps: Iterable[int] | None = None) -> dict[Point, set[Place]]:
        """What a filter picks: for each point the (step, layer) places, in the order in which a step passes the points.

        Parameters
        ----------
        names_filter
            See the top of this module; None is everything but `attn.hook_result`, which must be named.
        steps
            Keep these only (negative counts from the last).

        Raises
        ------
        KeyError
            For a name that does not exist, with the nearest that do.
        IndexError
            For a step or layer out of range.
        """
        picked = self._one(names_filter if names_filter is not None else lambda name: not name.endswith("hook_result"))
        keep = None
        if steps is not None:
            if not isinstance(steps, Iterable) or isinstance(steps, str):
                raise TypeError(f"steps is {steps!r}, expected a list such as [0, -1]")
            keep = {self._step(t) for t in steps} | {-1}
        found: dict[Point, set[Place]] = {}
        for p, at in picked:
            if keep is None or at[0] in keep:
                found.setdefault(p, set()).add(at)
        return {p: found[p] for p in POINTS if p in found}

    def _step(self, t: int) -> int:
        if not -self.n_steps <= t < self.n_steps:
            raise IndexError(f"step is {t}, expected {-self.n_steps} to {self.n_steps - 1}")
        return t % self.n_steps


@lru_cache(maxsize=32)
def names_of(config: ModelConfig, n_steps: int) -> HookNames:
    """`HookNames`, made once for each model and depth: its tables are long."""
    return HookNames(config, n_steps)


def rectangles(places: set[Place]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Places as few (steps, layers) products: one for each set of steps that some layers share."""
    steps_of: dict[int, list[int]] = {}
    for step, layer in sorted(places):
        steps_of.setdefault(layer, []).append(step)
    layers_of: dict[tuple[int, ...], list[int]] = {}
    for layer, steps in steps_of.items():
        layers_of.setdefault(tuple(steps), []).append(layer)
    return [(steps, tuple(layers)) for steps, layers in layers_of.items()]
