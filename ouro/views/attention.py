"""Attention grid: one small square a head, one row a step, as drawings without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from ouro.views.page import View, shown

LEAST = 0.02  # weights below it are not drawn: they would not be seen
MOST_TOKENS = 128


def _square(weights: np.ndarray[tuple[int, int], np.dtype[np.float32]], side: int, name: str) -> str:
    """One drawing in units of a cell, called `name` for those who do not see it; a cell is a stroke as thick as long,
    those of the same weight (to two digits) are one path, so that pages stay small."""
    n, cells = len(weights), dict[str, list[str]]()
    for dest, src in np.argwhere(np.tril(weights) >= LEAST).tolist():
        cells.setdefault(f"{weights[dest, src]:.2f}", []).append(f"M{src} {dest}h1")
    marks = "".join(f'<path stroke-opacity="{w}" d="{"".join(places)}"/>' for w, places in sorted(cells.items()))
    style = "outline:1px solid rgba(128,128,128,.6)"
    return f'<svg width="{side}" height="{side}" viewBox="0 -.5 {n} {n}" role="img" aria-label="{name}" style="{style}">{marks}</svg>'


def attention_grid(
    pattern: ArrayLike,
    *,
    tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    title: str = "Attention",
    side: int = 120,
) -> View:
    """Attention of one sequence at one layer, by step and head.

    Parameters
    ----------
    pattern : array [step, head, dest_pos, src_pos]
        Weights 0 to 1, as `cache["pattern", layer][:, row]` gives them; at most 128 positions.
    tokens
        Named in the caption, in order.
    heads
        Which heads to draw; all unless given.
    title
        Caption and page title.
    side
        Pixels of one square.

    Returns
    -------
    View
    """
    p = np.nan_to_num(np.asarray(pattern, np.float32))
    if p.ndim != 4 or p.shape[2] != p.shape[3]:
        raise ValueError(f"pattern has shape {p.shape}, expected [step, head, dest_pos, src_pos]")
    if p.shape[2] > MOST_TOKENS:
        raise ValueError(f"pattern has {p.shape[2]} positions, expected at most {MOST_TOKENS}: slice it first")
    chosen = list(range(p.shape[1])) if heads is None else list(heads)
    for h in chosen:
        if not 0 <= h < p.shape[1]:
            raise IndexError(f"head is {h}, expected 0 to {p.shape[1] - 1}")
    head = "<tr><th></th>" + "".join(f"<th>head {h}</th>" for h in chosen) + "</tr>"
    rows = ""
    for t, at in enumerate(p):
        squares = "".join(f"<td>{_square(at[h], side, f'step {t}, head {h}')}</td>" for h in chosen)
        rows += f"<tr><th>step {t}</th>{squares}</tr>"
    named = "" if tokens is None else " Tokens: " + " ".join(f"{i}:{shown(t)}" for i, t in enumerate(tokens))
    caption = f'<div class="cap">{escape(title)}. Down: position that attends. Across: position attended to.{named}</div>'
    return View(f"{caption}<table>{head}{rows}</table>", title)
