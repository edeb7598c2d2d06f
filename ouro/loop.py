"""Loop surgery: another order of steps and layers, steps that are skipped, attention that is frozen, states that are replaced.

All steps share their weights, so a step is told apart by its number only: captures, edits and hooks name it. A program keeps
these numbers. `repeat_step` runs one several times (it keeps its last values), `swap_steps` exchanges two in the order of
running: by itself that changes nothing but the names, until edits, hooks or a layer order make the two differ.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> program = ouro.LoopProgram().skip_step(1)
>>> a, b = model.trace("One day", program=program), model.trace("One day", n_steps=3)
>>> bool((a.states[3] == b.states[2]).all())      # one step fewer, by another name
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ouro import _core
from ouro.capture import Positions, core_view
from ouro.edits import SET, Edit, Noise, Target, finite
from ouro.hooks import point

Turn = tuple[int, Sequence[int], bool]  # step it counts as, layers in order, whether the step ends with it


@dataclass(frozen=True)
class Carry(Edit):
    """What a point had at an earlier step of the same run, in place of what it has now, at `steps`."""

    source: str
    source_step: int
    target: str
    passing: bool = False  # positions that a sequence does not have are passed over

    def add_to(self, plan: _core.Plan, target: Target) -> None:
        """Compile into a plan: a capture into memory of its own, and a `Set` that reads it later in the run."""
        c, a, b = target.names.config, point(self.source), point(self.target)
        layers = tuple(range(c.n_layers) if self.layers is None else self.layers) if a.of == "layer" else ()
        batch, longest = len(target.lengths), max(target.room)
        lead = (1, len(layers)) if a.of == "layer" else (1,)
        row = (c.n_heads, longest, longest) if a.square else (longest, c.d_model)
        rows = core_view(np.zeros((*lead, batch, *row), np.float32), a)
        everywhere = np.tile(np.arange(longest, dtype=np.int32), (batch, 1))
        chosen = target.positions(self.pos, passing=self.passing)
        back = everywhere if chosen is None else np.where(chosen >= 0, everywhere, np.int32(-1))
        plan.capture(a.core, (self.source_step,), layers, everywhere, rows)
        plan.edit(SET, b.core, tuple(self.steps or ()), layers, None, back, rows, 1.0, 0)


def _places(pos: Mapping[int, int] | Sequence[int]) -> dict[int, list[int]]:
    """Positions by number of steps."""
    if not isinstance(pos, (Mapping, Sequence, np.ndarray)) or isinstance(pos, str):
        raise TypeError(f"depth is {pos!r}, expected {{position: steps}} or one number of steps for each position")
    pairs = pos.items() if isinstance(pos, Mapping) else enumerate(pos)
    by_depth: dict[int, list[int]] = {}
    for p, k in pairs:
        if int(k) != k or int(p) != p:
            raise TypeError(f"position {p!r} has {k!r} steps, expected whole numbers")
        by_depth.setdefault(int(k), []).append(int(p))
    return by_depth


@dataclass(frozen=True)
class LoopProgram:
    """What a run does in which order; every method gives a new program with one change more.

    Used as `program=` of `trace`, `run_with_cache`, `run_with_hooks` and `generate`.
    """

    repeats: tuple[tuple[int, int], ...] = ()
    layer_orders: tuple[tuple[int, tuple[int, ...]], ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()

    def _with(self, kind: str, *what: Any) -> LoopProgram:
        return replace(self, changes=(*self.changes, (kind, what)))

    def skip_step(self, step: int, *, pos: Positions = None) -> LoopProgram:
        """The state of a step is the one it started from. Its keys and values exist, but no later step reads them."""
        return self._with("skip", step, pos)

    def repeat_step(self, step: int, times: int = 2) -> LoopProgram:
        """A step runs `times` times in a row, each with keys and values of its own."""
        if times < 1:
            raise ValueError(f"times is {times}, expected 1 or more")
        return replace(self, repeats=(*self.repeats, (step, times)))

    def swap_steps(self, a: int, b: int) -> LoopProgram:
        """Two steps run in each other's place, with their edits and layer orders."""
        return self._with("swap", a, b)

    def layers(self, step: int, order: Sequence[int]) -> LoopProgram:
        """A step runs these layers in this order; a layer may come several times or not at all. Captures keep its last run."""
        return replace(self, layer_orders=(*self.layer_orders, (step, tuple(order))))

    def freeze_attention(self, step: int, *, steps: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> LoopProgram:
        """Later steps (or those named) mix their values with the pattern that `step` had in the same layer and head."""
        return self._with("freeze", step, steps, layers)

    def replace_state(self, step_from: int, step_to: int, *, pos: Positions = None) -> LoopProgram:
        """Step `step_to` starts from the state of an earlier step instead of the one before it."""
        return self._with("replace", step_from, step_to, pos)

    def noise(self, step: int, std: float, *, seed: int = 0, pos: Positions = None) -> LoopProgram:
        """Normal noise on what a step starts from."""
        if finite(std, "std of noise") < 0:
            raise ValueError(f"std of noise is {std}, expected 0 or more")
        return self._with("noise", step, std, seed, pos)

    def steps_per_position(self, depth: Mapping[int, int] | Sequence[int]) -> LoopProgram:
        """Positions that stop early: `{pos: number of steps}` or one number for each position.

        After its last step a position keeps its state: readouts of deeper steps are those of its last one, and the keys and
        values of deeper steps are made from the kept state. Positions that a sequence does not have are passed over.
        """
        return self._with("depth", _places(depth))

    @property
    def reorders(self) -> bool:
        """Whether it has other passes than the plain loop; else it consists of edits."""
        return bool(self.repeats or self.layer_orders or any(kind == "swap" for kind, _ in self.changes))

    def turns(self, n_steps: int, n_layers: int) -> list[Turn]:
        """The passes of a run."""
        order = list(range(n_steps))
        for kind, what in self.changes:
            if kind == "swap":
                i, j = (order.index(_step(t, n_steps)) for t in what)
                order[i], order[j] = order[j], order[i]
        times = {_step(t, n_steps): n for t, n in self.repeats}
        orders = {_step(t, n_steps): run for t, run in self.layer_orders}
        out: list[Turn] = []
        for t in order:
            run = orders.get(t, tuple(range(n_layers)))
            for layer in run:
                if not 0 <= layer < n_layers:
                    raise IndexError(f"layer of step {t} is {layer}, expected 0 to {n_layers - 1}")
            parts = [run[i : i + n_layers] for i in range(0, len(run), n_layers)] or [()]
            one: list[Turn] = [(t, part, i == len(parts) - 1) for i, part in enumerate(parts)]
            out += one * times.get(t, 1)
        return out

    def edits(self, n_steps: int) -> list[Edit]:
        """The changes that are edits."""
        out: list[Edit] = []
        for kind, what in self.changes:
            if kind == "skip":
                t = _step(what[0], n_steps)
                out.append(Carry("step_resid_pre", t, "state", steps=[t], pos=what[1]))
            elif kind == "freeze":
                t = _step(what[0], n_steps)
                later = [_later(u, t, n_steps) for u in (range(t + 1, n_steps) if what[1] is None else what[1])]
                out.append(Carry("pattern", t, "pattern", steps=later, layers=what[2]))
            elif kind == "replace":
                a, b = _step(what[0], n_steps), _step(what[1], n_steps)
                out.append(Carry("state", a, "step_resid_pre", steps=[_later(b, a, n_steps)], pos=what[2]))
            elif kind == "noise":
                out.append(Noise("step_resid_pre", what[1], what[2], steps=[_step(what[0], n_steps)], pos=what[3]))
            elif kind == "depth":
                for k, places in what[0].items():
                    if not 1 <= k <= n_steps:
                        raise ValueError(f"a position has {k} steps, expected 1 to {n_steps}")
                    if k < n_steps:
                        out.append(Carry("state", k - 1, "state", steps=list(range(k, n_steps)), pos=places, passing=True))
        return out


def _step(t: int, n_steps: int) -> int:
    if not -n_steps <= t < n_steps:
        raise IndexError(f"step is {t}, expected {-n_steps} to {n_steps - 1}")
    return t % n_steps


def _later(t: int, than: int, n_steps: int) -> int:
    if _step(t, n_steps) <= than:
        raise ValueError(f"step {t} does not come after step {than}: take it from the cache of another run with ouro.edits.Swap")
    return _step(t, n_steps)
