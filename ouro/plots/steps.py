"""What each step would say, as a table of tokens in colour."""

from __future__ import annotations

from typing import Any

from ouro.plots.canvas import axes, contrast
from ouro.trace import Trace


def plot_steps(trace: Trace, *, row: int = 0, ax: Any = None) -> Any:
    """Exit probability as colour and the top token as text, by step and position.

    Parameters
    ----------
    trace
        As `Model.trace` gives it.
    row
        Which sequence of the batch.
    ax : matplotlib Axes, optional
        Where to draw; a new figure otherwise.

    Returns
    -------
    matplotlib Axes
    """
    model = trace._model
    n = int(trace.lengths[row])
    ids, _ = trace.top_tokens(1)
    ax = axes(ax, (max(6.0, 0.68 * n), 0.55 * trace.n_steps + 1.6))
    image = ax.imshow(trace.exit_pdf[:, row, :n], cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="upper")
    for t in range(trace.n_steps):
        for i, token in enumerate(model.token_names(ids[t, row, :n, 0])):
            said = _visible(token)
            colour = contrast(image.cmap(image.norm(trace.exit_pdf[t, row, i])))
            ax.text(i, t, said, ha="center", va="center", fontsize=8 if len(said) < 10 else 6, color=colour)
    ax.set_xticks(range(n), [_visible(token) for token in model.token_names(trace.token_ids[row])], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(trace.n_steps), [f"step {t}" for t in range(trace.n_steps)])
    ax.set_xlabel("token read")
    ax.set_title("what each step would say next (colour: probability of leaving there)", fontsize=10)
    ax.figure.colorbar(image, ax=ax, fraction=0.03, pad=0.02)
    return ax


def _visible(token: str) -> str:
    return repr(token)[1:-1].strip() or "·"
