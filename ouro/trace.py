"""One forward with everything by step: states, the exit gate, readouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.exits import CustomExit, ExitRule, QExit

if TYPE_CHECKING:
    from ouro.model import Model

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def exit_distribution(gate_logit: Floats) -> tuple[Floats, Floats, Floats]:
    """lambda, pdf and cdf `[step, ...]` of leaving at each step, from the gate's logits `[step, ...]`; NaN where those are NaN.

    `lambda_t = sigmoid(g_t)`, `p_t = lambda_t prod_{j<t} (1 - lambda_j)`, the last step takes the rest and its cdf is 1 exactly
    (arXiv 2510.25741, section 3; the last lambda is never used). By the code that generation uses (csrc/engine/exit.c), so the
    bits are those of `Generation.exit_pdf`.
    """
    flat = gate_logit.reshape(len(gate_logit), -1)
    found = _core.exit_distribution(flat)
    found[:, np.isnan(flat)] = np.nan
    lam, pdf, cdf = found.reshape(3, *gate_logit.shape)
    return lam, pdf, cdf


@dataclass(frozen=True, eq=False)
class Trace:
    """What one forward saw. Arrays are float32; rows beyond a sequence's length are NaN.

    Attributes
    ----------
    states : array [step, batch, pos, d_model]
        Normed hidden state after each recurrent step: what the next step, the gate and the head read.
    gate_logit : array [step, batch, pos]
        Exit gate before the sigmoid.
    logits : array [step or 1, batch, pos, d_vocab] or None
        Readouts, of every step or of the last, as asked for.
    lengths : array [batch]
        Tokens of each sequence.
    token_ids : list of list of int
        The sequences.
    """

    states: Floats
    gate_logit: Floats
    logits: Floats | None
    lengths: Ints
    token_ids: list[list[int]]
    _model: Model = field(repr=False)

    @property
    def n_steps(self) -> int:
        """Recurrent steps that were run."""
        return int(self.states.shape[0])

    @cached_property
    def _exits(self) -> tuple[Floats, Floats, Floats]:
        return exit_distribution(self.gate_logit)

    @property
    def exit_lambda(self) -> Floats:
        """Probability `[step, batch, pos]` of leaving at a step, given that the token came this far."""
        return self._exits[0]

    @property
    def exit_pdf(self) -> Floats:
        """Probability `[step, batch, pos]` of leaving at each step; sums to 1 over steps."""
        return self._exits[1]

    @property
    def exit_cdf(self) -> Floats:
        """Cumulative `exit_pdf` `[step, batch, pos]`; 1 at the last step."""
        return self._exits[2]

    @cached_property
    def exit_entropy(self) -> Floats:
        """Entropy `[batch, pos]` of the exit distribution, nats."""
        p = self.exit_pdf
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, -p * np.log(p), np.where(np.isnan(p), np.nan, 0.0))
        return np.asarray(terms.sum(0), np.float32)

    @cached_property
    def expected_steps(self) -> Floats:
        """Mean number of steps `[batch, pos]` under the exit distribution, 1 to n_steps."""
        steps = np.arange(1, self.n_steps + 1, dtype=np.float32)
        return np.tensordot(steps, self.exit_pdf, axes=1).astype(np.float32)

    def exit_step(self, rule: ExitRule | float) -> Ints:
        """The step `[batch, pos]` (0-based) after which an exit rule would let each token go; -1 beyond a sequence.

        Parameters
        ----------
        rule
            A rule of `ouro.exits`, or a number: the q of Q-exit (the first step whose cdf reaches q; q = 1 means all steps,
            also where rounding makes the cdf reach 1 early). It is asked by the code that generation uses
            (csrc/engine/exit.c), so the answers are those of `Generation.exit_steps`.
        """
        if not isinstance(rule, ExitRule):
            if not 0 <= rule <= 1:
                raise ValueError(f"q is {rule}, expected 0 to 1")
            rule = QExit(rule)
        steps, d_model = self.states.shape[0], self.states.shape[-1]
        real = ~np.isnan(self.gate_logit[0])
        out = np.full(real.shape, -1, np.int64)
        states, gates = self.states[:, real].reshape(steps, -1, d_model), self.gate_logit[:, real].reshape(steps, -1)
        function = rule.rule if isinstance(rule, CustomExit) else None
        out[real] = self._model._core.exit_steps(states, gates, rule.kind, rule.threshold, rule.min_steps, rule.delay, function)
        return out

    # -- readouts ------------------------------------------------------------------------------------------------

    def _read(self, want_logits: bool, take: Callable[[tuple[NDArray[np.float32], ...]], NDArray[np.float32]]) -> Floats:
        """Reads every real state out, a slab of positions at a time, so that logits never fill the memory."""
        flat = self.states.reshape(-1, self.states.shape[-1])
        real = np.flatnonzero(~np.isnan(self.gate_logit.reshape(-1)))
        out: Floats | None = None
        for begin in range(0, len(real), 256):
            rows = real[begin : begin + 256]
            got = take(self._model._core.readout(flat[rows], want_logits))
            if out is None:
                out = np.full((len(flat), *got.shape[1:]), np.nan, np.float32)
            out[rows] = got
        assert out is not None  # a trace has at least one token
        return out.reshape(*self.states.shape[:3], *out.shape[1:])

    @cached_property
    def entropy(self) -> Floats:
        """Entropy `[step, batch, pos]` of each step's readout, nats; computed in C, the logits are not kept."""
        return self._read(False, lambda r: r[1])

    def top_tokens(self, k: int = 1) -> tuple[Ints, Floats]:
        """The k most likely tokens of every readout.

        Returns
        -------
        ids : array [step, batch, pos, k]
            Most likely first; -1 beyond a sequence.
        probabilities : array [step, batch, pos, k]
        """
        if not 1 <= k <= self._model.config.d_vocab:
            raise ValueError(f"k is {k}, expected 1 to {self._model.config.d_vocab}")

        def best(read: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
            logits, log_z = read[0], read[2]
            order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
            p = np.exp(np.take_along_axis(logits, order, 1) - log_z[:, None])
            return np.stack([order.astype(np.float32), p], axis=-1)  # ids are below 2^24: exact in float32

        both = self._read(True, best)
        return np.where(np.isnan(both[..., 0]), -1, both[..., 0]).astype(np.int64), both[..., 1]

    def weighted_logits(self) -> Floats:
        """`sum_t p_t z_t` `[batch, pos, d_vocab]`: logits averaged with the exit distribution (not probabilities)."""
        logits = self.logits
        if logits is None or logits.shape[0] != self.n_steps:
            logits = self._read(True, lambda r: r[0])
        mixed = np.zeros(logits.shape[1:], np.float32)
        for pdf, z in zip(self.exit_pdf, logits, strict=True):
            mixed = mixed + pdf[..., None] * z
        return mixed

    def __repr__(self) -> str:
        steps, batch, pos, d = self.states.shape
        kept = "none" if self.logits is None else str(self.logits.shape)
        return f"Trace(step={steps}, batch={batch}, pos={pos}, d_model={d}, logits={kept})"
