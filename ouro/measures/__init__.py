"""Measures of a loop: one call each, with a model and texts or with what has been captured already.

Every measure returns labelled arrays (`ouro.labelled`) with `.plot()` and `.to_dataframe()`. Next to each stands the plain
function of arrays that it applies, for states from elsewhere. docs/measures.md has the table.
"""

from ouro.measures.angular import angular_distance, angular_distances, knee
from ouro.measures.attention import attention_drift, duplicate_mask, head_scores, induction_mask, repeated_tokens
from ouro.measures.depth import depth_sweep, loss_by_step, token_loss
from ouro.measures.drift import angle, divergence, loop_drift, state_changes
from ouro.measures.exits import exit_pareto, exit_report, exit_signals, exit_steps, token_class
from ouro.measures.fixed_point import fixed_point, jacobian_product, perturbation_decay, power_iteration, rest_distances
from ouro.measures.flips import answer_flips, commitment_step, count_flips
from ouro.measures.kernel_alignment import cka, cka_matrix, linear_cka
from ouro.measures.kv import kv_similarity, rank_energy, sharing_residuals, step_cosines
from ouro.measures.lens import TunedLens, logit_lens, ridge, rms_norm
from ouro.measures.rank import rank_of, rank_trajectory
from ouro.measures.step_agreement import agreement, agreement_matrices
from ouro.measures.step_map import StepMap

__all__ = [
    "StepMap", "TunedLens", "agreement", "agreement_matrices", "angle", "angular_distance", "angular_distances",
    "answer_flips", "attention_drift", "cka", "cka_matrix", "commitment_step", "count_flips", "depth_sweep", "divergence",
    "duplicate_mask", "exit_pareto", "exit_report", "exit_signals", "exit_steps", "fixed_point", "head_scores",
    "induction_mask", "jacobian_product", "knee", "kv_similarity", "linear_cka", "logit_lens", "loop_drift", "loss_by_step",
    "perturbation_decay", "power_iteration", "rank_energy", "rank_of", "rank_trajectory", "repeated_tokens",
    "rest_distances", "ridge", "rms_norm", "sharing_residuals", "state_changes", "step_cosines", "token_class",
    "token_loss",
]  # fmt: skip
