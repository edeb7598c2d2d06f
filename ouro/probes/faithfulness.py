"""The paper's faithfulness protocol: do later steps change the answer, and could it be read before?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ouro.labelled import LabelledArray, LabelledSet
from ouro.measures.rank import single_token
from ouro.measures.source import captured
from ouro.measures.step_agreement import agreement_matrices
from ouro.model import Batch, Model
from ouro.probes.grid import StepLayerProbe
from ouro.probes.samples import probe_data


def faithfulness_of(X: ArrayLike, answers: ArrayLike, *, groups: Any = None, **probe: Any) -> LabelledSet:
    """`faithfulness` of states and answers from elsewhere.

    Parameters
    ----------
    X : array [batch, step, layer, d]
        Where the answer is about to be said.
    answers : int array [batch, step]
        Which answer each step gives.
    groups
        As in `StepLayerProbe.fit`.
    **probe
        Arguments of `StepLayerProbe`.
    """
    x, a = np.asarray(X), np.asarray(answers)
    if x.ndim != 4 or a.shape != x.shape[:2]:
        raise ValueError(f"X has shape {x.shape} and answers {a.shape}, expected [batch, step, layer, d] and [batch, step]")
    n_answers = int(a.max()) + 1
    same = agreement_matrices(np.where(a.T[..., None] == np.arange(n_answers), 0.0, -50.0))["top1"].mean(-1)
    score = np.full((x.shape[1], *x.shape[1:3]), np.nan)
    for i in range(x.shape[1]):
        if np.unique(a[:, i], return_counts=True)[1].min() >= 2 and len(np.unique(a[:, i])) > 1:
            score[i] = StepLayerProbe(**probe).fit(x, a[:, i], groups=groups).scores_.mean("fold").values
    common = np.array([np.unique(a[:, i], return_counts=True)[1].max() / len(a) for i in range(a.shape[1])])
    return LabelledSet(
        {
            "answer": LabelledArray(a, ("batch", "step")),
            "agreement": LabelledArray(same, ("step", "other_step"), attrs={"formula": "part with a_s = a_t"}, plotter="plot_step_matrix"),
            "probe": LabelledArray(score, ("answer_step", "step", "layer"), attrs={"formula": "accuracy, cross-validated"}),
            "majority": LabelledArray(common, ("answer_step",), attrs={"formula": "part with the most frequent answer"}),
        },
        title="is the answer made up before it is said?",
        plotter="plot_faithfulness",
    )


def faithfulness(
    model: Model,
    prompts: Batch | Any,
    answers: Sequence[int | str],
    *,
    groups: Any = None,
    n_steps: int | None = None,
    **probe: Any,
) -> LabelledSet:
    """Do later steps change the answer, or is it settled and readable long before?

    At the last token of every prompt each step's answer is the likeliest of `answers`. Then

    | array | axes | meaning |
    |---|---|---|
    | answer | batch, step | index into `answers` |
    | agreement | step, other_step | part of the prompts where two steps give the same answer |
    | probe | answer_step, step, layer | accuracy of a probe on the stream behind (step, layer) at predicting the answer of answer_step |
    | majority | answer_step | what always giving the most frequent answer would score |

    An answer that a probe reads at step s and that later steps never change was rationalised, not computed, by them; the paper
    finds low agreement and probes that do not foresee later answers. Steps with one answer only have no probe (NaN).

    Parameters
    ----------
    model
    prompts
        Texts or ids, or a cache with `resid_post` and `state` that holds their last tokens (`pos=-1`).
    answers
        Ids, or texts that are one token each, e.g. `[" Yes", " No"]`.
    groups
        Prompts of one group stay together in a split.
    n_steps
        Recurrent steps to run.
    **probe
        Arguments of `StepLayerProbe`.

    Source
    ------
    arXiv 2510.25741, section on faithfulness (linear probes of later answers, agreement of answers between steps, on Quora
    question pairs).

    Examples
    --------
    >>> import ouro
    >>> from ouro.probes import faithfulness
    >>> model = ouro.load("ouro-tiny")
    >>> pairs = [(a, b) for a in ("Ann", "Bob", "Cid", "Dora") for b in ("Leo", "Zoe", "Uma")]
    >>> prompts = [f"{a} is the boss of {b}. Who is the boss of {b}?" for a, b in pairs]
    >>> found = faithfulness(model, prompts, model.to_tokens("Ann Bob")[:2], cv=2)
    >>> found["agreement"].shape, found["probe"].dims
    ((4, 4), ('answer_step', 'step', 'layer'))
    """
    if len(answers) < 2:
        raise ValueError(f"{len(answers)} answers: expected two or more to choose from")
    ids = [single_token(model, a) for a in answers]
    if isinstance(prompts, (str, Sequence, np.ndarray)):
        cache = model.run_with_cache(prompts, ["resid_post", "state"], pos=-1, n_steps=n_steps, logits="none")[1]
    else:
        cache = captured(model, prompts, ["resid_post", "state"], n_steps=n_steps)
    X, _, _ = probe_data(cache, pos=-1)
    counts = (cache.positions >= 0).sum(1) - 1
    states = cache["state"][:, np.arange(len(counts)), counts]  # [step, batch, d]
    logits = model._core.readout(np.ascontiguousarray(states.reshape(-1, states.shape[-1])), True)[0]
    said = logits.reshape(*states.shape[:2], -1)[..., ids].argmax(-1).T
    return faithfulness_of(X, said, groups=groups, **probe)
