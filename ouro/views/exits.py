"""Exit strip: for each token, how likely the gate is to leave at each step."""

from __future__ import annotations

from ouro.trace import Trace
from ouro.views.page import STEP_COLOURS, View, shown, step_key, tip


def exit_strip(trace: Trace, *, row: int = 0, q: float | None = None) -> View:
    """One bar a token, divided by the exit distribution over steps.

    Parameters
    ----------
    trace
        As `Model.trace` gives it.
    row
        Which sequence of the batch.
    q
        Also name the step at which Q-exit with this threshold would leave.

    Returns
    -------
    View
    """
    if not 0 <= row < len(trace.lengths):
        raise IndexError(f"row is {row}, expected 0 to {len(trace.lengths) - 1}")
    n = int(trace.lengths[row])
    steps = None if q is None else trace.exit_step(q)[row]
    lines = []
    for i, token in enumerate(trace._model.token_names(trace.token_ids[row])):
        parts = "".join(
            f'<span style="flex:{max(float(p), 0.0):.4f} 1 0;background:{STEP_COLOURS[t % len(STEP_COLOURS)]}"></span>'
            for t, p in enumerate(trace.exit_pdf[:, row, i])
        )
        shares = f"exit at position {i}\n" + "\n".join(f"step {t}: {p:.3f}" for t, p in enumerate(trace.exit_pdf[:, row, i]))
        out = "" if steps is None else f"<td>{steps[i]}</td>"
        lines.append(f'<tr><td>{i}</td><th>{shown(token)}</th><td><div class="bar" role="img" {tip(shares)}>{parts}</div></td>'
                     f"<td>{trace.expected_steps[row, i]:.2f}</td>{out}</tr>")  # fmt: skip
    leaves = "" if steps is None else f"<th>leaves at (q = {q:g})</th>"
    head = f"<tr><th>pos</th><th>token</th><th>exit distribution</th><th>mean steps</th>{leaves}</tr>"
    mean = float(trace.expected_steps[row, :n].mean())
    caption = f'<div class="cap">Where the exit gate would leave;{step_key(trace.n_steps)}. Mean over the tokens: {mean:.2f} steps.</div>'
    return View(f"{caption}<table>{head}{''.join(lines)}</table>", "Exit distribution by token")
