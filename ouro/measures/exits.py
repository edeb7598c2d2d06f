"""Where tokens leave, and what leaving there costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.exits import (
    Acceleration,
    Confidence,
    CustomExit,
    ExitRule,
    QExit,
    ReadoutEntropy,
    ReadoutKL,
    StateDelta,
    StateRelative,
    TopAgreement,
)
from ouro.labelled import LabelledSet
from ouro.measures.depth import token_loss
from ouro.measures.drift import divergence, state_changes
from ouro.measures.source import as_trace, by_slab, labelled, next_tokens, real, token_coords, token_strings
from ouro.model import Batch, Model
from ouro.trace import Trace

QS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
RULES: tuple[type[ExitRule], ...] = (StateDelta, StateRelative, Acceleration, ReadoutKL, ReadoutEntropy, Confidence)
"""Rules whose threshold is in the units of their signal."""


# -- which kind of token ---------------------------------------------------------------------------------------------


def token_class(text: str) -> str:
    """special (`<|...|>`), number, mark, word (begins with a space or a capital), or rest (a later piece of a word).

    >>> from ouro.measures import token_class
    >>> [token_class(t) for t in ("<|im_end|>", " 12", ".", " took", "Ann", "ing")]
    ['special', 'number', 'mark', 'word', 'word', 'rest']
    """
    if not text:
        return ""
    if text.startswith("<|") and text.endswith("|>"):
        return "special"
    bare = text.strip()
    if not any(c.isalnum() for c in bare):
        return "mark"
    if any(c.isdigit() for c in bare):
        return "number"
    return "word" if text[0].isspace() or bare[0].isupper() else "rest"


def exit_report(
    source: Model | Trace,
    x: Batch | None = None,
    *,
    q: Sequence[float] = QS,
    classes: Callable[[str], str] = token_class,
    n_steps: int | None = None,
) -> LabelledSet:
    """Where the gate would let each token leave.

    | array | axes | formula |
    |---|---|---|
    | pdf | step, batch, pos | `p_t = lambda_t prod_{j<t} (1 - lambda_j)`, the last step takes the rest |
    | cdf | step, batch, pos | `sum_{j<=t} p_j` |
    | expected_steps | batch, pos | `sum_t (t + 1) p_t` |
    | entropy | batch, pos | of the exit distribution, nats |
    | exit_step | q, batch, pos | Q-exit, had the threshold been q: `min{t : cdf_t >= q}` (q = 1: the last) |

    Coordinates: `token`, and its class in `token_class`: `report["pdf"].group_mean("token_class")` is the table by class.

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`.
    q
        Thresholds to try.
    classes
        From a token's text to the name of its class ("" is counted nowhere); `token_class` unless given.

    Raises
    ------
    TypeError, ValueError
        As `loop_drift`; also for a q outside 0 to 1.

    Source
    ------
    Exit gate and Q-exit: arXiv 2510.25741, section 3.

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import exit_report
    >>> report = exit_report(ouro.load("ouro-tiny"), "Ann is the boss of Bob.", q=[0.3, 0.9])
    >>> report["exit_step"].mean("batch", "pos").dims, report["pdf"].group_mean("token_class").coords["token_class"].tolist()
    (('q',), ['mark', 'rest', 'word'])
    """
    trace = as_trace(source, x, n_steps=n_steps)
    here = real(trace)
    kinds = np.vectorize(classes, otypes=[object])(token_strings(trace)).astype(str)
    coords = token_coords(trace) | {"token_class": (("batch", "pos"), kinds), "q": np.asarray(q, float)}
    each, token = ("step", "batch", "pos"), ("batch", "pos")
    steps = np.stack([np.where(here, trace.exit_step(value), np.nan) for value in q])
    return LabelledSet(
        {
            "pdf": labelled(trace.exit_pdf, each, coords, formula="lambda_t prod_{j<t} (1 - lambda_j)", plotter="plot_exit_pdf"),
            "cdf": labelled(trace.exit_cdf, each, coords, formula="sum_{j<=t} p_j", plotter="plot_by_step"),
            "expected_steps": labelled(trace.expected_steps, token, coords, units="steps", formula="sum_t (t + 1) p_t"),
            "entropy": labelled(trace.exit_entropy, token, coords, units="nats", formula="-sum_t p_t log p_t"),
            "exit_step": labelled(steps, ("q", *token), coords, units="step", formula="min{t : cdf_t >= q}"),
        },
        title="where tokens leave",
        plotter="plot_exit_pdf",
    )


# -- rules, after the fact -------------------------------------------------------------------------------------------


def exit_signals(trace: Trace) -> dict[str, NDArray[np.float64]]:
    """What the rules of `ouro.exits` look at, `[step, batch, pos]`: names as in `ouro.exits.Signal`.

    exit_cdf, state_delta, state_relative, acceleration, kl, entropy, confidence, top_token, and for the costs loss and right.
    """
    flat = next_tokens(trace).reshape(-1)

    def take(log_p: NDArray[np.float64], at: NDArray[np.intp]) -> dict[str, NDArray[np.float64]]:
        kl = np.full(log_p.shape[:2], np.nan)
        kl[1:] = divergence(log_p[:-1], log_p[1:])
        loss, right = token_loss(log_p, flat[at])
        return {"kl": kl, "entropy": -(np.exp(log_p) * log_p).sum(-1), "confidence": np.exp(log_p.max(-1)),
                "top_token": log_p.argmax(-1).astype(np.float64), "loss": loss, "right": right}  # fmt: skip

    changes = state_changes(trace.states)
    return by_slab(trace, take) | {
        "exit_cdf": trace.exit_cdf.astype(np.float64),
        "state_delta": changes["l2"],
        "state_relative": changes["relative_l2"],
        "acceleration": changes["acceleration"],
    }


def exit_steps(rule: ExitRule, signals: dict[str, NDArray[np.float64]]) -> NDArray[np.int64]:
    """The step after which each token would leave under a rule, from signals that were measured once.

    For one rule ask `Trace.exit_step(rule)`, which measures first; this is for many thresholds. Both ask csrc/engine/exit.c.

    Parameters
    ----------
    rule
        Of `ouro.exits`; `min_steps` and `delay` count. `CustomExit` is not taken.
    signals
        As `exit_signals` gives them, arrays `[step, ...]`; one that is missing is NaN, and rules do not fire on it.

    Returns
    -------
    int array [...]
        0-based; meaningless where the signals are NaN.
    """
    if not isinstance(rule, ExitRule) or isinstance(rule, CustomExit):
        raise TypeError(f"expected one of the rules of ouro.exits that need no Python, got {rule!r}")
    arrays = {name: np.nan_to_num(x, nan=-1) if name == "top_token" else x for name, x in signals.items()}
    shape = next(iter(signals.values())).shape
    flat = {name: x.reshape(len(x), -1) for name, x in arrays.items()}
    found = _core.exit_steps(flat, rule.kind, rule.threshold, rule.min_steps, rule.delay)
    return np.asarray(found.reshape(shape[1:]), np.int64)


def _grid(trace: Trace, s: dict[str, NDArray[np.float64]], settings: int) -> dict[str, list[Any]]:
    """Rules to try: thresholds at quantiles of what the signal really is, so that every depth is reached."""
    part = np.linspace(0, 1, settings)

    def spread(name: str) -> NDArray[np.float64]:
        values = s[name][:-1][np.isfinite(s[name][:-1])]
        return np.quantile(values, part) if values.size else np.array([])

    rules: dict[str, list[Any]] = {"fixed": list(range(trace.n_steps))}
    rules["QExit"] = [QExit(float(min(max(v, 0.0), 1.0))) for v in np.append(spread("exit_cdf")[:-1], 1.0)]
    for kind in RULES:
        rules[kind.__name__] = [kind(float(v)) for v in spread(kind.signal)]
    rules["TopAgreement"] = [TopAgreement()]
    return {name: found for name, found in rules.items() if found}


def exit_pareto(
    source: Model | Trace,
    x: Batch | None = None,
    *,
    rules: dict[str, Sequence[Any]] | None = None,
    settings: int = 17,
    n_steps: int | None = None,
) -> LabelledSet:
    """Loss and accuracy against mean steps, for each exit rule, from one full pass.

    Every token has gone through all steps; for a rule and threshold, its exit step is looked up afterwards and its loss is that
    step's: exact, since keys and values of deeper steps exist whatever leaves (the reference meaning of Q-exit).

    Arrays `[rule, setting]`, NaN where a rule has fewer settings: `threshold`; `mean_steps` (1 to n_steps), `loss` (nats) and
    `accuracy`, means over the tokens that have a successor. The rule `fixed` leaves every token after step `threshold`.

    Parameters
    ----------
    source, x, n_steps
        As for `loop_drift`.
    rules
        `{name: [rule of ouro.exits or a fixed step, ...]}`; unless given all rules, with `settings` thresholds each at quantiles
        of what their signals are on this text.
    settings
        Thresholds to try for each rule.

    Raises
    ------
    TypeError
        As `loop_drift`.
    ValueError
        Where no sequence has a second token, for a fixed step that is not run; else as `loop_drift`.

    Source
    ------
    Accuracy against average exit round: arXiv 2510.25741, section on early exit (comparison of strategies).

    Examples
    --------
    >>> import ouro
    >>> from ouro.measures import exit_pareto
    >>> found = exit_pareto(ouro.load("ouro-tiny"), ["One day Ann took the cup.", "Ann is the boss of Bob."])
    >>> found["mean_steps"].sel(rule="fixed").values[:4]
    array([1., 2., 3., 4.])
    """
    trace = as_trace(source, x, n_steps=n_steps)
    signals = exit_signals(trace)
    counted = np.isfinite(signals["loss"][0])
    if not counted.any():
        raise ValueError("no sequence has a second token: there is nothing to predict")
    chosen = rules if rules is not None else _grid(trace, signals, settings)
    names = list(chosen)
    shape = (len(names), max(len(r) for r in chosen.values()))
    out = {n: np.full(shape, np.nan) for n in ("threshold", "mean_steps", "loss", "accuracy")}
    for i, name in enumerate(names):
        for j, rule in enumerate(chosen[name]):
            fixed = isinstance(rule, (int, np.integer))
            if isinstance(rule, CustomExit):
                steps = trace.exit_step(rule)  # a Python function sees one token at a time
            else:
                steps = np.full(counted.shape, rule, np.int64) if fixed else exit_steps(rule, signals)
            if fixed and not 0 <= rule < trace.n_steps:
                raise ValueError(f"fixed exit step is {rule}, expected 0 to {trace.n_steps - 1}")
            out["threshold"][i, j] = rule if fixed else rule.threshold
            out["mean_steps"][i, j] = steps[counted].mean() + 1
            for key, signal in (("loss", "loss"), ("accuracy", "right")):
                out[key][i, j] = np.take_along_axis(signals[signal], steps[None], 0)[0][counted].mean()
    units = {"mean_steps": "steps", "loss": "nats"}
    return LabelledSet(
        {n: labelled(a, ("rule", "setting"), {"rule": np.array(names)}, units=units.get(n, "")) for n, a in out.items()},
        title="what leaving early costs",
        plotter="plot_pareto",
    )
