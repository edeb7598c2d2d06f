"""Generation under a program that runs steps or layers in another order.

The lanes of an engine's pass go through the same layers together, each at its own step; where steps have layer orders of their
own, or the steps themselves come in another order, that is not so. Here one sequence is run by itself, as `ouro.forward.Forward`
runs any program: the prompt once, then each new token through the passes of the program, with keys and values kept for every pass
(csrc/engine/kept.h). Tokens are drawn as the engine draws them (csrc/engine/sampling.h), with the same noise of (seed, sample,
position).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.edits import FwdHooks
from ouro.errors import ContextLengthError
from ouro.forward import Forward
from ouro.generation import Generation, Request, Settings, stats_of
from ouro.trace import exit_distribution

if TYPE_CHECKING:
    from ouro.live_capture import LiveCapture
    from ouro.model import Model

STOP, LENGTH = 1, 2  # csrc/engine/engine.h, ouro_finish
MAX_TOP = 64  # OURO_MAX_TOP there


def _refuse(model: Model, s: Settings) -> None:
    """What the engine's core would refuse, and what only an engine can do."""
    c = model.config
    if s.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {s.max_new_tokens}, expected 1 or more")
    if not 0 <= s.n_top <= min(MAX_TOP, c.d_vocab):
        raise ValueError(f"logprobs is {s.n_top}, expected 0 to {min(MAX_TOP, c.d_vocab)}")
    for place, token in enumerate(s.follow):
        if not 0 <= token < c.d_vocab:
            raise ValueError(f"token {token} at place {place} of follow is outside of the vocabulary of {c.d_vocab}")
    wrong = {"exit_at_step": s.exit_at_step >= 0, "exit_threshold or exit_rule": s.exit_rule.kind != "never",
             "weighted_exit": s.weighted_exit, "kv_policy": s.kv_policy != 0}  # fmt: skip
    named = [name for name, on in wrong.items() if on]
    if named:
        raise ValueError(f"a program that orders steps or layers anew runs all steps of every token: not with {', '.join(named)}")


def _choose(z: NDArray[np.float32], ids: list[int], place: int, s: Settings, sample: int) -> int:
    """The token behind `ids`, the engine's choice (csrc/engine/decide.c)."""
    if place < len(s.follow):
        return s.follow[place]
    history = np.asarray(ids, np.int32)
    return _core.sample(z, history, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed, sample, len(ids))


def generate_in_order(
    model: Model, prompt: list[int], s: Settings, fwd_hooks: FwdHooks, sample: int = 0, live: LiveCapture | None = None
) -> Generation:
    """One continuation of `prompt`; `sample`: which of several of one prompt; `live` sees the positions as they run."""
    _refuse(model, s)
    if len(prompt) + s.max_new_tokens > model.config.n_ctx:
        raise ContextLengthError(f"{len(prompt)} tokens and {s.max_new_tokens} new ones exceed the context of {model.config.n_ctx}")
    turns, span = list(s.turns or ()), (len(prompt), len(prompt) + s.max_new_tokens)
    request, ids, seconds, begin = Request(prompt, s, model.tokenizer), list(prompt), [0.0, 0.0], time.perf_counter()
    run = Forward(model, [prompt], s.n_steps, edits=s.edits, hooks=fwd_hooks, turns=turns, span=span).growing(live)
    for i in range(s.max_new_tokens):
        gate, z = run(ids)
        token = _choose(z, ids, i, s, sample)
        ids.append(token)
        seconds[i > 0] += time.perf_counter() - begin
        begin = time.perf_counter()
        finish = STOP if token in s.stop_ids else LENGTH if i + 1 == s.max_new_tokens else 0
        counts = _counts(prompt, i + 1, len(turns), seconds)
        top, logprobs = np.argsort(-z, kind="stable")[: s.n_top], _log_softmax(z)
        event = (0, token, float(logprobs[token]), s.n_steps - 1, finish, exit_distribution(gate)[1].tolist(), top.tolist(),
                 logprobs[top].tolist(), counts, None)  # fmt: skip
        if request.take(event):  # a stop string
            request.result.stats = stats_of(counts)
            request.end("stop")
        if request.done:
            break
    if request.error is not None:
        raise request.error
    return request.result


def _log_softmax(z: NDArray[np.float32]) -> NDArray[np.float64]:
    x = z.astype(np.float64) - float(z.max())
    return np.asarray(x - np.log(np.exp(x).sum()))


def _counts(prompt: list[int], tokens: int, turns: int, seconds: list[float]) -> dict[str, Any]:
    return {"passes": tokens * turns, "lanes": (len(prompt) + tokens - 1) * turns, "prompt_tokens": len(prompt), "tokens": tokens,
            "prefill_seconds": seconds[0], "decode_seconds": seconds[1]}  # fmt: skip
