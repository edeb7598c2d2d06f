"""One step of the loop as a function of the state it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro import _core
from ouro.engine import MAX_LANES
from ouro.hooks import point
from ouro.model import Model

SET = 2  # csrc/tap/plan.h OURO_TAP_SET


class StepMap:
    """`F`: the states of a whole sequence after a step, from those before it.

    All steps share their weights and positions, so that a step from any state is the first step with that state in the place of
    the embedding: from `trace.states[t]` it gives `trace.states[t + 1]`, bit for bit.

    Parameters
    ----------
    model, ids
        Whose loop, and the tokens (their number counts; their embeddings are replaced).

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import StepMap
    >>> model = ouro.load("ouro-tiny")
    >>> trace = model.trace("One day Ann took")
    >>> step = StepMap(model, trace.token_ids[0])
    >>> bool((step(trace.states[1, 0]) == trace.states[2, 0]).all())
    True
    """

    def __init__(self, model: Model, ids: Sequence[int]) -> None:
        self.model = model
        self.ids = np.asarray(ids, np.int32)

    def iterate(self, states: ArrayLike, n_steps: int) -> NDArray[np.float32]:
        """The states `[n_steps, pos, d_model]` after each of n_steps steps from `states [pos, d_model]`."""
        start = np.ascontiguousarray(states, np.float32)
        expected = (len(self.ids), self.model.config.d_model)
        if start.shape != expected:
            raise ValueError(f"states have shape {start.shape}, expected [pos, d_model] = {expected}")
        if n_steps == 0:
            return np.empty((0, *expected), np.float32)
        plan = _core.Plan(self.model._core)
        places = np.arange(len(self.ids), dtype=np.int32)[None]
        plan.edit(SET, point("embed").core, [0], [0], None, places, start[None, None, None, :, None, :], 1.0, 0)
        run: tuple[Any, ...] = self.model._core.trace([self.ids], n_steps, 0, MAX_LANES, plan)
        return np.asarray(run[0][:, 0], np.float32)

    def __call__(self, states: ArrayLike) -> NDArray[np.float32]:
        """`F(states)`, both `[pos, d_model]`."""
        return np.asarray(self.iterate(states, 1)[0], np.float32)
