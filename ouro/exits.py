"""Exit rules: when a token is done before the last step. The rules run in C (csrc/engine/exit.c, one line of a table each);
these name them, and `NamedExit` names one that has no class here.

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

    Attributes
    ----------
    name, signal
        Of each class: its name in the core, and the number of a `Signal` that the threshold is compared with.
    """

    threshold: float
    min_steps: int = 0
    delay: int = 0
    name: ClassVar[str] = "never"
    signal: ClassVar[str] = ""

    @property
    def kind(self) -> str:
        """The name of the rule in csrc/engine/exit.c."""
        return self.name


class QExit(ExitRule):
    """`cdf_t >= threshold` (arXiv 2510.25741, Q-exit); a threshold of 1 means all steps."""

    name = "q"
    signal = "exit_cdf"


class StateDelta(ExitRule):
    """`||h_t - h_{t-1}|| < threshold`."""

    name = "state_delta"
    signal = "state_delta"


class StateRelative(ExitRule):
    """`||h_t - h_{t-1}|| / ||h_{t-1}|| < threshold`."""

    name = "state_relative"
    signal = "state_relative"


class Acceleration(ExitRule):
    """`||h_t - 2 h_{t-1} + h_{t-2}|| / ||h_t|| < threshold`."""

    name = "acceleration"
    signal = "acceleration"


class ReadoutKL(ExitRule):
    """`KL(p_{t-1} || p_t) < threshold` between successive readouts, nats."""

    name = "kl"
    signal = "kl"


@dataclass(frozen=True)
class TopAgreement(ExitRule):
    """The top token is the same as one step before; the threshold means nothing."""

    threshold: float = 0.0
    name: ClassVar[str] = "top1"


class ReadoutEntropy(ExitRule):
    """Entropy of the readout below threshold, nats."""

    name = "entropy"
    signal = "entropy"


class Confidence(ExitRule):
    """Largest probability of the readout above threshold."""

    name = "confidence"
    signal = "confidence"


@dataclass(frozen=True)
class CustomExit(ExitRule):
    """A Python function of the step's `Signal` that returns True to leave."""

    threshold: float = 0.0
    rule: Callable[[Signal], bool] | None = None
    name: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"CustomExit needs a callable rule, got {self.rule!r}")


@dataclass(frozen=True)
class NamedExit(ExitRule):
    """A rule of the core by its name in csrc/engine/exit.c.

    Examples
    --------
    >>> import ouro
    >>> from ouro.exits import NamedExit, ReadoutEntropy
    >>> trace = ouro.load("ouro-tiny").trace("One day Ann took")
    >>> (trace.exit_step(NamedExit(0.5, rule="entropy")) == trace.exit_step(ReadoutEntropy(0.5))).all()
    np.True_
    """

    rule: str = "never"

    @property
    def kind(self) -> str:
        """The name that was given."""
        return self.rule
