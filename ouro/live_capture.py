"""What a generation sees as it runs: a capture whose rows its own lanes write.

Used where a second run could not repeat the first: under an approximate cache policy, or with Python hooks. Every lane of the
request writes into the arrays, so there must be none that is dropped later: speculation is off. A row that never ran, such as a
deeper step of a token that left early when the generation ended, is NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.arrays import empty
from ouro.cache import ActivationCache
from ouro.capture import Block, CapturePlan, core_view
from ouro.generation import Generation
from ouro.hooks import BY_SHORT, Filter
from ouro.trace import exit_distribution

if TYPE_CHECKING:
    from ouro.model import Model


class LiveCapture:
    """Arrays for one request of at most `room` positions; refused with the sizes when they do not fit."""

    def __init__(self, model: Model, names_filter: Filter | None, n_steps: int, room: int) -> None:
        self.model, self.n_steps, self.room = model, n_steps, room
        self.plan = CapturePlan(model.config, n_steps, [room], names_filter)
        self.plan.check()
        self.arrays = [empty(b.shape, np.float32) for b in self.plan.blocks]
        self.gate = np.empty((n_steps, 1, room), np.float32)  # of all steps, for what follows from it
        for a in (*self.arrays, self.gate):
            a.fill(np.nan)

    def add_to(self, plan: _core.Plan) -> None:
        """Tell the core where to write."""
        self.plan.add_to(plan, self.arrays)
        gate = BY_SHORT["gate_logit"]
        plan.capture(gate.core, tuple(range(self.n_steps)), (), self.plan.position_map, core_view(self.gate, gate))

    def cache(self, made: Generation) -> ActivationCache:
        """What was captured at the positions that belong to the result."""
        ids = made.prompt_token_ids + made.token_ids[:-1]
        derived = dict(zip(("gate_lambda", "gate_pdf", "gate_cdf"), exit_distribution(self.gate), strict=True))
        blocks: list[tuple[Block, NDArray[Any]]] = []
        for b, a in zip(self.plan.blocks, self.arrays, strict=True):
            if b.point.core < 0:
                a[...] = derived[b.point.short][list(b.steps)]
            of_positions = [slice(len(ids)) if dim in ("pos", "dest_pos", "src_pos") else slice(None) for dim in b.dims]
            part = a[tuple(of_positions)]
            blocks.append((replace(b, shape=part.shape), part))
        tokens = None if self.model.tokenizer is None else [self.model.to_str_tokens(ids)]
        return ActivationCache(blocks, self.model.config, self.n_steps, [len(ids)], [ids], np.arange(len(ids))[None], tokens)
