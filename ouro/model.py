"""`Model`: a loaded checkpoint, ready to be traced and to generate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ouro import _core
from ouro.arrays import keeps_pages
from ouro.cache import ActivationCache
from ouro.capture import CaptureDtype, CapturePlan, Positions, StopAt
from ouro.chat import ChatTemplate, Message
from ouro.checkpoint import Checkpoint
from ouro.checkpoint.schema import core_tensor, expected_shapes
from ouro.config import ModelConfig
from ouro.edits import Edit, FwdHooks, HookFunction
from ouro.engine import MAX_LANES, Engine
from ouro.forward import Forward
from ouro.generation import (
    Generation,
    GenerationArguments,
    Settings,
    refuse_unknown,
    settings,
    takes_generation_arguments,
)
from ouro.hooks import Filter, names_of
from ouro.hub import resolve
from ouro.live_capture import LiveCapture
from ouro.loading import USUAL_HEAD, Compute, Format, KVDtype, Part, load_core
from ouro.loop import LoopProgram
from ouro.loop_generation import generate_in_order
from ouro.packed import save_packed
from ouro.tokenizer import Tokenizer, check_ids
from ouro.trace import Trace

if TYPE_CHECKING:
    from ouro.cache_files import Shards

Tokens = str | Sequence[int] | NDArray[np.integer[Any]]
Batch = Tokens | Sequence[str] | Sequence[Sequence[int]]


class Model:
    """A looped language model. Made by `ouro.load`.

    One model may be used from several Python threads; their calls take turns. Nothing in it changes after loading, and
    all loop controls are arguments of a call.

    Attributes
    ----------
    config : ModelConfig
    tokenizer : Tokenizer or None
        None when the checkpoint has no tokenizer: then texts are refused and token ids are taken.
    compute : str
        How products are done, e.g. "bfloat16" or "float32 (BLAS)".
    path : Path
        The checkpoint directory.
    load_seconds : float
    """

    def __init__(
        self, core: _core.Model, config: ModelConfig, path: Path, compute: str, kv_dtype: str, load_seconds: float
    ) -> None:
        self._core = core
        self.config = config
        self.path = path
        self.compute = compute
        self.kv_dtype = kv_dtype
        self.load_seconds = load_seconds
        self.tokenizer = Tokenizer.from_directory(path)
        self._chat_template: ChatTemplate | None = None
        keeps_pages(self)
        self._hooks: ContextVar[tuple[tuple[Filter, HookFunction], ...]] = ContextVar("hooks", default=())

    def __repr__(self) -> str:
        c = self.config
        return f"Model({self.path.name!r}, {c.n_layers} layers x {c.n_steps} steps, d_model={c.d_model}, compute={self.compute!r})"

    # -- tokens --------------------------------------------------------------------------------------------------

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.path} has no tokenizer.json: give token ids instead of text")
        return self.tokenizer

    def to_tokens(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added in front."""
        return self._need_tokenizer().encode(text)

    def to_string(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of token ids, special tokens included."""
        return self._need_tokenizer().decode([int(i) for i in ids])

    def to_str_tokens(self, x: str | Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Each token as text of its own."""
        ids = self.to_tokens(x) if isinstance(x, str) else [int(i) for i in x]
        return self._need_tokenizer().token_strings(ids)

    def token_names(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        """Each token as text of its own, or its id where the model has no tokenizer: for tables and pictures."""
        return self.to_str_tokens(ids) if self.tokenizer else [str(int(i)) for i in ids]

    def _one(self, x: Any) -> list[int]:
        if isinstance(x, str):
            ids = self.to_tokens(x)
        else:
            a = np.asarray(x)
            if a.size and (a.ndim != 1 or a.dtype.kind not in "iu"):
                raise TypeError(f"expected text or a list of token ids, got {a.dtype} of shape {a.shape}")
            ids = [int(i) for i in a]
        if not ids:
            raise ValueError("a sequence needs at least one token")
        check_ids(ids, self.config.d_vocab)
        return ids

    def _many(self, x: Batch) -> tuple[list[list[int]], bool]:
        """Sequences of ids, and whether x was a batch."""
        if isinstance(x, str):
            return [self._one(x)], False
        if isinstance(x, np.ndarray):
            if x.ndim not in (1, 2):
                raise ValueError(f"token ids have shape {x.shape}, expected [pos] or [batch, pos]")
            return ([self._one(row) for row in x], True) if x.ndim == 2 else ([self._one(x)], False)
        if not isinstance(x, Sequence):
            raise TypeError(f"expected text, token ids or a list of either, got {type(x).__name__}")
        if len(x) == 0:
            raise ValueError("expected text or token ids, got an empty list")
        if all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in x):
            return [self._one(x)], False
        return [self._one(row) for row in x], True

    # -- trace -----------------------------------------------------------------------------------------------------

    def trace(
        self, x: Batch, *, n_steps: int | None = None, logits: Literal["last", "all", "none"] = "last", max_lanes: int = MAX_LANES,
        edits: Sequence[Edit] = (), program: LoopProgram | None = None,
    ) -> Trace:  # fmt: skip
        """One forward, everything by step.

        Parameters
        ----------
        x
            Text, a list of texts, ids, a list of id lists (unequal lengths: a ragged batch without padding effects), or
            an int array [pos] or [batch, pos].
        n_steps
            Recurrent steps to run; the trained number unless given, more is possible (the paper goes to 8).
        logits
            Keep readouts of the last step, of all steps, or none. Entropies and top tokens need none kept.
        max_lanes
            Positions that share a pass; changes memory and speed, never a result.
        edits
            Changes made on the way, in this order (`ouro.edits`).
        program
            Another order of steps and layers (`ouro.LoopProgram`).

        Raises
        ------
        ContextLengthError, MemoryLimitError
            With the numbers, before anything is computed.
        """
        return self._forward(x, n_steps, logits, max_lanes, edits, program).run()

    def _forward(
        self, x: Batch, n_steps: int | None, logits: str, max_lanes: int, edits: Sequence[Edit], program: LoopProgram | None,
        fwd_hooks: FwdHooks = (),
    ) -> Forward:  # fmt: skip
        steps = self.config.n_steps if n_steps is None else n_steps
        hooks = [*self._hooks.get(), *fwd_hooks]
        run = Forward(self, self._many(x)[0], steps, logits, max_lanes, edits=edits, hooks=hooks)
        if program is not None:
            run.follow(program)
        return run

    # -- the microscope ------------------------------------------------------------------------------------------------

    def plan(
        self, x: Batch, names_filter: Filter | None = None, *, pos: Positions = None, steps: Iterable[int] | None = None,
        dtype: CaptureDtype = "float32", n_steps: int | None = None, stop_at: StopAt | None = None,
    ) -> CapturePlan:  # fmt: skip
        """What `run_with_cache` with the same arguments would keep, and how many bytes that is. Nothing is computed.

        Examples
        --------
        >>> import ouro
        >>> ouro.load("ouro-tiny").plan("One day Ann took", ["resid_post", "pattern"], dtype="bfloat16")
        CapturePlan(23.1 KiB as bfloat16: batch=1, pos=5)
            20.0 KiB  resid_post
             3.1 KiB  pattern
        """
        sequences = self._many(x)[0]
        run = self.config.n_steps if n_steps is None else n_steps
        if run < 1:
            raise ValueError(f"n_steps is {run}, expected 1 or more")
        if stop_at is not None:
            if not isinstance(stop_at, (tuple, list)) or len(stop_at) != 2:
                raise TypeError(f"stop_at is {stop_at!r}, expected (step, layer)")
            t, layer = stop_at
            if not (0 <= t < run and 0 <= layer < self.config.n_layers):
                raise IndexError(f"stop_at is {stop_at}, expected (0 to {run - 1}, 0 to {self.config.n_layers - 1})")
        return CapturePlan(self.config, run, [len(s) for s in sequences], names_filter, pos=pos, steps=steps, dtype=dtype, stop_at=stop_at)

    def run_with_cache(
        self, x: Batch, names_filter: Filter | None = None, *, pos: Positions = None, steps: Iterable[int] | None = None,
        dtype: CaptureDtype = "float32", n_steps: int | None = None, stop_at: StopAt | None = None, max_bytes: int | None = None,
        logits: Literal["last", "all", "none"] = "last", max_lanes: int = MAX_LANES, edits: Sequence[Edit] = (),
        program: LoopProgram | None = None, out: ActivationCache | None = None,
    ) -> tuple[NDArray[np.float32] | None, ActivationCache]:  # fmt: skip
        """One forward that keeps activations. Looking never changes a result: states and logits have the bits of `trace`.

        Parameters
        ----------
        x
            As for `trace`.
        names_filter
            What to keep: a name, a short name, a pattern, a function of a name, or a list (see `ouro.hooks`). None keeps
            everything but `attn.hook_result`.
        pos
            Positions to keep: an int, a slice or a list; negative ones count from the end of each sequence.
        steps
            Steps to keep.
        dtype
            "bfloat16" takes half the memory; the cache still gives float32.
        n_steps, logits, max_lanes, edits, program
            As for `trace`. The cache holds what the model went on with, edits included.
        stop_at
            (step, layer): end behind this layer; there are no logits then.
        max_bytes
            Refuse a capture that is larger; half of the free memory unless given.
        out
            A cache of the same plan that is no longer needed: the new one takes over its arrays, whose values change. Memory that
            was written before is many times faster to write than new memory (docs/microscope.md).

        Returns
        -------
        logits : array [batch, pos, d_vocab], [step, batch, pos, d_vocab] with logits="all", or None
        cache : ActivationCache

        Raises
        ------
        KeyError
            For a name that does not exist, with the nearest that do.
        ValueError
            When `out` holds other points, places, shapes or numbers than this run keeps.
        MemoryLimitError
            With the sizes by part, before anything is computed.

        Examples
        --------
        >>> import ouro
        >>> model = ouro.load("ouro-tiny")
        >>> logits, cache = model.run_with_cache("One day Ann took", "blocks.*.hook_resid_post", pos=-1)
        >>> logits.shape, cache.stack("resid_post").shape
        ((1, 5, 896), (4, 4, 1, 1, 128))
        """
        plan = self.plan(x, names_filter, pos=pos, steps=steps, dtype=dtype, n_steps=n_steps, stop_at=stop_at)
        plan.check(plan.nbytes if out is not None and max_bytes is None else max_bytes)
        run = self._forward(x, n_steps, logits, max_lanes, edits, program)
        run.capture, run.out = plan, out
        if stop_at is not None:
            run.stop(stop_at)
        trace = run.run()
        z = trace.logits
        return (z if z is None or logits == "all" else z[0]), run.cache(trace)

    def capture_to(
        self, directory: str | Path, x: Batch, names_filter: Filter | None = None, *, pos: Positions = None,
        steps: Sequence[int] | None = None, dtype: CaptureDtype = "float32", n_steps: int | None = None, edits: Sequence[Edit] = (),
        shard_bytes: int = 256 << 20, resume: bool = True, progress: bool = True,
    ) -> Shards:  # fmt: skip
        """Activations of many texts, to files: shards of at most about `shard_bytes`, in the order of the texts.

        A shard appears whole or not at all, so a capture that was stopped or killed goes on where it was when it is called
        again with the same arguments.

        Parameters
        ----------
        directory
            Made when it does not exist. `ouro.open_shards(directory)` reads it.
        resume
            False writes everything anew.

        Raises
        ------
        ValueError
            When the directory holds shards of another capture.

        Examples
        --------
        >>> import ouro, tempfile
        >>> model = ouro.load("ouro-tiny")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shards = model.capture_to(folder, ["One day", "Bob is the boss"], "state", pos=-1, progress=False)
        ...     shards[0]["state"].shape
        (4, 2, 1, 128)
        """
        from ouro.cache_files import ShardJob

        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}, expected 1 or more")
        run = self._forward(x, n_steps, "none", MAX_LANES, edits, None)
        if run.hooks:
            raise ValueError("capture_to does not go with Python hooks: use edits")
        job = ShardJob(self, run.sequences, names_filter, pos, steps, dtype, run.n_steps, edits, shard_bytes)
        return job.run(Path(directory), resume=resume, progress=progress)

    def run_with_hooks(
        self, x: Batch, fwd_hooks: FwdHooks, *, n_steps: int | None = None, logits: Literal["last", "all"] = "last",
        edits: Sequence[Edit] = (), program: LoopProgram | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """One forward with Python functions called on the way.

        Parameters
        ----------
        fwd_hooks
            Pairs (filter, function). `function(array, hook)` gets `[batch, pos, ...]` of one step and layer (scores and
            patterns `[batch, head, dest_pos, src_pos]`), NaN where a sequence is shorter, with `hook.name, .step, .layer, .pos`.
            What it returns, or what it leaves in the array when it returns None, is what the model goes on with. Hooks at one
            point run in order, after edits; captures see their result. What a function raises comes out of this call.

        Returns
        -------
        logits : array [batch, pos, d_vocab], or [step, batch, pos, d_vocab] with logits="all"

        Examples
        --------
        >>> import ouro
        >>> model = ouro.load("ouro-tiny")
        >>> def no_attention(x, hook):
        ...     return 0 * x
        >>> model.run_with_hooks("One day", [("steps.3.blocks.*.hook_attn_out", no_attention)]).shape
        (1, 3, 896)
        """
        z = self._forward(x, n_steps, logits, MAX_LANES, edits, program, fwd_hooks).run().logits
        assert z is not None
        return z if logits == "all" else z[0]

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks) -> Iterator[Model]:
        """`with model.hooks([(filter, function)]):` every forward inside calls the functions (see `run_with_hooks`)."""
        before = self._hooks.set((*self._hooks.get(), *fwd_hooks))
        try:
            yield self
        finally:
            self._hooks.reset(before)

    # -- generation --------------------------------------------------------------------------------------------------

    def _settings(self, *, chat: bool, arguments: Mapping[str, Any]) -> Settings:
        refuse_unknown(arguments)
        stop_ids = self.tokenizer.stop_ids(chat=chat) if self.tokenizer else []
        s = settings(trained_steps=self.config.n_steps, default_stop_ids=stop_ids, **arguments)
        program: LoopProgram | None = arguments.get("program")
        if program is None or not program.reorders:
            return s
        return replace(s, turns=tuple(program.turns(s.n_steps, self.config.n_layers)))

    @overload
    def generate(
        self, prompt: Tokens, *, max_new_tokens: int = ..., n: Literal[1] = ..., capture: Filter | None = ...,
        **arguments: Unpack[GenerationArguments],
    ) -> Generation: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: Batch, *, max_new_tokens: int = ..., n: int = ..., capture: Filter | None = ...,
        **arguments: Unpack[GenerationArguments],
    ) -> Generation | list[Any]: ...  # fmt: skip
    @takes_generation_arguments
    def generate(
        self, prompt: Batch, *, max_new_tokens: int = 128, n: int = 1, capture: Filter | None = None,
        **arguments: Unpack[GenerationArguments],
    ) -> Generation | list[Any]:  # fmt: skip
        """Continue a prompt, or each prompt of a list.

        Parameters
        ----------
        prompt
            Text or ids; a list of texts or of id lists gives a list of results.
        max_new_tokens, n
            Most tokens to add; samples per prompt (n > 1 gives a list per prompt).
        n_steps, exit_at_step, exit_threshold, exit_rule, weighted_exit
            Loop controls. `n_steps` runs another depth; of the others at most one: the 0-based step every token leaves
            after (deeper steps never run), the q of Q-exit, a rule of `ouro.exits`, or logits averaged over steps.
        temperature, top_k, top_p, min_p, repetition_penalty, seed
            Greedy unless a temperature is given. Noise depends on (seed, sample number, position) only.
        stop, eos_token_id
            Texts, and ids, that end a generation; `eos_token_id=[]` never stops on a token.
        logprobs
            k: report the k most likely tokens at each place.
        speculate
            Guess ahead from early readouts: "auto" (default), True or False. Never changes a result.
        kv_policy
            Which keys and values a new token leaves to later ones: "full" (those of every step, the default and exact), or
            an approximation that keeps those of one step ("last_step", "average", "first_step": a quarter of the memory
            at four steps) or lets the exit step stand in for deeper ones ("last_exited"). The prompt always runs in
            full. See docs/cache-policies.md.
        follow
            Token ids to take one by one instead of choosing; log probabilities and exits are those at these tokens. What a
            setting would have thought of a given text.
        edits
            Changes made on the way (`ouro.edits`), to the prompt and to new tokens; negative positions count from the end of
            the prompt. Exit and speculation see the changed model and stay exact.
        program
            Another order of steps and layers (`ouro.LoopProgram`). What consists of edits (`skip_step`, `freeze_attention`,
            `replace_state`, `noise`, `steps_per_position`) runs as all else, without speculation where a step reads another.
            `repeat_step`, `swap_steps` and `layers` run one sequence at a time, each new token through the passes of the program,
            without early exit.
        capture
            What to keep (see `run_with_cache`), in `cache` of each result: every position that was run, at every step, also
            the deeper ones of tokens that left early. It is a second forward over the final sequence, which has the same
            bits; it takes about as long as reading the sequence once. Under another `kv_policy`, and with Python hooks, a second
            run would not be the first again: there the generation's own lanes write, speculation is off, and what never ran is NaN.

        Returns
        -------
        Generation, or a list
        """
        s = self._settings(chat=False, arguments={"max_new_tokens": max_new_tokens, **arguments})
        if capture is not None:
            names_of(self.config, s.n_steps).select(capture)
        live = capture is not None and (s.kv_policy != 0 or bool(self._hooks.get()))
        results = self._run(prompt, n, s, capture if live else None)
        for result in results if capture is not None and not live else ():
            result.cache = self._capture(result, capture, s)
        _, batch = self._many(prompt)
        per_prompt: list[Any] = [results[i : i + n] if n > 1 else results[i] for i in range(0, len(results), n)]
        return per_prompt if batch else per_prompt[0]

    def _capture(self, made: Generation, capture: Filter | None, s: Settings) -> ActivationCache:
        """A forward over all that was run. By the one answer these are the bits the generation had."""
        ids = (made.prompt_token_ids + made.token_ids)[: len(made.prompt_token_ids) + max(len(made.token_ids) - 1, 0)]
        steps = s.exit_at_step + 1 if s.exit_at_step >= 0 else s.n_steps
        n = len(made.prompt_token_ids)
        run = Forward(self, [ids], steps, "none", edits=s.edits, span=(n, n + s.max_new_tokens))
        run.turns = None if s.turns is None else list(s.turns)
        run.capture = CapturePlan(self.config, steps, [len(ids)], capture)
        run.capture.check()
        return run.cache(run.run())

    def _run(self, prompt: Batch, n: int, s: Settings, capture: Filter | None = None) -> list[Generation]:
        """All samples of all prompts, in order, by an engine that this thread steps; with `capture` it sees them as they run."""
        if n < 1:
            raise ValueError(f"n is {n}, expected 1 or more")
        prompts = [ids for ids in self._many(prompt)[0] for _ in range(n)]
        shared = None if len(prompts) > 1 else 0  # beginnings in common; all that counts is when the last one ends
        live: list[LiveCapture | None] = [None] * len(prompts)
        if capture is not None:
            depth, s = s.exit_at_step + 1 if s.exit_at_step >= 0 else s.n_steps, replace(s, speculate=0)
            live = [LiveCapture(self, capture, depth, len(ids) + s.max_new_tokens - 1) for ids in prompts]
        if s.turns is not None:
            results = [generate_in_order(self, ids, s, self._hooks.get(), i % n, live[i]) for i, ids in enumerate(prompts)]
            return self._with_caches(results, live)
        with Engine(self, background=False, prefix_cache_bytes=shared, prefill_lanes=MAX_LANES) as engine:
            handles = [engine._submit(ids, s, i % n, self._hooks.get(), live[i]) for i, ids in enumerate(prompts)]
            results = [handle.result() for handle in handles]
        return self._with_caches(results, live)

    @staticmethod
    def _with_caches(results: list[Generation], live: list[LiveCapture | None]) -> list[Generation]:
        for result, kept in zip(results, live, strict=True):
            result.cache = None if kept is None else kept.cache(result)
        return results

    def _stream(self, ids: list[int], s: Settings) -> Iterator[str]:
        """Pieces of text of one prompt; what is wrong with it is raised at once."""
        engine = Engine(self, background=False, prefix_cache_bytes=0)
        handle = engine._submit(ids, s, 0, self._hooks.get())

        def pieces() -> Iterator[str]:
            with engine:
                yield from handle

        return pieces()

    @takes_generation_arguments
    def stream(self, prompt: Tokens, *, max_new_tokens: int = 128, **arguments: Unpack[GenerationArguments]) -> Iterator[str]:
        """`generate` for one prompt, giving pieces of text that are whole characters as they come."""
        return self._stream(self._one(prompt), self._settings(chat=False, arguments={"max_new_tokens": max_new_tokens, **arguments}))

    def chat_prompt(self, messages: Sequence[Message], *, enable_thinking: bool | None = None) -> str:
        """The text a conversation becomes, with the assistant's turn open."""
        if self._chat_template is None:
            self._chat_template = ChatTemplate.from_directory(self.path)
        if self._chat_template is None:
            raise ValueError(f"{self.path} has no chat template")
        return self._chat_template.render(messages, enable_thinking=enable_thinking)

    @takes_generation_arguments
    def chat(self, messages: Sequence[Message], *, enable_thinking: bool | None = None, max_new_tokens: int = 512,
             **arguments: Unpack[GenerationArguments]) -> Generation:  # fmt: skip
        """The assistant's next turn; stops at `<|im_end|>`. Arguments as in `generate`."""
        s = self._settings(chat=True, arguments={"max_new_tokens": max_new_tokens, **arguments})
        return self._run(self.chat_prompt(messages, enable_thinking=enable_thinking), 1, s)[0]

    @takes_generation_arguments
    def chat_stream(self, messages: Sequence[Message], *, enable_thinking: bool | None = None, max_new_tokens: int = 512,
                    **arguments: Unpack[GenerationArguments]) -> Iterator[str]:  # fmt: skip
        """`chat`, giving pieces of text as they come."""
        s = self._settings(chat=True, arguments={"max_new_tokens": max_new_tokens, **arguments})
        return self._stream(self.to_tokens(self.chat_prompt(messages, enable_thinking=enable_thinking)), s)

    def weight(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """A tensor of the checkpoint as the model multiplies with it, dequantised.

        Parameters
        ----------
        name
            As in the checkpoint, e.g. "model.layers.0.self_attn.q_proj.weight" or "lm_head.weight" (the embedding when tied).
        rows
            Only these rows; of a matrix, with step 1.

        Returns
        -------
        array [rows, cols] or [cols], float32

        Raises
        ------
        KeyError
            For a name that the model has not; names near matches.
        """
        shapes = expected_shapes(self.config)
        shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, 3)
            raise KeyError(f"no tensor {name!r}{f'; near: {near}' if near else ''}")
        shape = shapes[name]
        begin, end, step = (rows or slice(None)).indices(shape[0] if len(shape) == 2 else 1)
        if step != 1:
            raise ValueError(f"rows are {rows}, expected a slice with step 1")
        found = self._core.weight(*core_tensor(name), begin, max(end - begin, 0))
        return found if len(shape) == 2 else found[0]

    def save_packed(self, directory: str | Path) -> None:
        """Write a packed model: a new directory that `ouro.load` opens in well under a second (docs/format.md).

        It holds the weights in the formats of this model, its config, tokenizer and chat template, and appears when it is
        complete. The weights file in it, `model.ouro`, is also what C programs read (csrc/include/ouro.h).

        Raises
        ------
        FileExistsError, OSError
            When something is there already, or the directory can not be written.
        """
        save_packed(self._core, self.path, Path(directory))

    def reserve(self, n_tokens: int) -> int:
        """Make and touch the key/value pages of `n_tokens` positions now, so that the next prompt does not wait for new memory.

        The system has to find and clear memory that is used for the first time, and a virtual machine may have to ask its host
        for it (docs/speed.md, "First touch"). Pages are kept as those of a finished call are: at most 1 GiB, until `free_pages`.

        Returns
        -------
        int
            Bytes of the pages that are kept now.

        Raises
        ------
        MemoryError
            When the machine has less memory than that.
        ValueError
            For fewer than no tokens.
        """
        return self._core.reserve_pages(n_tokens)

    def free_pages(self) -> int:
        """Give back the key/value pages that are kept for the next call, at most 1 GiB; their bytes. `ouro.free_memory` does so
        for every model."""
        return self._core.free_pages()

    def info(self) -> dict[str, Any]:
        """Sizes by part (bytes), kernels, threads and BLAS in use."""
        return self._core.info()


def load(
    path_or_id: str | Path,
    *,
    compute: Compute | None = None,
    formats: Mapping[Part, Format] | None = None,
    calibrate: bool | Sequence[str] | Sequence[Sequence[int]] = False,
    exact: bool = True,
    threads: int | None = None,
    kv_dtype: KVDtype | None = None,
    isa: str | None = None,
    mmap: bool = True,
    verify: bool = True,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    path_or_id
        A packaged model (`"ouro-tiny"`), a directory in the released format or packed by `save_packed`, or a hub id.
    compute
        "bfloat16" (default), "float32" (the reference), "int8" or "int4" (quantised while loading). A packed model has
        its own, and another is refused; only bfloat16 weights also serve float32.
    formats
        With "int8" and "int4": how some parts are stored, where not as usual, e.g. `{"down": "int8", "head": "bfloat16"}`.
        "o" (attention output) and "down" (feed-forward output) are "int8" or "int4", "head" and "embed" "bfloat16" or
        "int8". Unless chosen, both are bfloat16 in int8 (most of its loss would be the head's) and int8 in int4.
    calibrate
        With "int4": texts or id lists, or True for shipped ones, on which the weights are chosen for least error over all
        recurrent steps (`ouro.calibration`). Takes minutes for large models: do it once and `save_packed`.
    exact
        False lets large float32 products go through OpenBLAS: agrees to rounding, and loses the promise that a result
        never depends on batch, threads or chunking.
    threads
        Worker threads; the processors of the affinity mask unless given.
    kv_dtype
        Keys and values: "bfloat16" (default) or "int8"; "float32" with float32 compute.
    isa
        "scalar", "avx2", "avx_vnni", "avx_vnni_vl", "avx512", "neon", "neon_dot" or "neon_i8mm" to force lower kernels; the
        environment variable OURO_ISA does the same.
    mmap, verify
        Of a packed model. The file is used where it is mapped, its pages are shared between processes; `mmap=False` reads
        it into memory with huge pages instead. `verify=False` does not check the checksum of the weights, and so reads
        nothing of them: a file of any size opens at once.
    revision, cache_dir, local_files_only, token
        For hub ids, as in `huggingface_hub.snapshot_download`.

    Raises
    ------
    CheckpointError
        When the checkpoint is missing, damaged or of another model.
    MemoryLimitError
        When the packed weights would not fit.
    """
    path = resolve(path_or_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    quantiser = None
    if calibrate is not False:
        quantiser = partial(_calibrated, path, calibrate, threads)
    made = load_core(path, compute=compute, exact=exact, threads=threads, kv_dtype=kv_dtype, isa=isa, formats=formats,
                     mmap=mmap, verify=verify, quantiser=quantiser)  # fmt: skip
    return Model(made.core, made.config, path, _label(made.core, made.compute, exact), made.kv_dtype, made.seconds)


def _label(core: _core.Model, compute: str, exact: bool) -> str:
    """`Model.compute`: the compute, and what was chosen otherwise."""
    formats = core.info()["formats"]
    notes = [] if exact else ["BLAS"]
    if compute in ("int8", "int4"):
        notes += [f"{part} {formats[part]}" for part in ("o", "down") if formats[part] != formats["layers"]]
        notes += [f"head {formats['head']}"] if formats["head"] != USUAL_HEAD[compute] else []
    return f"{compute} ({', '.join(notes)})" if notes else compute


def _calibrated(
    path: Path, texts: Literal[True] | Sequence[str] | Sequence[Sequence[int]], threads: int | None, checkpoint: Checkpoint,
    parts: Sequence[str],
) -> Iterator[tuple[str, NDArray[np.uint16], NDArray[np.int8]]]:  # fmt: skip
    """`ouro.calibration.calibrated` with a bfloat16 model of the same checkpoint."""
    from ouro.calibration import calibrated
    from ouro.quality import default_inputs

    model = load(path, compute="bfloat16", threads=threads)
    sequences = default_inputs(model, "calibration") if texts is True else model._many(texts)[0]
    return calibrated(checkpoint, model, sequences, parts)
