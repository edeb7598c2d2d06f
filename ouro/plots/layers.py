"""Measures by step and layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from ouro.labelled import LabelledArray, LabelledSet
from ouro.plots.canvas import axes, colour, contrast, heat_map, log_scale, slant, step_colours, with_units
from ouro.plots.drift import plot_by_step


def plot_layers_by_step(result: LabelledArray | LabelledSet, *, ax: Any = None) -> Any:
    """A line over the layers for each step, early to late in colour; a ring marks the knee where one was found.

    Parameters
    ----------
    result
        Of `angular_distance`, or any array `[step, layer, ...]`.

    Returns
    -------
    matplotlib Axes
    """
    a = result["distance"] if isinstance(result, LabelledSet) else result
    ax = axes(ax)
    mean = a.mean(*a.dims[2:]) if len(a.dims) > 2 else a
    layers = a.coords["layer"]
    for t, (row, shade) in enumerate(zip(mean.values, step_colours(len(mean.values)), strict=True)):
        ax.plot(layers, row, color=shade, marker="o", markersize=3, label=f"step {a.coords['step'][t]}")
        if isinstance(result, LabelledSet) and result["knee"].values[t] >= 0:
            at = int(result["knee"].values[t])
            ax.plot(layers[at], row[at], "o", markersize=11, markerfacecolor="none", markeredgecolor=shade)
    ax.set(xlabel="layer", ylabel=with_units(a.name, a.attrs.get("units")))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    ax.set_title(result.title if isinstance(result, LabelledSet) else a.name, fontsize=10)
    return ax


def plot_kv_similarity(result: LabelledSet, *, ax: Any = None) -> Any:
    """What each way of sharing keys and values between the steps loses: mean over layers, keys solid, values dashed and with squares.

    Parameters
    ----------
    result
        Of `kv_similarity`.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    steps, policies = result["key_residual"].coords["step"], result["key_residual"].coords["policy"]
    for i, policy in enumerate(policies):
        for name, style in (("key", "o-"), ("value", "s--")):
            loss = result[f"{name}_residual"].sel(policy=policy).mean("layer").values
            ax.plot(steps, loss, style, color=colour(i), markersize=5, label=f"{name}s, {str(policy).replace('_', ' ')}")
    ax.set(xlabel="step", ylabel="squared residual / squared norm", ylim=(0, 1.3 * ax.get_ylim()[1]))  # room for the legend
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=8, ncols=3, handlelength=3.5)
    ax.set_title("keys and values replaced by shared ones", fontsize=10)
    return ax


def plot_fixed_point(result: LabelledSet, *, ax: Any = None) -> Any:
    """Distances along the steps on a logarithmic scale: mean over tokens, with quartiles.

    Parameters
    ----------
    result
        Of `fixed_point`.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    plot_by_step(result, name="move", label="from the step before", color=colour(0), ax=ax)
    if len(result["move"]) > 1:  # the distance of the last state to itself is 0
        plot_by_step(result.isel(step=slice(0, -1)), name="to_last", label="to the last state", color=colour(1), ax=ax)
    radius = result["contraction"].values
    log_scale(ax)
    ax.set_ylabel("relative distance")
    ax.set_title(f"coming to rest (spectral radius at the end {np.mean(radius):.3g})", fontsize=10)
    return ax


def plot_perturbation(result: LabelledSet, *, ax: Any = None) -> Any:
    """What is left of a change, step by step: a line for each sequence and their geometric mean.

    Parameters
    ----------
    result
        Of `perturbation_decay`.

    Returns
    -------
    matplotlib Axes
    """
    ax = axes(ax)
    gain = result["gain"]
    steps = gain.coords["step"]
    if gain.shape[1] > 1:
        ax.plot(steps, gain.values, color=colour(6), linewidth=1, alpha=0.7)
    ax.plot(steps, np.exp(np.log(gain.values).mean(1)), color=colour(0), marker="o", label="mean of sequences")
    ax.axhline(1, color=ax.spines["left"].get_edgecolor(), linewidth=0.8, linestyle=":")
    log_scale(ax)
    ax.set(xlabel="step", ylabel="size, relative to the change made")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(result.title, fontsize=10)
    return ax


def plot_lens(result: LabelledSet, *, name: str = "kl", ax: Any = None) -> Any:
    """A lens along the unrolled depth: the mean over tokens of one array, with the exact places as filled marks.

    Parameters
    ----------
    result
        Of `logit_lens`.
    name
        kl, entropy, probability, rank or logprob.

    Returns
    -------
    matplotlib Axes
    """
    a = result[name]
    mean = a.mean("batch", "pos").values
    steps, layers = mean.shape
    ax = axes(ax, (7.2, 3.4))
    x = np.arange(steps * layers).reshape(steps, layers)
    ax.plot(x.reshape(-1), mean.reshape(-1), color=colour(6), linewidth=1, zorder=1)
    exact = ~a.coords["approximate"]
    for t, shade in enumerate(step_colours(steps)):
        ax.scatter(x[t, ~exact], mean[t, ~exact], facecolors="none", edgecolors=[shade], s=26, zorder=2)
        ax.scatter(x[t, exact], mean[t, exact], color=[shade], s=40, zorder=2)
        ax.axvline(x[t, -1] + 0.5, color=ax.spines["left"].get_edgecolor(), linewidth=0.5, linestyle=":")
    ax.set_xticks(x.mean(1), [f"step {t}" for t in a.coords["step"]])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=with_units(name, a.attrs.get("units")), xlim=(-0.6, x[-1, -1] + 0.6), xlabel="layers of each step")
    ax.set_title(f"{result.title}{' (filled: exact)' if exact.any() else ''}", fontsize=10)
    return ax


def plot_lens_grid(result: LabelledArray, *, batch: int = 0, most: int = 24, ax: Any = None, **style: Any) -> Any:
    """One sequence under the lens: places (step.layer) by tokens, coloured by the array, with the top tokens as text.

    Parameters
    ----------
    result
        An array of `logit_lens`, `[step, layer, batch, pos]`; `top` itself gives text without colour.
    batch
        Which sequence.
    most
        Tokens shown, the last ones.

    Returns
    -------
    matplotlib Axes
    """
    a = result.isel(batch=batch)
    tokens = a.coords.get("token", a.coords["pos"].astype(str))
    shown = np.flatnonzero(tokens != "")[-most:]
    rows = np.array([f"{t}.{layer}" for t in a.coords["step"] for layer in a.coords["layer"]])
    columns = np.array([repr(str(t))[1:-1] for t in tokens[shown]])
    coloured = a.values.dtype.kind == "f"
    values = (a.values if coloured else np.full(a.shape, np.nan)).reshape(len(rows), -1)[:, shown]
    words = a.coords.get("top_token")
    ax = axes(ax, (max(5.0, 0.62 * len(shown) + 1.6), 0.28 * len(rows) + 1.2))
    style = {"numbers": words is None and values.size <= 100, "label": with_units(a.name, a.attrs.get("units")), "bar": coloured, **style}
    image = heat_map(ax, values, ("step.layer", rows), ("token read", columns), **style)
    plain = ax.xaxis.label.get_color()
    for (i, j), word in np.ndenumerate(words.reshape(len(rows), -1)[:, shown] if words is not None else np.empty((0, 0))):
        shade = contrast(image.cmap(image.norm(values[i, j]))) if np.isfinite(values[i, j]) else plain
        ax.text(j, i, repr(str(word))[1:-1].strip(), ha="center", va="center", fontsize=7, color=shade)
    slant(ax)
    ax.set_title("what each layer of each step would say next", fontsize=10)
    return ax
