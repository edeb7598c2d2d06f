"""Causal tracing: which states carry a fact (Meng et al. 2022, "Locating and editing factual associations in GPT")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro.labelled import LabelledArray, LabelledSet
from ouro.patching.metric import log_softmax, token_id
from ouro.patching.sweep import places_of, sweep

if TYPE_CHECKING:
    from ouro.model import Model, Tokens


def subject_positions(model: Model, tokens: list[int], subject: str | Sequence[int]) -> list[int]:
    """Positions of a subject: given ones, or those of the last place where its text stands."""
    if not isinstance(subject, str):
        return places_of("position of the subject", len(tokens), subject)
    strings = model.to_str_tokens(tokens)
    ends = np.cumsum([len(s) for s in strings])
    begin = "".join(strings).rfind(subject)
    if begin < 0 or not subject:
        raise ValueError(f"{subject!r} does not stand in the prompt {''.join(strings)!r}")
    return [i for i, end in enumerate(ends) if end > begin and end - len(strings[i]) < begin + len(subject)]


def causal_trace(
    model: Model,
    prompt: Tokens,
    answer: str | int,
    *,
    subject: str | Sequence[int],
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    point: str = "resid_post",
    window: int = 1,
    **arguments: Any,
) -> LabelledSet:
    """Hide the subject behind noise, put clean states back one at a time, and see what brings the answer back.

    Parameters
    ----------
    model : Model
    prompt
        Text or token ids.
    answer
        One token whose probability after the prompt counts.
    subject
        The text of the subject (its last occurrence), or positions.
    noise
        Standard deviation of the noise on the subject's embeddings, in standard deviations of the prompt's embeddings.
    samples
        Noise draws to average over.
    seed
        Of the noise.
    point, window
        What is put back ("resid_post"; "mlp_out" and "attn_out" usually with a window of several layers), see `sweep`.
    **arguments
        To `sweep`: n_steps, steps, layers, positions, progress, `save_to` (a file for each noise draw), ...

    Returns
    -------
    LabelledSet
        `restored [step, layer, pos]`: mean probability of the answer with the clean activation put back; `effect`: the same less the
        corrupted probability (the indirect effect). `attrs`: mean probabilities `clean` and `corrupted`.
    """
    if samples < 1 or not 0 < noise < math.inf:
        raise ValueError(f"samples is {samples} and noise {noise}, expected at least 1 and a finite number above 0")
    tokens, wanted = model._one(prompt), token_id(model, answer)
    hidden = subject_positions(model, tokens, subject)
    n_steps = arguments.get("n_steps")
    _, cache = model.run_with_cache(tokens, names_filter=["hook_embed", point], n_steps=n_steps, logits="none")
    embeddings = np.asarray(cache["hook_embed"], np.float32).reshape(len(tokens), -1)
    scale, rng = noise * float(embeddings.std()), np.random.default_rng(seed)

    def probability(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.exp(log_softmax(logits[:, -1])[:, wanted])

    found: list[LabelledArray] = []
    save_to = arguments.pop("save_to", None)
    for draw in range(samples):
        noised = embeddings.copy()
        noised[hidden] += rng.normal(0.0, scale, (len(hidden), embeddings.shape[1])).astype(np.float32)
        path = None if save_to is None else Path(save_to).with_suffix(f".{draw}.npz")
        found.append(sweep(model, cache, tokens, probability, points=point, window=window, embeddings=noised, save_to=path, **arguments))
    corrupted = float(np.mean([f.attrs["corrupted"] for f in found]))
    states = model.trace(tokens, n_steps=n_steps, logits="last")
    assert states.logits is not None
    clean = float(probability(states.logits[-1, :, -1:])[0])
    mean = np.mean([f.values for f in found], axis=0)
    attrs = {"clean": clean, "corrupted": corrupted, "subject": hidden, "point": point, "window": window, "samples": samples,
             "source": "Meng et al. 2022, arXiv 2202.05262"}  # fmt: skip
    return LabelledSet(
        {
            "restored": found[0].with_values(mean, attrs={"units": "probability", "corrupted": corrupted}),
            "effect": found[0].with_values(mean - corrupted, attrs={"units": "probability"}),
        },
        title="causal tracing", attrs=attrs, plotter="plot_patching",
    )  # fmt: skip
