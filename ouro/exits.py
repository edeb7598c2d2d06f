"""Exit rules: when a token is done before the last step. The rules run in C (csrc/engine/exit.c); these name them.

Every rule is exact: a token that leaves early has its deeper keys and values computed all the same, in passes that later
tokens need anyway, so what follows is as if all steps had run first and the readout had been selected afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

Signal = Mapping[str, Any]
"""Numbers of one token after one step: step, n_steps, exit_lambda, exit_pdf, exit_cdf, state_delta, state_relative,
acceleration, kl, entropy, confidence, top_token, previous_top_token."""


@dataclass(frozen=True)
class ExitRule:
    """Leave after the first step at which the rule fires.

    Parameters
    ----------
    threshold
        What the rule compares with; see each rule.
    min_steps
        No exit before this many steps have run.
    delay
        Steps to run on after the rule fires.
    """

    threshold: float
    min_steps: int = 0
    delay: int = 0
    kind: ClassVar[int] = 0
    function: ClassVar[Callable[[Signal], bool] | None] = None


class QExit(ExitRule):
    """`cdf_t >= threshold` (arXiv 2510.25741, Q-exit); a threshold of 1 means all steps."""

    kind = 1


class StateDelta(ExitRule):
    """`||h_t - h_{t-1}|| < threshold`."""

    kind = 2


class StateRelative(ExitRule):
    """`||h_t - h_{t-1}|| / ||h_{t-1}|| < threshold`."""

    kind = 3


class Acceleration(ExitRule):
    """`||h_t - 2 h_{t-1} + h_{t-2}|| / ||h_t|| < threshold`."""

    kind = 4


class ReadoutKL(ExitRule):
    """`KL(p_{t-1} || p_t) < threshold` between successive readouts, nats."""

    kind = 5


@dataclass(frozen=True)
class TopAgreement(ExitRule):
    """The top token is the same as one step before; the threshold means nothing."""

    threshold: float = 0.0
    kind: ClassVar[int] = 6


class ReadoutEntropy(ExitRule):
    """Entropy of the readout below threshold, nats."""

    kind = 7


class Confidence(ExitRule):
    """Largest probability of the readout above threshold."""

    kind = 8


@dataclass(frozen=True)
class CustomExit(ExitRule):
    """A Python function of the step's `Signal` that returns True to leave."""

    threshold: float = 0.0
    rule: Callable[[Signal], bool] | None = None
    kind: ClassVar[int] = 9

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"CustomExit needs a callable rule, got {self.rule!r}")
