"""One forward with everything that may ride on it: captures, edits, Python hooks, a program of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.cache import ActivationCache
from ouro.capture import ATTENTION_BUFFER, Block, CapturePlan, StopAt
from ouro.edits import Edit, FwdHooks, Target, add_hooks, checked
from ouro.errors import ContextLengthError
from ouro.hooks import names_of
from ouro.loop import LoopProgram, Turn
from ouro.trace import Trace, exit_distribution

if TYPE_CHECKING:
    from ouro.live_capture import LiveCapture
    from ouro.model import Model

LOGITS = {"none": 0, "last": 1, "all": 2}
NEXT = 3


@dataclass(eq=False)
class Forward:
    """A forward being put together.

    `sequences` are checked ids. `span` is for a sequence that is a prompt and what was generated: tokens of the prompt, which the
    positions of edits count from, and most tokens in the end, which they may reach. `out` lends the arrays of an earlier capture of the
    same plan.
    """

    model: Model
    sequences: list[list[int]]
    n_steps: int
    logits: str = "last"
    max_lanes: int = 256
    capture: CapturePlan | None = None
    edits: Sequence[Edit] = ()
    hooks: FwdHooks = ()
    turns: list[Turn] | None = None
    span: tuple[int, int] | None = None
    out: ActivationCache | None = None
    arrays: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.edits = checked(self.edits)
        if self.logits not in LOGITS:
            raise ValueError(f"logits is {self.logits!r}, expected 'last', 'all' or 'none'")
        if self.max_lanes < 1:
            raise ValueError(f"max_lanes is {self.max_lanes}, expected 1 or more")
        if self.longest > self.model.config.n_ctx:
            raise ContextLengthError(f"{self.longest} tokens exceed the context of {self.model.config.n_ctx}")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(s) for s in self.sequences]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def follow(self, program: LoopProgram) -> None:
        """Run a program instead of the plain loop."""
        if not isinstance(program, LoopProgram):
            raise TypeError(f"program is {program!r}, expected an ouro.LoopProgram")
        self.turns = program.turns(self.n_steps, self.model.config.n_layers)
        self.edits = [*program.edits(self.n_steps), *self.edits]

    def stop(self, at: StopAt) -> None:
        """End behind layer `at[1]` of step `at[0]`."""
        if self.turns is not None:
            raise ValueError("stop_at and program contradict each other")
        every = range(self.model.config.n_layers)
        self.turns = [*((t, every, True) for t in range(at[0])), (at[0], range(at[1] + 1), False)]
        self.n_steps, self.logits = at[0] + 1, "none"

    def _lanes(self, attention: bool) -> int:
        """Positions of a pass; fewer where their scores and patterns would take much memory, all where Python hooks meet."""
        if self.hooks:
            return sum(self.lengths)
        if not attention:
            return self.max_lanes
        padded = -(-self.longest // 64) * 64
        return max(1, min(self.max_lanes, ATTENTION_BUFFER // (8 * self.model.config.n_heads * padded)))

    def _plan(self, live: LiveCapture | None = None) -> _core.Plan | None:
        if not (self.capture or self.edits or self.hooks or live):
            return None
        plan, names = _core.Plan(self.model._core), names_of(self.model.config, self.n_steps)
        target = Target(names, self.lengths, self.lengths) if self.span is None else Target(names, [self.span[0]], [self.span[1]])
        for edit in self.edits:
            edit.add_to(plan, target)
        add_hooks(plan, names, self.hooks)
        if live is not None:
            live.add_to(plan)
        if self.capture:
            blank = len(set(self.lengths)) > 1 or (self.capture.positions < 0).any() or self.turns is not None
            self.arrays = self.capture.allocate(blank=bool(blank), out=None if self.out is None else self.out.blocks)
            self.capture.add_to(plan, self.arrays)
        return plan

    @property
    def _attention(self) -> bool:
        return bool(self.edits) or (self.capture is not None and self.capture.looks_at_attention)

    def run(self) -> Trace:
        """Compute."""
        ids = [np.asarray(s, np.int32) for s in self.sequences]
        plan, lanes = self._plan(), self._lanes(self._attention)
        states, gate, z = self.model._core.trace(ids, self.n_steps, LOGITS[self.logits], lanes, plan, self.turns)
        return Trace(states, gate, z, np.array(self.lengths), self.sequences, self.model)

    def growing(self, live: LiveCapture | None = None) -> Callable[[list[int]], tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """A function of a sequence that goes on with the one it was called with before, the first time `sequences[0]`.

        It runs the positions that are new, under the same program, edits and hooks, and returns the gate's logits `[step]` of the last
        position and its logits `[d_vocab]` at the last step. Keys and values of every pass stay in between, so a sequence that grows by
        a token costs the passes of that token, and has the bits of a whole run.
        """
        assert self.span is not None and self.turns is not None
        plan, lanes, core = self._plan(live), self._lanes(self._attention), self.model._core
        kept = _core.Kept(core, self.span[1] - 1, len(self.turns))  # the last token is never run

        def run(ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            _, gate, z = core.trace([np.asarray(ids, np.int32)], self.n_steps, NEXT, lanes, plan, self.turns, kept)
            assert z is not None
            return gate[:, 0, -1], z[0, 0, 0]

        return run

    def cache(self, trace: Trace) -> ActivationCache:
        """What was captured."""
        plan = self.capture
        if plan is None:
            raise ValueError("nothing was captured")
        blocks = list(zip(plan.blocks, self.arrays, strict=True))
        for block, array in blocks:
            if block.point.core < 0:
                _derive(block, array, trace, plan)
        tokens = None
        if self.model.tokenizer is not None:
            tokens = [self.model.to_str_tokens(s) for s in self.sequences]
        return ActivationCache(blocks, self.model.config, self.n_steps, self.lengths, self.sequences, plan.positions, tokens)


def _derive(block: Block, array: NDArray[Any], trace: Trace, plan: CapturePlan) -> None:
    """What follows from the gate's logits at all steps."""
    lam, pdf, cdf = exit_distribution(trace.gate_logit)
    whole = {"gate_lambda": lam, "gate_pdf": pdf, "gate_cdf": cdf}[block.point.short][list(block.steps)]
    kept = np.take_along_axis(whole, np.maximum(plan.positions, 0)[None], axis=2)
    array[...] = plan.encode(np.where(plan.positions >= 0, kept, np.float32(np.nan)))
