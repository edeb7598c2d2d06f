"""The candidates of a run, seen from the process that lets them take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ouro.bench.bounds import UNIT, Cost
from ouro.bench.errors import PeerError
from ouro.bench.llama_cpp import BITS, LlamaCpp
from ouro.config import load_config

RIVALS = {"float32": {"torch": "float32"}, "bfloat16": {"torch": "bfloat16", "llama.cpp": "BF16"}, "int8": {"llama.cpp": "Q8_0"},
          "int4": {"llama.cpp": "Q4_0"}}  # fmt: skip
UNIT_OF_GGUF = {"BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int8"}


@dataclass(frozen=True)
class Task:
    """One thing to measure: "prefill" of n tokens, or "decode" of `new` tokens behind n; `mode` "plain" or "speculate"."""

    kind: str
    n: int
    new: int = 0
    mode: str = "plain"

    @property
    def key(self) -> str:
        """Name of the figure, e.g. "decode@32" or "decode@32 speculate"."""
        return f"{self.kind}@{self.n}" + ("" if self.mode == "plain" else f" {self.mode}")


@dataclass
class Entry:
    """What a candidate is, and its memory (bytes)."""

    runtime: str
    compute: str
    unit: str
    cost: Cost
    load_seconds: float | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """E.g. "llama.cpp Q8_0"."""
        return f"{self.runtime} {self.compute}"


class Runner(Protocol):
    """Measures one candidate."""

    entry: Entry

    def measure(self, task: Task) -> dict[str, float]: ...
    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]: ...
    def close(self) -> None: ...


class WorkerRunner:
    """`ouro.bench.worker` in a process of its own, loaded once and idle between turns."""

    def __init__(self, runtime: str, directory: Path, compute: str, threads: int) -> None:
        command = [sys.executable, "-P", "-m", "ouro.bench.worker", runtime, str(directory), compute, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = f"{runtime} {compute}"
        hello = self._read()
        loaded = {"loaded": hello["loaded"]["resident"], "peak_loading": hello["loaded"]["peak"]}
        self.entry = Entry(runtime, compute, UNIT[compute], Cost(**hello["cost"]), hello["load_seconds"], loaded)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended with status {self._process.wait()}; its messages are above")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise PeerError(f"{self._name}: {found['error']}")
        return found

    def _ask(self, task: str, **arguments: Any) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def measure(self, task: Task) -> dict[str, float]:
        """One sample; the entry's memory is brought up to date."""
        if task.kind == "prefill":
            found = self._ask("prefill", n=task.n)
        else:
            found = self._ask("decode", context=task.n, new=task.new, speculate=task.mode == "speculate")
        now = self._ask("memory")
        self.entry.memory |= {"resident": int(now["resident"]), "peak": int(now["peak"])}
        return found

    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]:
        """One sample of several requests at once."""
        return self._ask("batch", requests=requests, prompt=prompt, new=new, mode=mode)

    def latency(self, others: int, prompt: int, new: int) -> dict[str, float]:
        """Seconds between tokens of one request, alone and beside prompts."""
        return self._ask("latency", others=others, prompt=prompt, new=new)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()


class LlamaRunner:
    """llama.cpp's own benchmark programs, started anew for each turn (weights come by mmap from the page cache)."""

    def __init__(self, directory: Path, kind: str, threads: int) -> None:
        self._build = LlamaCpp.ensure()
        self._weights = self._build.weights(directory, kind)
        self._threads = threads
        cost = Cost.of_formats(load_config(directory), *BITS[kind])
        self.entry = Entry("llama.cpp", kind, UNIT_OF_GGUF[kind], cost)

    def measure(self, task: Task) -> dict[str, float]:
        """One sample. A short context counts as none, which is what llama-bench decodes behind."""
        prefill = task.kind == "prefill"
        depth = 0 if prefill or task.n <= 64 else task.n
        found = self._build.bench(self._weights, self._threads, task.n if prefill else 0, task.new, depth)
        self.entry.memory["peak"] = max(self.entry.memory.get("peak", 0), found["peak"])
        return {"rate": found["avg_ts"]}

    def batch(self, requests: int, prompt: int, new: int, mode: str) -> dict[str, float]:
        """One sample of llama-batched-bench."""
        found = self._build.batched(self._weights, self._threads, prompt, new, [requests])[0]
        return {"rate": found["speed_tg"], "prefill_rate": found["speed_pp"]}

    def close(self) -> None:
        """Nothing stays."""


@contextmanager
def candidates(directory: Path, compute: str, against: list[str], threads: int) -> Iterator[list[Runner]]:
    """Our candidate first, then the rivals that could be had; what could not is said on standard error."""
    runners: list[Runner] = []
    try:
        runners.append(WorkerRunner("ouro", directory, compute, threads))
        for runtime in against:
            kind = RIVALS[compute].get(runtime)
            if kind is None:
                continue
            try:
                rival = LlamaRunner(directory, kind, threads) if runtime == "llama.cpp" else WorkerRunner(runtime, directory, kind, threads)
                runners.append(rival)
            except PeerError as error:
                print(f"ouro bench: without {runtime} {kind}: {error}", file=sys.stderr)
        yield runners
    finally:
        for runner in runners:
            runner.close()
