"""Generation: what a caller may ask for, what comes back, and how it grows from the core's events."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Unpack, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.cache import ActivationCache
from ouro.edits import Edit, FwdHooks, HookFunction, HookPoint, checked
from ouro.exits import ExitRule, QExit
from ouro.extras import did_you_mean
from ouro.loop import Carry, LoopProgram, Turn
from ouro.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
FINISH: dict[int, FinishReason] = {1: "stop", 2: "length", 3: "cancelled"}
NO_EXIT = ExitRule(0.0)
KVPolicy = Literal["full", "last_step", "average", "first_step", "last_exited"]
KV_POLICIES: tuple[KVPolicy, ...] = ("full", "last_step", "average", "first_step", "last_exited")  # as in csrc/engine/policy.h


@dataclass(frozen=True)
class GenerationStats:
    """What one generation cost.

    Attributes
    ----------
    passes
        Sweeps over the weights this request took part in.
    lanes
        Rows of work it had in them: positions times steps, those of the prompt included.
    prompt_tokens, tokens
        Tokens read and written.
    prefix_tokens
        Of the prompt, taken over from an earlier request with the same beginning.
    prefill_seconds, decode_seconds
        Up to the first new token, and after it.
    cache_bytes
        Keys and values of this request at its end, in whole pages of 64 positions and one step. What it took over from earlier
        requests (`prefix_tokens`) is not counted.
    guesses, kept, dropped
        Positions started on a guess, confirmed, and thrown away.
    lookups, lookups_kept
        Of the guesses and of the kept ones, those continued from the sequence's own repeats before any readout.
    p1, p2
        How often the step-0 readout had the final token, and step 1 when step 0 had not; NaN when nothing was guessed.
    """

    passes: int = 0
    lanes: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    guesses: int = 0
    kept: int = 0
    dropped: int = 0
    lookups: int = 0
    lookups_kept: int = 0
    p1: float = math.nan
    p2: float = math.nan


@dataclass
class Generation:
    """One continuation.

    Attributes
    ----------
    text : str
        Without special tokens and without the stop string; empty when the model has no tokenizer.
    token_ids, prompt_token_ids : list of int
        All new ids, a stop token included; and the prompt's.
    logprobs : list of float
        Log probability of each new token under the unfiltered softmax, nats.
    top_logprobs : list of dict or None
        The most likely tokens and their log probabilities, when `logprobs=k` was asked for.
    finish_reason : "stop", "length" or "cancelled"
    exit_steps : list of int
        The 0-based step whose readout gave each token.
    exit_pdf : list of list of float
        Exit distribution of the position each token was read from; NaN behind the exit step, which need not have run.
    token_times : list of float
        Seconds from submission to each token: the first is the time to the first token, waiting included; differences are the times
        between tokens. Tokens of one pass have one time.
    stats : GenerationStats
    cache : ActivationCache or None
        What `generate(..., capture=...)` asked for, at every position that was run: the prompt and all new tokens but the last.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason = "cancelled"
    exit_steps: list[int] = field(default_factory=list)
    exit_pdf: list[list[float]] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    stats: GenerationStats = field(default_factory=GenerationStats)
    cache: ActivationCache | None = field(default=None, repr=False)


class GenerationArguments(TypedDict, total=False):
    """Arguments that `generate`, `stream`, `chat` and `chat_stream` share: type and default of each."""

    n_steps: Annotated[int | None, None]
    exit_at_step: Annotated[int | None, None]
    exit_threshold: Annotated[float | None, None]
    exit_rule: Annotated[ExitRule | None, None]
    weighted_exit: Annotated[bool, False]
    temperature: Annotated[float, 0.0]
    top_k: Annotated[int, 0]
    top_p: Annotated[float, 1.0]
    min_p: Annotated[float, 0.0]
    repetition_penalty: Annotated[float, 1.0]
    stop: Annotated[str | Sequence[str] | None, None]
    eos_token_id: Annotated[int | Sequence[int] | None, None]
    seed: Annotated[int | None, None]
    logprobs: Annotated[int | None, None]
    speculate: Annotated[bool | Literal["auto"], "auto"]
    kv_policy: Annotated[KVPolicy, "full"]
    follow: Annotated[Sequence[int] | None, None]
    edits: Annotated[Sequence[Edit], ()]
    program: Annotated[LoopProgram | None, None]


PARAMETERS = {
    name: Parameter(name, Parameter.KEYWORD_ONLY, default=kind.__metadata__[0], annotation=kind.__origin__)
    for name, kind in get_type_hints(GenerationArguments, include_extras=True).items()
}
AS_GIVEN = ("weighted_exit", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # the core checks and takes these


@dataclass(frozen=True)
class Settings:
    """Checked arguments of a generation, as the engine wants them."""

    max_new_tokens: int
    n_steps: int
    exit_at_step: int
    exit_rule: ExitRule
    weighted_exit: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    seed: int
    n_top: int
    want_top: bool
    speculate: int
    kv_policy: int
    follow: tuple[int, ...]
    edits: tuple[Edit, ...] = ()  # those of a program first
    turns: tuple[Turn, ...] | None = None  # passes of a program that orders steps or layers anew: set by who knows the model


def _whole(name: str, value: Any) -> int:
    """A whole number; a truth value or a fraction is refused by its name."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    return int(value)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids; one alone counts as a list of one."""
    if isinstance(value, int | np.integer):
        return (_whole(name, value),)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}, expected token ids")
    return tuple(_whole(name, i) for i in value)


def settings(
    *, trained_steps: int, default_stop_ids: Sequence[int], max_new_tokens: int, **arguments: Unpack[GenerationArguments]
) -> Settings:
    """Check what contradicts itself; ranges are checked by the core."""
    a: dict[str, Any] = {name: p.default for name, p in PARAMETERS.items()} | dict(arguments)
    asked = ("exit_at_step", "exit_threshold", "exit_rule", "weighted_exit")
    for name in ("n_steps", "exit_at_step", "top_k", "seed", "logprobs"):
        a[name] = None if a[name] is None else _whole(name, a[name])
    named = [name for name in asked if a[name] is not None and a[name] is not False]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} contradict each other: give one of them")
    steps, exit_at_step, rule = trained_steps if a["n_steps"] is None else a["n_steps"], a["exit_at_step"], a["exit_rule"]
    if steps < 1:
        raise ValueError(f"n_steps is {steps}, expected 1 to 64")
    if exit_at_step is not None and not 0 <= exit_at_step < steps:
        raise ValueError(f"exit_at_step is {exit_at_step}, expected 0 to {steps - 1} (0-based, {steps} steps)")
    if a["exit_threshold"] is not None:
        rule = QExit(a["exit_threshold"])
    if rule is not None and not isinstance(rule, ExitRule):
        raise TypeError(f"exit_rule is {rule!r}, expected a rule of ouro.exits")
    if a["speculate"] not in (True, False, "auto"):
        raise ValueError(f"speculate is {a['speculate']!r}, expected True, False or 'auto'")
    if a["kv_policy"] not in KV_POLICIES:
        raise ValueError(f"kv_policy is {a['kv_policy']!r}, expected one of {', '.join(KV_POLICIES)}")
    seed = int.from_bytes(os.urandom(8), "little") if a["seed"] is None else a["seed"]
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1")
    given = checked(a["edits"])
    if not isinstance(a["program"], LoopProgram | None):
        raise TypeError(f"program is {a['program']!r}, expected an ouro.LoopProgram")
    changes = [] if a["program"] is None else a["program"].edits(steps)
    if any(isinstance(edit, Carry) for edit in changes):  # its memory has one row for a position: no guesses beside it
        a["speculate"] = False
    if not isinstance(a["stop"], str | Iterable | None):
        raise TypeError(f"stop is {a['stop']!r}, expected text or a list of texts")
    strings = (a["stop"],) if isinstance(a["stop"], str) else tuple(a["stop"] or ())
    if any(not isinstance(s, str) or not s for s in strings):
        raise ValueError(f"stop is {a['stop']!r}, expected text or a list of texts, none empty")
    eos = default_stop_ids if a["eos_token_id"] is None else a["eos_token_id"]
    follow = () if a["follow"] is None else _ids("follow", a["follow"])
    return Settings(
        max_new_tokens=_whole("max_new_tokens", max_new_tokens), n_steps=steps, exit_at_step=-1 if exit_at_step is None else exit_at_step,
        exit_rule=rule or NO_EXIT, stop=strings, stop_ids=_ids("eos_token_id", eos), seed=seed,
        n_top=a["logprobs"] or 0, want_top=a["logprobs"] is not None, speculate={False: 0, True: 1, "auto": 2}[a["speculate"]],
        kv_policy=KV_POLICIES.index(a["kv_policy"]), follow=follow, edits=(*changes, *given),
        **{name: a[name] for name in AS_GIVEN},
    )  # fmt: skip


Function = TypeVar("Function", bound=Callable[..., Any])


def takes_generation_arguments(function: Function) -> Function:
    """Show the arguments behind `**arguments`, with their defaults, in the signature of a function."""
    own = signature(function)
    before = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    function.__signature__ = own.replace(parameters=[*before, *PARAMETERS.values()])  # type: ignore[attr-defined]
    return function


def refuse_unknown(arguments: Iterable[str]) -> None:
    """TypeError for a name that is no generation argument, with the one that was probably meant."""
    known = [*PARAMETERS, "max_new_tokens", "n"]
    for name in arguments:
        if name not in known:
            raise TypeError(f"unknown generation argument '{name}'{did_you_mean(name, known)}")


class HookGuard:
    """Keeps what a Python hook of one request raises from the other requests of a pass: the request ends with it.

    Attributes
    ----------
    error : Exception or None
        What a hook raised; none is called after that.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def over(self, fwd_hooks: FwdHooks) -> FwdHooks:
        """The same hooks, guarded."""
        return [(where, self._guarded(fn) if callable(fn) else fn) for where, fn in fwd_hooks]

    def _guarded(self, fn: HookFunction) -> HookFunction:
        def call(x: NDArray[np.float32], hook: HookPoint) -> ArrayLike | None:
            try:
                return None if self.error else fn(x, hook)
            except Exception as e:
                self.error = e
                return None

        return call


class Request:
    """One generation on its way: takes the core's events, fills its Generation, collects pieces of certain text.

    Attributes
    ----------
    result : Generation
        What is known so far.
    pieces : list of str
        Text in the order in which it became certain.
    done : bool
    error : BaseException or None
        Why it failed.
    """

    def __init__(self, prompt: list[int], s: Settings, tokenizer: Tokenizer | None, guard: HookGuard | None = None) -> None:
        if s.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this model has none")
        self.settings = s
        self.result = Generation(list(prompt), top_logprobs=[] if s.want_top else None)
        self.pieces: list[str] = []
        self.done = False
        self.error: BaseException | None = None
        self.guard = guard
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True) if tokenizer else None
        self._pending = ""  # text that may be the beginning of a stop string
        self._stopped = False
        self._begin = time.monotonic()

    def take(self, event: tuple[Any, ...]) -> bool:
        """Take one event of the core; True when the core should stop here (a stop string was found, or an error)."""
        _, token, logprob, exit_step, finish, pdf, top_ids, top_logprobs, stats, error = event
        if finish:
            self.result.stats = stats_of(stats)
        if self.done:  # ended here before the core knew
            return False
        try:
            if token >= 0:
                self._take_token(token, logprob, exit_step, pdf, top_ids, top_logprobs)
            if finish and not self._stopped:
                self._release(self._decoder.flush() if self._decoder else "", final=True)
        except Exception as e:  # of the tokenizer: it must not reach other requests
            self.end(error=e)
            return not finish
        if finish:
            self.end("stop" if self._stopped else FINISH.get(finish, "cancelled"), None if self._stopped else error)
        return self._stopped and not finish

    def end(self, reason: FinishReason = "cancelled", error: BaseException | None = None) -> None:
        """Nothing more will come."""
        self.done = True
        self.error = error
        self.result.finish_reason = reason

    def _take_token(
        self, token: int, logprob: float, exit_step: int, pdf: Sequence[float], top_ids: Sequence[int], top_logprobs: Sequence[float]
    ) -> None:
        r = self.result
        if self._stopped:  # decided in the pass in which the core was told to stop
            return
        r.token_ids.append(token)
        r.logprobs.append(logprob)
        r.exit_steps.append(exit_step)
        r.token_times.append(time.monotonic() - self._begin)
        r.exit_pdf.append(list(pdf[: self.settings.n_steps]))
        if r.top_logprobs is not None:
            r.top_logprobs.append(dict(zip(top_ids, top_logprobs, strict=True)))
        self._release(self._decoder.push(token) if self._decoder else "", final=False)

    def _release(self, piece: str, *, final: bool) -> None:
        """Text that is certain to belong to the result now."""
        text = self._pending + piece
        found = [at for at in (text.find(s) for s in self.settings.stop) if at >= 0]
        if found:
            self._stopped = True
            out, self._pending = text[: min(found)], ""
        else:
            keep = 0 if final else self._held(text)
            out, self._pending = text[: len(text) - keep], text[len(text) - keep :]
        self.result.text += out
        if out:
            self.pieces.append(out)

    def _held(self, text: str) -> int:
        """Length of the longest end of text with which a stop string begins."""
        longest = max((len(s) for s in self.settings.stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self.settings.stop):
                return n
        return 0


def stats_of(s: Mapping[str, Any]) -> GenerationStats:
    """The core's counts (csrc/engine/engine.h, ouro_stats) as a `GenerationStats`; what is not counted is 0."""
    counts = {name: s[name] for name in GenerationStats.__dataclass_fields__ if name in s}
    p1, p2 = (s[f"{at}_right"] / s[f"{at}_tried"] if s.get(f"{at}_tried") else math.nan for at in ("first", "second"))
    return GenerationStats(**{**counts, "p1": p1, "p2": p2})
