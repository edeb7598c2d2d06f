"""One candidate in a process of its own: `python -m ouro.bench.worker ouro|torch DIRECTORY COMPUTE THREADS`.

So the memory of a candidate is its own, and none disturbs another while it waits. Requests and answers are JSON lines on
standard input and output; the first line it writes tells the candidate's cost and memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ouro import _core
from ouro.bench.bounds import Cost
from ouro.bench.machine import peak_memory
from ouro.config import ModelConfig
from ouro.errors import OuroError

WARM = 8  # tokens of a first run, which makes threads and touches pages


class Candidate(Protocol):
    """What is measured. Rates are tokens per second."""

    config: ModelConfig
    load_seconds: float

    def cost(self) -> Cost: ...
    def prefill(self, n: int) -> dict[str, float]: ...
    def decode(self, context: int, new: int, speculate: bool) -> dict[str, float]: ...
    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]: ...
    def latency(self, others: int, prompt: int, new: int) -> dict[str, float]: ...


def tokens(config: ModelConfig, n: int, seed: int = 1) -> list[int]:
    """Random ids."""
    return [int(i) for i in np.random.default_rng(seed).integers(min(3, config.d_vocab - 1), config.d_vocab, n)]


class Ouro:
    """This package."""

    def __init__(self, directory: Path, compute: str, threads: int) -> None:
        import ouro

        self.model = ouro.load(directory, compute=compute, threads=threads)  # type: ignore[arg-type]
        self.config, self.load_seconds = self.model.config, self.model.load_seconds

    def cost(self) -> Cost:
        """From the sizes that the core reports."""
        info = self.model.info()
        return Cost.of(self.config, info["layer_bytes"], info["head_bytes"], info["kv_page_bytes"] * self.config.n_steps / 64)

    def prefill(self, n: int) -> dict[str, float]:
        """A prompt of n tokens up to its first new token. Its cache is there before it is timed, as llama.cpp's is."""
        self.model.reserve(n + 1)
        stats = self.model.generate(tokens(self.config, n), max_new_tokens=1, eos_token_id=[], speculate=False).stats
        return {"rate": n / stats.prefill_seconds}

    def decode(self, context: int, new: int, speculate: bool) -> dict[str, float]:
        """`new` greedy tokens behind `context`; the first belongs to the prompt's time."""
        return self._speculate(context, new) if speculate else self._plain(context, new)

    def _speculate(self, context: int, new: int) -> dict[str, float]:
        s = self.model.generate(tokens(self.config, context), max_new_tokens=new + 1, eos_token_id=[], speculate=True).stats
        return {"rate": new / s.decode_seconds, "prefill_rate": context / s.prefill_seconds, "passes": s.passes, "p1": s.p1, "p2": s.p2,
                "cache_bytes": s.cache_bytes}  # fmt: skip

    def _plain(self, context: int, new: int) -> dict[str, float]:
        """Token by token, and before, between and behind them a plain read of the same weights by the same threads: memory that
        others share is slower in one moment than in the next, and then for both."""
        from ouro.engine import MAX_LANES, Engine

        seconds, read, size = 0.0, 0.0, 0
        with Engine(self.model, background=False, prefix_cache_bytes=0, prefill_lanes=MAX_LANES) as engine:
            begin = time.perf_counter()
            handle = engine.submit(tokens(self.config, context), max_new_tokens=new + 1, eos_token_id=[], speculate=False)
            while not handle.generation.token_ids:
                engine.step()
            prefill, passes = time.perf_counter() - begin, engine.stats.passes
            for made in range(1, new + 2):
                nbytes, took = self.model._core.read_weights()
                size, read = size + nbytes, read + took
                begin = time.perf_counter()
                while len(handle.generation.token_ids) == made and not handle.done:
                    engine.step()
                seconds += time.perf_counter() - begin
            stats = engine.stats
        return {"rate": new / seconds, "read": size / read, "prefill_rate": context / prefill, "passes": stats.passes - passes,
                "cache_bytes": handle.generation.stats.cache_bytes}  # fmt: skip

    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]:
        """`requests` prompts at once: tokens per second of all, from when each has its first token until `new` more for each, or
        until one of them ends."""
        from ouro.engine import MAX_LANES, Engine

        options: dict[str, Any] = {"eos_token_id": [], "speculate": mode == "speculate"}
        if mode.startswith("q="):
            options["exit_threshold"] = float(mode[2:])
        most = min(4 * new + 16, self.config.n_ctx - prompt)  # nobody ends while the others are counted, if the context allows it
        with Engine(self.model, background=False, prefix_cache_bytes=0, prefill_lanes=MAX_LANES) as engine:
            prompts = [tokens(self.config, prompt, seed) for seed in range(requests)]
            begin = time.perf_counter()
            handles = [engine.submit(ids, max_new_tokens=most, **options) for ids in prompts]
            made = [handle.generation.token_ids for handle in handles]
            while not all(made):
                engine.step()
            middle, before, passes = time.perf_counter(), sum(map(len, made)), engine.stats.passes
            while sum(map(len, made)) < before + new * requests and not any(handle.done for handle in handles):
                engine.step()
            seconds, count = time.perf_counter() - middle, sum(map(len, made)) - before
            exits = [step for handle in handles for step in handle.generation.exit_steps]
            return {"rate": count / seconds, "mean_steps": 1 + float(np.mean(exits)), "passes": engine.stats.passes - passes,
                    "tokens": count, "prefill_rate": requests * prompt / (middle - begin)}  # fmt: skip

    def latency(self, others: int, prompt: int, new: int) -> dict[str, float]:
        """Seconds between the tokens of one request, alone and while `others` prompts are read beside it."""
        from ouro.engine import Engine

        marks: list[float] = []
        with Engine(self.model, background=False, prefix_cache_bytes=0) as engine:
            one = engine.submit(tokens(self.config, WARM), max_new_tokens=2 * new, eos_token_id=[], speculate=False)
            rest: list[Any] = []
            while not one.done and not (rest and all(handle.done for handle in rest)):
                engine.step()
                if len(one.generation.token_ids) > len(marks):
                    marks.append(time.perf_counter())
                if len(marks) == new and not rest:
                    prompts = [tokens(self.config, prompt, seed) for seed in range(others)]
                    rest = [engine.submit(ids, max_new_tokens=1, eos_token_id=[], speculate=False) for ids in prompts]
        gaps = np.diff(marks)
        alone, beside = gaps[: new - 1], gaps[new - 1 :]
        return {"alone": float(np.median(alone)), "beside": float(np.median(beside)), "longest": float(np.max(beside))}


class Torch:
    """The plain PyTorch forward of `ouro.bench.torch_forward`."""

    def __init__(self, directory: Path, compute: str, threads: int) -> None:
        import torch

        from ouro.bench.torch_forward import Reference

        torch.set_num_threads(threads)
        begin = time.perf_counter()
        self.torch, self.wide = torch, compute == "float32"
        self.model = Reference(directory, torch.float32 if self.wide else torch.bfloat16)
        self.config, self.load_seconds = self.model.config, time.perf_counter() - begin

    def cost(self) -> Cost:
        """Of its dtype, cache included."""
        bits = 32 if self.wide else 16
        return Cost.of_formats(self.config, bits, bits, bits)

    def prefill(self, n: int) -> dict[str, float]:
        """One forward over n tokens."""
        begin = time.perf_counter()
        self.model.step(self.torch.tensor(tokens(self.config, n)))
        return {"rate": n / (time.perf_counter() - begin)}

    def decode(self, context: int, new: int, speculate: bool) -> dict[str, float]:
        """`new` forwards of one token behind `context`."""
        if speculate:
            raise ValueError("PyTorch's forward has no speculation")
        begin = time.perf_counter()
        cache = self.model.step(self.torch.tensor(tokens(self.config, context)))
        middle = time.perf_counter()
        for i in range(new):
            cache = self.model.step(self.torch.tensor([i % self.config.d_vocab]), cache)
        return {"rate": new / (time.perf_counter() - middle), "prefill_rate": context / (middle - begin)}

    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]:
        """Not there."""
        raise ValueError("PyTorch's forward runs one sequence")

    def latency(self, others: int, prompt: int, new: int) -> dict[str, float]:
        """Not there."""
        raise ValueError("PyTorch's forward runs one sequence")


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, and at most so far."""
    return {"resident": _core.resident_memory(), "peak": peak_memory()}


def answer(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request."""
    task = request.pop("task")
    if task == "prefill":
        return dict(candidate.prefill(**request))
    if task == "decode":
        return dict(candidate.decode(**request))
    if task == "batch":
        return dict(candidate.batch(**request))
    return dict(candidate.latency(**request)) if task == "latency" else dict(memory())


def main() -> None:
    """Serve requests until standard input ends; what is wrong is said as the last answer."""
    try:
        serve(*sys.argv[1:])
    except (OuroError, ValueError, OSError, MemoryError, ImportError) as error:
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        sys.exit(1)


def serve(kind: str, directory: str, compute: str, threads: str) -> None:
    """A line for what the candidate is, then one for each request."""
    make = Ouro if kind == "ouro" else Torch
    candidate: Candidate = make(Path(directory), compute, int(threads))
    loaded = memory()
    candidate.decode(WARM, 2, False)
    hello = {"cost": candidate.cost().to_dict(), "load_seconds": candidate.load_seconds, "loaded": loaded}
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(candidate, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
