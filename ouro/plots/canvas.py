"""What all pictures share: axes, colours, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ouro.extras import need

SEQUENTIAL = "viridis"
"""From little to much; even in lightness and told apart by colour-blind readers."""
DIVERGING = "RdBu_r"
"""Around a middle that means something."""
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8F8F8F", "#B3A100")
"""Okabe and Ito's colours, in an order whose neighbours differ; all readable on white and on black."""
WORDS = {"pos": "position", "dest_pos": "from position", "src_pos": "to position", "n_steps": "steps run"}
"""How an axis is called in a picture, where not by its own name."""


def axes(ax: Any, size: tuple[float, float] = (6.4, 3.6)) -> Any:
    """`ax`, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    plt = need("matplotlib.pyplot", "notebook")
    return plt.subplots(figsize=size, layout="constrained")[1]


def colour(i: int) -> str:
    """The i-th colour for lines."""
    return CYCLE[i % len(CYCLE)]


def step_colours(n: int) -> NDArray[np.float64]:
    """A colour [n, 4] for each step, ordered from early to late, without the palest and the darkest end."""
    from matplotlib import colormaps

    return np.asarray(colormaps["plasma"](np.linspace(0.25, 0.88, max(n, 1))), np.float64)


def word(dim: str) -> str:
    """An axis name as words."""
    return WORDS.get(dim, dim.replace("_", " "))


def with_units(name: str, units: str | None) -> str:
    """`name [units]`."""
    return f"{name.replace('_', ' ')} [{units}]" if units else name.replace("_", " ")


def tick_labels(labels: Sequence[Any] | NDArray[Any], most: int = 24) -> tuple[list[int], list[str]]:
    """Places and texts of at most `most` ticks."""
    stride = -(-len(labels) // most)
    places = list(range(0, len(labels), max(stride, 1)))
    return places, [f"{labels[i]:.3g}" if isinstance(labels[i], (float, np.floating)) else str(labels[i]) for i in places]


def contrast(rgba: Sequence[float] | NDArray[Any]) -> str:
    """Black or white, whichever is read more easily on this colour (relative luminance, WCAG 2)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(float, rgba[:3]))
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "white"


def heat_map(
    ax: Any,
    values: NDArray[Any],
    rows: tuple[str, NDArray[Any]],
    columns: tuple[str, NDArray[Any]],
    *,
    label: str = "",
    cmap: str = SEQUENTIAL,
    vmin: float | None = None,
    vmax: float | None = None,
    numbers: bool | None = None,
    bar: bool = True,
) -> Any:
    """A matrix as colours with a colour bar; small ones with their numbers, in the colour that can be read there."""
    shown = np.ma.masked_invalid(values)
    image = ax.imshow(shown, cmap=cmap, vmin=vmin, vmax=vmax, aspect="auto", origin="upper", interpolation="nearest")
    for set_ticks, set_label, (name, labels) in ((ax.set_yticks, ax.set_ylabel, rows), (ax.set_xticks, ax.set_xlabel, columns)):
        set_ticks(*tick_labels(labels))
        set_label(word(name))
    if numbers if numbers is not None else values.size <= 100:
        for (i, j), x in np.ndenumerate(values):
            if np.isfinite(x):
                ax.text(j, i, f"{x:.3g}", ha="center", va="center", fontsize=8, color=contrast(image.cmap(image.norm(x))))
    if bar:
        ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02).set_label(label)
    return image


def log_scale(ax: Any) -> None:
    """A logarithmic y axis; plain numbers at 1, 2 and 5 where it spans so little that powers of ten alone say nothing."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 30 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def slant(ax: Any) -> None:
    """Long labels below the picture at an angle, each ending at its tick."""
    for text in ax.get_xticklabels():
        text.set(rotation=60, ha="right", rotation_mode="anchor")
