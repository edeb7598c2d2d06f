"""`ForkSet`: one run, and variants of it that start where they first differ and share passes (csrc/engine/forks.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro import _core
from ouro.edits import finite
from ouro.engine import MAX_LANES
from ouro.hooks import Point, point

if TYPE_CHECKING:
    from ouro.model import Model

Floats = NDArray[np.float32]
SHARE_OF_MEMORY = 4  # forks that run at once may use a quarter of what is free, unless told otherwise


class Fork(NamedTuple):
    """What one variant replaces: half-open ranges, 0-based; head -1 is all of them."""

    step0: int
    step1: int
    layer0: int
    layer1: int
    pos0: int
    pos1: int
    head: int = -1


def layer_point(short: str) -> Point:
    """A point that a variant may replace: one of a layer, with rows of a width that does not depend on the position."""
    p = point(short)
    if p.of != "layer" or p.square:
        raise ValueError(f"{short!r} is {'square' if p.square else f'a point of a {p.of}'}; a sweep replaces points of a layer such as "
                         "resid_pre, attn_out, mlp_out, z, q, k, v")  # fmt: skip
    return p


class ForkSet:
    """One run of a sequence, and variants of it.

    Parameters
    ----------
    model : Model
    token_ids : sequence of int
    n_steps : int, optional
        Recurrent steps; the trained number unless given.
    embeddings : array [pos, d_model], optional
        In place of the tokens' embeddings, e.g. with noise added.
    max_lanes : int
        Rows that share a pass; never changes a result.

    Attributes
    ----------
    lane_layers : int
        Lanes times layers run so far, the base included: the work that was done. A whole forward of the sequence is
        `n * n_layers * n_steps`.

    Raises
    ------
    MemoryLimitError
        When the base's keys, values and layer inputs do not fit; the message has the numbers.
    """

    def __init__(
        self,
        model: Model,
        token_ids: list[int],
        *,
        n_steps: int | None = None,
        embeddings: ArrayLike | None = None,
        max_lanes: int = MAX_LANES,
    ) -> None:
        self.model = model
        self.token_ids = list(token_ids)
        self.n_steps = model.config.n_steps if n_steps is None else n_steps
        self.max_lanes = max_lanes
        given = None if embeddings is None else finite(embeddings, "embeddings")
        self._core = _core.Forks(model._core, np.asarray(self.token_ids, np.int32), self.n_steps, given, max_lanes)
        self.lane_layers = self.forward_lane_layers

    @property
    def forward_lane_layers(self) -> int:
        """Lanes times layers of one whole forward."""
        return len(self.token_ids) * self.model.config.n_layers * self.n_steps

    def states(self) -> Floats:
        """States of the base run, `[step, pos, d_model]`."""
        return self._core.states()

    def run(self, short: str, forks: list[Fork], source: Floats, at: list[int], *, max_bytes: int | None = None) -> Floats:
        """The last states of variants.

        Parameters
        ----------
        short
            Short name of a point of a layer, e.g. "resid_pre", "attn_out", "z".
        forks
            What each variant replaces.
        source : array [step, layer, pos, d] or [step, layer, pos, head, d]
            What it is replaced with.
        at
            Positions to return.
        max_bytes
            Keys and values of variants that run at once; a quarter of what is free unless given.

        Returns
        -------
        array [fork, at, d_model]
            Normed states after the last step: what `Model.readout` turns into logits.
        """
        p = layer_point(short)
        scalar = not p.dims
        if source.ndim != 5 - (not p.by_head) - scalar:
            raise ValueError(f"source has shape {source.shape}, expected [{', '.join(('step', 'layer', 'pos', *p.dims))}] for {short!r}")
        rows = source if p.by_head else source[..., None, None] if scalar else source[..., None, :]
        most = _core.available_memory() // SHARE_OF_MEMORY if max_bytes is None else max_bytes
        numbers = np.array([(p.core, *fork) for fork in forks], np.int32).reshape(-1, 8)
        states, lane_layers = self._core.run(numbers, np.ascontiguousarray(rows), np.asarray(at, np.int32), self.max_lanes, most)
        self.lane_layers += lane_layers
        return states

    def logits(self, states: Floats) -> Floats:
        """Readouts `[..., d_vocab]` of states `[..., d_model]`."""
        flat = self.model._core.readout(np.ascontiguousarray(states.reshape(-1, states.shape[-1])), True)[0]
        return np.asarray(flat).reshape(*states.shape[:-1], -1)
