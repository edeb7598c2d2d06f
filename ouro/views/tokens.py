"""Coloured tokens with a step selector: what each step would say next, and how sure it is."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ouro.trace import Trace
from ouro.views.page import View, shade, shown, step_panes, tip

Colour = Literal["exit_pdf", "exit_cdf", "probability", "entropy"]
CAPTIONS = {
    "exit_pdf": "probability that the exit gate leaves at this step",
    "exit_cdf": "probability that the exit gate has left by this step",
    "probability": "probability of the top token",
    "entropy": "entropy of the readout over its largest value here",
}


def _strength(trace: Trace, row: int, n: int, colour: Colour, p: NDArray[np.float32]) -> NDArray[np.float32]:
    """How strongly each [step, pos] is coloured, 0 to 1."""
    if colour == "probability":
        return np.asarray(p[:, row, :n, 0])
    if colour == "entropy":
        return np.asarray(trace.entropy[:, row, :n] / max(float(trace.entropy[:, row, :n].max()), 1e-6))
    return np.asarray(getattr(trace, colour)[:, row, :n])


def token_view(trace: Trace, *, row: int = 0, k: int = 5, colour: Colour = "exit_pdf", step: int | None = None) -> View:
    """The tokens of one sequence, each with the token that a step would put next; the step is chosen above.

    Parameters
    ----------
    trace
        As `Model.trace` gives it.
    row
        Which sequence of the batch.
    k
        Most likely tokens that the tip of a token lists, 1 or more.
    colour
        What shades a token: "exit_pdf", "exit_cdf", "probability" of the top token, or "entropy" of the readout.
    step
        The step shown first, 0-based; the last unless given.

    Returns
    -------
    View

    Examples
    --------
    >>> import ouro
    >>> view = ouro.views.token_view(ouro.load("ouro-tiny").trace("One day Ann took"))
    >>> "<script" in str(view)
    False
    """
    if colour not in CAPTIONS:
        raise ValueError(f"colour is {colour!r}, expected one of {', '.join(CAPTIONS)}")
    if not 0 <= row < len(trace.lengths):
        raise IndexError(f"row is {row}, expected 0 to {len(trace.lengths) - 1}")
    chosen = trace.n_steps - 1 if step is None else step
    if not 0 <= chosen < trace.n_steps:
        raise IndexError(f"step is {step}, expected 0 to {trace.n_steps - 1}")
    n, model = int(trace.lengths[row]), trace._model
    ids, p = trace.top_tokens(min(k, model.config.d_vocab))
    tokens, strength = model.token_names(trace.token_ids[row]), _strength(trace, row, n, colour, p)

    def name(i: int) -> str:
        return shown(model.token_names([i])[0])

    def cell(t: int, i: int) -> str:
        best = "\n".join(f"{p[t, row, i, j]:.3f}  {name(int(ids[t, row, i, j]))}" for j in range(ids.shape[-1]))
        more = (f"position {i}, step {t}\n{best}\nentropy {trace.entropy[t, row, i]:.3f} nats\n"
                f"exit here {trace.exit_pdf[t, row, i]:.3f}, by here {trace.exit_cdf[t, row, i]:.3f}")  # fmt: skip
        return (f'<span class="tok" role="group" style="{shade(float(strength[t, i]))}" {tip(more)}><b>{shown(tokens[i])}</b>'
                f"<i>{name(int(ids[t, row, i, 0]))}</i></span>")  # fmt: skip

    panes = ['<div class="flow">' + "".join(cell(t, i) for i in range(n)) + "</div>" for t in range(trace.n_steps)]
    caption = f'<div class="cap">Bold: token read. Below: what the step would say next. Shade: {CAPTIONS[colour]}.</div>'
    return View(caption + step_panes([f"after step {t}" for t in range(trace.n_steps)], panes, chosen), "Tokens by step")
