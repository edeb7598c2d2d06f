"""Lens table: what the residual stream would say behind each layer of each step, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledArray, LabelledSet
from ouro.views.page import View, shade, shown, tip

NEEDED = ("top", "probability", "entropy")
AXES = ("step", "layer", "batch", "pos")


def _checked(lens: LabelledSet) -> None:
    missing = [name for name in NEEDED if name not in lens]
    if missing:
        raise ValueError(f"the set has no {', '.join(missing)}: expected the result of ouro.measures.logit_lens")
    for name in NEEDED:
        if lens[name].dims != AXES:
            raise ValueError(f"{name} has axes {lens[name].dims}, expected {AXES}")


def _words(top: LabelledArray) -> Callable[[int, int, int], str]:
    """Top token as text at (step, layer, pos), its id where the model has no tokenizer."""
    texts = top.coords.get("top_token")
    return lambda t, layer, i: str(top.values[t, layer, i]) if texts is None else str(texts[t, layer, i])


def _tokens(lens: LabelledSet, row: int) -> tuple[NDArray[np.int64], list[str]]:
    """Places that hold a token, and their names."""
    top = lens["top"].isel(batch=row)
    places = np.flatnonzero(top.values[0, 0] >= 0)
    names = top.coords.get("token")
    return places, [str(top.coords["pos"][i]) if names is None else str(names[i]) for i in places]


def lens_table(lens: LabelledSet, *, row: int = 0, last_first: bool = True) -> View:
    """What each layer of each step would say if the step ended there: top token, its probability as shade.

    Rows are the layers of every step, columns the tokens read. The last layer of a step is the model's own readout (exact, a
    rule above it and bold); a row marked ~ is read inside a step through the norm and the head, as the model never does.
    A rank of the token that really follows is in the tip where the lens has it.

    Parameters
    ----------
    lens
        As `ouro.measures.logit_lens` gives it.
    row
        Which sequence of the batch.
    last_first
        The last step on top, as a residual stream is usually drawn; False for the order of computing.

    Returns
    -------
    View

    Examples
    --------
    >>> import ouro
    >>> lens = ouro.measures.logit_lens(ouro.load("ouro-tiny"), "One day Ann took")
    >>> view = ouro.views.lens_table(lens)
    >>> view.title, str(view).count("<tr")
    ('Lens by step and layer', 17)
    """
    _checked(lens)
    batch = lens["top"].shape[2]
    if not 0 <= row < batch:
        raise IndexError(f"row is {row}, expected 0 to {batch - 1}")
    one = {name: lens[name].isel(batch=row) for name in lens if lens[name].dims == AXES}
    word, (places, names) = _words(one["top"]), _tokens(lens, row)
    steps, layers = (one["top"].coords[axis].tolist() for axis in ("step", "layer"))
    unsure = one["top"].coords.get("approximate", np.arange(len(layers)) < len(layers) - 1)

    def cell(t: int, layer: int, i: int) -> str:
        p = float(one["probability"].values[t, layer, i])
        more = f"step {steps[t]}, layer {layers[layer]}, position {i}\n{p:.3f}  {shown(word(t, layer, i))}\n"
        more += f"entropy {float(one['entropy'].values[t, layer, i]):.3f} nats"
        rank = float(one["rank"].values[t, layer, i]) if "rank" in one else math.nan
        more += "" if math.isnan(rank) else f"\nrank of the token followed: {rank:.0f}"
        return f'<td style="{shade(p)}" {tip(more)}>{shown(word(t, layer, i), 12)}</td>'

    order = [(t, layer) for t in range(len(steps)) for layer in range(len(layers))]
    lines = []
    for t, layer in reversed(order) if last_first else order:
        end = layer == len(layers) - 1
        mark = "~ " if unsure[layer] else ""
        kind = (' class="end"' if end else "") if mark else ' class="end own"'
        cells = "".join(cell(t, layer, int(i)) for i in places)
        lines.append(f"<tr{kind}><th>{mark}{steps[t]}.{layers[layer]}</th>{cells}</tr>")
    head = "<tr><th>step.layer</th>" + "".join(f"<th>{shown(name, 12)}</th>" for name in names) + "</tr>"
    exact = "" if all(unsure) else " The last layer of each step is its own readout: exact, bold."
    caption = (f'<div class="cap">{escape(lens.title or "lens")}: the top token after each layer of each step, shaded by its'
               f" probability.{exact} ~ marks readings inside a step, which are approximate.</div>")  # fmt: skip
    table = f"<details open><summary>{len(lines)} rows, {len(places)} tokens</summary><table>{head}{''.join(lines)}</table></details>"
    return View(caption + table, "Lens by step and layer")
