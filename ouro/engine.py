"""`Engine`: many requests at once on one model, each with the result it would have alone.

A request's lanes ride in the passes of all others (docs/engine.md has the rules: who starts, who waits, what a pass may
cost, what is kept and what goes first). `Model.generate` is an engine that is stepped by whoever waits for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ouro import _core
from ouro.edits import FwdHooks, Target, add_hooks
from ouro.exits import CustomExit
from ouro.generation import Generation, GenerationArguments, HookGuard, Request, Settings, takes_generation_arguments
from ouro.hooks import names_of
from ouro.schedule import ScheduleLog, describe

if TYPE_CHECKING:
    from ouro.chat import Message
    from ouro.live_capture import LiveCapture
    from ouro.model import Model, Tokens

MAX_LANES = 256  # rows of a pass that chunks of prompts fill up to


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done and holds now.

    Attributes
    ----------
    passes, lanes
        Sweeps over the weights, and rows of work in them.
    running, waiting
        Requests.
    prompt_tokens, prefix_tokens, tokens
        Of requests that have ended: prompt positions, those of them taken from an earlier request, and new tokens.
    guesses, kept, dropped
        Speculative positions started, confirmed, thrown away, of requests that have ended.
    cache_bytes, cache_peak, cache_limit
        Keys and values held, the most ever held, and what is allowed.
    prefix_bytes, prefix_limit
        Of them, kept for prompts to come; and what is allowed.
    """

    passes: int
    lanes: int
    running: int
    waiting: int
    prompt_tokens: int
    prefix_tokens: int
    tokens: int
    guesses: int
    kept: int
    dropped: int
    cache_bytes: int
    cache_peak: int
    cache_limit: int
    prefix_bytes: int
    prefix_limit: int


class _Shared:
    """What the stepping thread, the engine and its handles have in common. Knows neither of the last two, so that an
    engine that nobody holds is collected and its thread ends."""

    def __init__(self, core: _core.Engine, log: ScheduleLog | None) -> None:
        self._core: _core.Engine | None = core
        self.log = log
        self.changed = threading.Condition()  # over everything below
        self.requests: dict[int, Request] = {}  # not done
        self.listeners: set[Callable[[], object]] = set()
        self.closed = False
        self.thread: threading.Thread | None = None
        self.pid = os.getpid()
        self._last = core.stats()

    @property
    def core(self) -> _core.Engine:
        if self._core is None:
            raise RuntimeError("this engine is closed")
        return self._core

    def step(self) -> None:
        """One pass, and what follows from it for the requests."""
        try:
            events = self.core.step()
        except BaseException as error:  # Ctrl-C, or nothing that a request did: all of them end
            with self.changed:
                self._end_all(None if isinstance(error, KeyboardInterrupt) else error)
            raise
        with self.changed:
            if self.log is not None and not self.closed:
                self.log.add_pass(self.core.record(), events)
            for number, request in self.requests.items():
                if request.guard is not None and request.guard.error is not None and not request.done:
                    self.core.cancel(number)
                    request.end(error=request.guard.error)
            for event in events:
                asked = self.requests.get(event[0])
                if asked is None:
                    continue
                if asked.take(event):
                    self.core.cancel(event[0])
                if event[4]:
                    del self.requests[event[0]]
            self.wake()

    def wake(self) -> None:
        """Tell everybody who waits; the lock is held."""
        self.changed.notify_all()
        for listener in tuple(self.listeners):
            listener()

    def serve(self) -> None:
        """The stepping thread."""
        while True:
            with self.changed:
                while not self.closed and not self.requests:
                    self.changed.wait()
                if self.closed:
                    return
            try:
                self.step()
            except BaseException as error:  # also of the log
                with self.changed:
                    self._end_all(error)

    def _end_all(self, error: BaseException | None) -> None:
        for number, request in self.requests.items():
            if self._core is not None:
                self._core.cancel(number)
            if not request.done:
                request.end(error=error)
        self.requests.clear()
        self.wake()

    def close(self) -> None:
        """End everything. In a child after fork the thread and the locks belong to the parent: nothing to do."""
        if self.pid != os.getpid():
            return
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.core.interrupt()
            self.changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()
        with self.changed:
            self._end_all(None)
            # the core drops what was cancelled in its next step, which does not come: its memory goes as a whole
            self._last, self._core = {**self.core.stats(), "running": 0, "waiting": 0}, None
            if self.log is not None:
                self.log.close()

    def stats(self) -> dict[str, Any]:
        core = self._core
        return self._last if core is None else core.stats()


class Handle:
    """A request of an engine. Made by `Engine.submit`; holding it keeps the engine alive, dropping it cancels nothing.

    Iterating gives pieces of text that are whole characters, as they come, and may be done more than once. In a coroutine,
    `async for piece in handle` and `await handle` do the same without blocking.
    """

    def __init__(self, engine: Engine, number: int, request: Request) -> None:
        self._engine = engine
        self._request = request
        self.number = number

    def __repr__(self) -> str:
        state = "running" if not self.done else "failed" if self._request.error else self._request.result.finish_reason
        return f"Handle({self.number}, {len(self._request.result.token_ids)} tokens, {state})"

    @property
    def done(self) -> bool:
        """Ended, by itself, cancelled or failed."""
        return self._request.done

    @property
    def generation(self) -> Generation:
        """What there is so far; it grows."""
        return self._request.result

    def cancel(self) -> None:
        """End the request soon, wherever it is; its result is what it had, with finish_reason "cancelled"."""
        self._engine._cancel(self.number)

    def result(self, timeout: float | None = None) -> Generation:
        """Wait until it is done.

        Raises
        ------
        TimeoutError
            Not done within `timeout` seconds; the request goes on. Ctrl-C does not end it either.
        Exception
            What its own exit rule raised, or why it could not go on.
        """
        self._engine._wait(lambda: self._request.done, timeout)
        return self._outcome()

    def _outcome(self) -> Generation:
        if self._request.error is not None:
            raise self._request.error
        return self._request.result

    def __iter__(self) -> Iterator[str]:
        r, at = self._request, 0
        while True:
            while at < len(r.pieces):
                at += 1
                yield r.pieces[at - 1]
            if r.done and at == len(r.pieces):
                break
            self._engine._wait(lambda seen=at: r.done or len(r.pieces) > seen, None)  # type: ignore[misc]
        self._outcome()

    async def __aiter__(self) -> AsyncIterator[str]:
        r, at = self._request, 0
        async with aclosing(self._engine._changes()) as changes:
            async for _ in changes:
                while at < len(r.pieces):
                    at += 1
                    yield r.pieces[at - 1]
                if r.done and at == len(r.pieces):
                    break
        self._outcome()

    def __await__(self) -> Generator[Any, None, Generation]:
        return self._finished().__await__()

    async def _finished(self) -> Generation:
        async with aclosing(self._engine._changes()) as changes:
            async for _ in changes:
                if self.done:
                    break
        return self._outcome()


class Engine:
    """Requests that share passes over the weights of one model.

    Use it as a context manager, or `close` it: what has not ended is cancelled then.

    Parameters
    ----------
    model : Model
    max_lanes
        Most requests that run at once, and the rows of a pass that chunks of prompts fill up to.
    max_cache_bytes
        Keys and values of all requests; 90 % of the memory that is available now unless given. A request starts when its
        whole length fits, so one that runs never lacks room; one that could never fit is refused by `submit`.
    prefix_cache_bytes
        Part of it kept for prompts that begin like earlier ones; a quarter unless given, 0 keeps nothing.
    prefill_lanes
        Most rows of prompts in a pass in which something decodes: bounds how much a new prompt slows the others down.
    max_queue
        Most requests that wait; `submit` raises `QueueFullError` beyond it. No limit unless given.
    background
        True: a thread of the engine's own steps it. False: whoever waits for a handle does, and `step` may be called.
    log
        A path, or a list to append to: what happened, pass by pass, for people and for `ouro.schedule.replay`.

    Examples
    --------
    >>> import ouro
    >>> model = ouro.load("ouro-tiny")
    >>> with ouro.Engine(model) as engine:
    ...     one, two = engine.submit("One day Ann took", max_new_tokens=8), engine.submit("Bob", max_new_tokens=4)
    ...     print(one.result().text)
     a tiny boat to the forest. Ann
    """

    def __init__(
        self,
        model: Model,
        *,
        max_lanes: int = MAX_LANES,
        max_cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        prefill_lanes: int = 8,
        max_queue: int | None = None,
        background: bool = True,
        log: list[dict[str, Any]] | str | Path | None = None,
    ) -> None:
        for name, value in (("max_cache_bytes", max_cache_bytes), ("max_queue", max_queue), ("prefill_lanes", prefill_lanes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        available = _core.available_memory() + model._core.kept_pages()
        limit = available // 10 * 9 if max_cache_bytes is None else max_cache_bytes
        prefix = limit // 4 if prefix_cache_bytes is None else prefix_cache_bytes
        self.model = model
        core = _core.Engine(model._core, max_lanes, limit, prefix, prefill_lanes, max_queue or 0, log is not None)
        options = {"max_lanes": max_lanes, "max_cache_bytes": limit, "prefix_cache_bytes": prefix,
                   "prefill_lanes": prefill_lanes, "max_queue": max_queue}  # fmt: skip
        self._shared = _Shared(core, None if log is None else ScheduleLog(log, describe(model), options))
        self._close = weakref.finalize(self, _Shared.close, self._shared)  # also when the interpreter ends
        if background:
            self._shared.thread = threading.Thread(target=_Shared.serve, args=(self._shared,), name="ouro-engine", daemon=True)
            self._shared.thread.start()

    def __repr__(self) -> str:
        if self._shared.closed or self._shared.pid != os.getpid():
            return "Engine(closed)"
        s = self.stats
        return f"Engine({self.model.path.name!r}, {s.running} running, {s.waiting} waiting)"

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not ended and stop the thread. Twice is as good as once."""
        self._close()

    @takes_generation_arguments
    def submit(
        self, prompt: Tokens, *, max_new_tokens: int = 128, sample: int = 0, fwd_hooks: FwdHooks = (),
        **arguments: Unpack[GenerationArguments],
    ) -> Handle:  # fmt: skip
        """Queue one prompt; any thread may.

        Parameters
        ----------
        prompt
            Text or ids.
        max_new_tokens, **arguments
            As in `Model.generate`.
        sample
            Which of several samples of one prompt this is: its noise differs from that of the others.
        fwd_hooks
            Python functions called on the way, as in `Model.run_with_hooks`, for this request only and on the thread that steps the
            engine, which waits for them. What one raises ends its request and comes out of the handle; the others go on.

        Raises
        ------
        ValueError, ContextLengthError, MemoryLimitError, QueueFullError
            At once, when the request is wrong or can not be held; other requests do not notice.
        """
        s = self.model._settings(chat=False, arguments={"max_new_tokens": max_new_tokens, **arguments})
        guard = HookGuard()
        return self._submit(self.model._one(prompt), s, sample, guard.over(fwd_hooks), guard=guard)

    @takes_generation_arguments
    def chat(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, max_new_tokens: int = 512,
        **arguments: Unpack[GenerationArguments],
    ) -> Handle:  # fmt: skip
        """Queue the assistant's next turn of a conversation, as `Model.chat`. The turns before it are reused when this engine
        still keeps them."""
        s = self.model._settings(chat=True, arguments={"max_new_tokens": max_new_tokens, **arguments})
        return self._submit(self.model._one(self.model.chat_prompt(messages, enable_thinking=enable_thinking)), s, 0)

    def step(self) -> bool:
        """Run one pass (only with `background=False`); False when nothing is left to do."""
        self._check()
        if self._shared.thread is not None:
            raise RuntimeError("this engine's own thread steps it; make it with background=False to step it yourself")
        if self._shared.requests:
            self._shared.step()
        return bool(self._shared.requests)

    @property
    def stats(self) -> EngineStats:
        """Counts as of the last pass."""
        self._check()
        found: Mapping[str, Any] = self._shared.stats()
        return EngineStats(**{name: found[name] for name in EngineStats.__dataclass_fields__})

    # -- for handles ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._shared.pid != os.getpid():
            raise RuntimeError("this engine was made before fork(), and its thread stayed there; make a new one in the child")

    def _submit(
        self, prompt: list[int], s: Settings, sample: int, fwd_hooks: FwdHooks = (), live: LiveCapture | None = None,
        guard: HookGuard | None = None,
    ) -> Handle:  # fmt: skip
        self._check()
        if s.turns is not None:
            raise ValueError(
                "this program runs steps or layers in another order: lanes of an engine's pass go through the same layers together, so an "
                "engine can not run it; Model.generate does, one sequence at a time"
            )
        if fwd_hooks and self._shared.log is not None:
            raise ValueError("a schedule log can not hold hooks, which could not be replayed: use an engine without a log")
        plan = _plan(self.model, prompt, s, fwd_hooks, live)
        rule, shared = s.exit_rule, self._shared
        request = Request(prompt, s, self.model.tokenizer, guard)
        with shared.changed:
            if shared.closed:
                raise RuntimeError("this engine is closed")
            number = shared.core.submit(
                np.asarray(prompt, np.int32), s.max_new_tokens, s.n_steps, s.exit_at_step, s.weighted_exit, rule.kind,
                rule.threshold, rule.min_steps, rule.delay, rule.rule if isinstance(rule, CustomExit) else None,
                s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed, sample,
                np.asarray(s.stop_ids, np.int32), s.n_top, s.speculate, s.kv_policy,
                np.asarray(s.follow, np.int32), plan,
            )  # fmt: skip
            shared.requests[number] = request
            if shared.log is not None:
                shared.log.add_submit(number, prompt, s, sample)
            shared.changed.notify_all()
        return Handle(self, number, request)

    def _cancel(self, number: int) -> None:
        self._check()
        with self._shared.changed:
            if not self._shared.closed and number in self._shared.requests:
                self._shared.core.cancel(number)

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        """Until `ready`: wait for the thread, or step."""
        if ready():
            return
        self._check()
        shared, end = self._shared, None if timeout is None else time.monotonic() + timeout
        if shared.thread is None:
            while not ready() and (end is None or time.monotonic() < end):
                shared.step()
        else:
            with shared.changed:
                shared.changed.wait_for(ready, timeout)
        if not ready():
            raise TimeoutError(f"not done within {timeout} s")

    async def _changes(self) -> AsyncGenerator[None, None]:
        """Once now, and then whenever something may have changed."""
        self._check()
        if self._shared.thread is None and not self._shared.closed:
            raise RuntimeError("awaiting needs an engine with a thread of its own (background=True)")
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake.set)

        with self._shared.changed:
            self._shared.listeners.add(tell)
        try:
            while True:
                wake.clear()
                yield
                await wake.wait()
        finally:
            with self._shared.changed:
                self._shared.listeners.discard(tell)


def _plan(model: Model, prompt: list[int], s: Settings, fwd_hooks: FwdHooks, live: LiveCapture | None) -> _core.Plan | None:
    """Edits, hooks and captures of one request; negative positions count from the end of the prompt."""
    if not (s.edits or fwd_hooks or live):
        return None
    plan, names = _core.Plan(model._core), names_of(model.config, s.n_steps)
    target = Target(names, [len(prompt)], [len(prompt) + s.max_new_tokens])
    for edit in s.edits:
        edit.add_to(plan, target)
    add_hooks(plan, names, fwd_hooks)
    if live is not None:
        live.add_to(plan)
    return plan
