"""Measures of a loop: one call each, with a model and texts or with what has been captured already.

Every measure returns labelled arrays (`ouro.labelled`) with `.plot()` and `.to_dataframe()`. Next to each stands the plain
function of arrays that it applies, for states from elsewhere. docs/measures.md has the table.
"""

from ouro.measures.depth import depth_sweep, loss_by_step, token_loss
from ouro.measures.drift import angle, divergence, loop_drift, state_changes
from ouro.measures.exits import exit_pareto, exit_report, exit_signals, exit_steps, token_class
from ouro.measures.flips import answer_flips, commitment_step, count_flips
from ouro.measures.kernel_alignment import cka, cka_matrix, linear_cka
from ouro.measures.rank import rank_of, rank_trajectory
from ouro.measures.step_agreement import agreement, agreement_matrices

__all__ = [
    "agreement", "agreement_matrices", "angle", "answer_flips", "cka", "cka_matrix", "commitment_step", "count_flips",
    "depth_sweep", "divergence", "exit_pareto", "exit_report", "exit_signals", "exit_steps", "linear_cka", "loop_drift",
    "loss_by_step", "rank_of", "rank_trajectory", "state_changes", "token_class", "token_loss",
]  # fmt: skip
