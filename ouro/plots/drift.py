"""Lines by step, matrices of step against step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import SEQUENTIAL, axes, colour, heat_map, log_scale, with_units, word

TITLES = {"top1": "same top token", "kl": "KL(p_step || p_other)", "cka": "linear CKA of states", "agreement": "same answer"}


def _pick(result: LabelledArray | LabelledSet, name: str | None, fallback: str) -> LabelledArray:
    return result[name or fallback] if isinstance(result, LabelledSet) else result


def plot_by_step(
    result: LabelledArray | LabelledSet,
    *,
    name: str | None = None,
    label: str | None = None,
    band: bool = True,
    ax: Any = None,
    **style: Any,
) -> Any:
    """Mean over tokens along the first axis (steps), with a band from the first to the third quartile of the tokens.

    Parameters
    ----------
    result
        An array `[step, batch, pos]`, or a set and the `name` of one of its arrays.
    label
        Name of the line in a legend.
    band
        False leaves the quartiles out.

    Returns
    -------
    matplotlib Axes
    """
    a = _pick(result, name, next(iter(result)) if isinstance(result, LabelledSet) else "")
    ax = axes(ax)
    axis = a.dims[0]
    x = a.coords[axis]
    tokens = a.values.reshape(len(x), -1).astype(float)
    mean = a.mean(*a.dims[1:]).values if len(a.dims) > 1 else tokens[:, 0]
    (line,) = ax.plot(x, mean, **{"marker": "o", "label": label, "color": colour(len(ax.lines)), **style})
    known = ~np.isnan(tokens).all(1)
    spread = tokens[known]
    if band and spread.size and not np.isin(spread[~np.isnan(spread)], (0, 1)).all():  # quartiles of yes and no say nothing
        low, high = np.nanquantile(spread, [0.25, 0.75], axis=1)
        ax.fill_between(x[known], low, high, alpha=0.18, color=line.get_color(), linewidth=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel(word(axis))
    ax.set_ylabel(with_units(a.name, a.attrs.get("units")))
    if label:
        ax.legend(frameon=False)
    return ax


def plot_drift(result: LabelledSet, *, names: tuple[str, ...] = ("relative_l2", "acceleration", "kl"), ax: Any = None) -> Any:
    """How the state settles: measures of `loop_drift` along the steps, on one logarithmic scale.

    Parameters
    ----------
    result
        Of `loop_drift`.
    names
        Which of its arrays.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    for i, name in enumerate(names):
        label = with_units(name, result[name].attrs.get("units"))  # the divergence of single tokens spans many decades: no band
        plot_by_step(result, name=name, label=label, band=name != "kl", color=colour(i), ax=ax)
    log_scale(ax)
    ax.set_ylabel("mean of tokens, quartiles as a band")
    ax.set_title("change from the step before", fontsize=10)
    return ax


def plot_step_matrix(result: LabelledArray | LabelledSet, *, name: str | None = None, ax: Any = None, **style: Any) -> Any:
    """Step against step, averaged over tokens, with numbers.

    Parameters
    ----------
    result
        `[step, other_step, ...]`; of a set the array `name`, the first one unless given.

    Returns
    -------
    matplotlib Axes
    """
    a = _pick(result, name, next(iter(result)) if isinstance(result, LabelledSet) else "")
    a = a.mean(*a.dims[2:]) if len(a.dims) > 2 else a
    ax = axes(ax, (4.6, 3.8))
    bounded = a.name != "kl"
    limits = {"vmin": 0.0 if a.values.size == 0 else min(0.0, float(np.nanmin(a.values))), "vmax": 1.0 if bounded else None}
    rows, columns = ((d, a.coords[d]) for d in a.dims)
    heat_map(ax, a.values, rows, columns, label=with_units(a.name, a.attrs.get("units")), **{"cmap": SEQUENTIAL, **limits, **style})
    ax.set_title(TITLES.get(a.name, f"{a.name.replace('_', ' ')} of steps"), fontsize=10)
    return ax


def plot_flips(result: LabelledSet, *, ax: Any = None) -> Any:
    """How many tokens are settled after each step, and what each step turned right or wrong.

    Parameters
    ----------
    result
        Of `answer_flips`.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    steps = result["top"].coords["step"]
    at = result["commitment"].values
    at = at[~np.isnan(at)]
    ax.plot(steps, [(at <= t).mean() for t in steps], marker="o", color=colour(0), label="settled by then")
    ax.plot(steps, result["right"].mean("batch", "pos").values, marker="s", color=colour(2), label="right")
    for name, sign, i in (("gained", 1, 4), ("lost", -1, 5)):
        values = np.nan_to_num(result[name].mean("batch", "pos").values)
        ax.bar(steps, sign * values, width=0.3, color=colour(i), label=name)
    ax.axhline(0, linewidth=0.8, color=ax.spines["left"].get_edgecolor())
    ax.set(xlabel="step", ylabel="part of the tokens", ylim=(None, 1.02))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, ncols=2, loc="center right")
    ax.set_title("when the top token is settled", fontsize=10)
    return ax


def plot_rank(result: LabelledArray | LabelledSet, *, most: int = 12, ax: Any = None) -> Any:
    """Rank of a token along the steps, a line for each place (at most `most`, the last ones) and the median.

    Parameters
    ----------
    result
        Of `rank_trajectory`.

    Returns
    -------
    matplotlib Axes
    """
    a = _pick(result, None, "rank")
    ax = axes(ax)
    steps = a.coords["step"]
    ranks = a.values.reshape(len(steps), -1) + 1
    ranks = ranks[:, ~np.isnan(ranks).any(0)]
    for i, line in enumerate(ranks[:, -most:].T):
        ax.plot(steps, line, color=colour(6), linewidth=1, alpha=0.7, label="single places" if i == 0 else None)
    if ranks.size:
        ax.plot(steps, np.median(ranks, axis=1), color=colour(0), marker="o", label="median of all")
    ax.set(yscale="log", xlabel="step", ylabel="rank (1 is the top)")
    ax.invert_yaxis()
    ax.xaxis.get_major_locator().set_params(integer=True)
    if ranks.size:
        ax.legend(frameon=False)
    ax.set_title("rank of the token along the steps", fontsize=10)
    return ax


def plot_depth(result: LabelledSet, *, ax: Any = None) -> Any:
    """Loss and accuracy by step or by steps run, on two scales.

    Parameters
    ----------
    result
        Of `loss_by_step` or `depth_sweep`.

    Returns
    -------
    matplotlib Axes
        That of the loss.
    """
    ax = axes(ax)
    plot_by_step(result, name="loss", band=False, color=colour(0), ax=ax)
    ax.yaxis.label.set_color(colour(0))
    other = ax.twinx()
    plot_by_step(result, name="accuracy", band=False, color=colour(5), marker="s", ax=other)
    other.yaxis.label.set_color(colour(5))
    ax.set_title(result.title, fontsize=10)
    return ax
