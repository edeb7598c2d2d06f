"""Types of the C extension; tests/test_model.py holds this file against the module."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

def cpu_features() -> str: ...
def cpu_count() -> int: ...
def available_memory() -> int: ...
def resident_memory() -> int: ...
def read_bandwidth(nbytes: int, threads: int, rounds: int, /) -> list[float]: ...
def peak(unit: str, threads: int, rounds: int, /) -> tuple[str, list[float]]: ...
def gumbel(seed: int, stream: int, position: int, token: int, /) -> float: ...
def filter_logits(
    logits: ArrayLike,
    history: ArrayLike,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    min_p: float = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    stream: int = ...,
    position: int = ...,
) -> NDArray[np.float32]: ...
def exit_steps(
    signals: dict[str, NDArray[Any]], kind: str, threshold: float, min_steps: int, delay: int, /
) -> NDArray[np.int32]: ...
def exit_distribution(gate_logit: ArrayLike, /) -> NDArray[np.float32]: ...
def sample(
    logits: ArrayLike,
    history: ArrayLike,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    min_p: float = ...,
    repetition_penalty: float = ...,
    seed: int = ...,
    stream: int = ...,
    position: int = ...,
) -> int: ...

def look_packed(path: str | bytes | PathLike[str], /) -> dict[str, Any]: ...
def open_packed(
    path: str | bytes | PathLike[str], compute: str, isa: str | None, copy: bool, verify: bool, threads: int, /
) -> Model: ...

@final
class Model:
    def __new__(
        cls,
        n_layers: int,
        n_steps: int,
        n_heads: int,
        n_key_value_heads: int,
        d_model: int,
        d_head: int,
        d_mlp: int,
        d_vocab: int,
        n_ctx: int,
        eps: float,
        rope_theta: float,
        tie_word_embeddings: bool,
        compute: str,
        layers: str,
        o: str,
        down: str,
        head: str,
        embed: str,
        isa: str | None = ...,
    ) -> Model: ...
    def put(self, tensor: int, layer: int, dtype: int, row0: int, data: memoryview | bytes, /) -> None: ...
    def weight(self, tensor: int, layer: int, row0: int, n_rows: int, /) -> NDArray[np.float32]: ...
    def put_int4(self, tensor: int, layer: int, scales: NDArray[np.uint16], q: NDArray[np.int8], /) -> None: ...
    def read_weights(self) -> tuple[int, float]: ...
    def finish(self, threads: int, kv_dtype: str, blas: str | None = ..., /) -> None: ...
    def trace(
        self,
        sequences: Sequence[NDArray[np.int32]],
        n_steps: int,
        logits: int,
        max_lanes: int,
        plan: Plan | None = ...,
        program: Sequence[tuple[int, Sequence[int], bool]] | None = ...,
        kept: Kept | None = ...,
        /,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]: ...
    def exit_steps(
        self,
        states: NDArray[np.float32],
        gate_logit: NDArray[np.float32],
        kind: str,
        threshold: float,
        min_steps: int,
        delay: int,
        rule: Callable[[dict[str, Any]], bool] | None,
        /,
    ) -> NDArray[np.int32]: ...
    def readout(self, states: NDArray[np.float32], want_logits: bool, /) -> tuple[Any, ...]: ...
    def save(self, path: str | bytes | PathLike[str], progress: Callable[[int, int], object] | None = ..., /) -> None: ...
    def kept_pages(self) -> int: ...
    def reserve_pages(self, n_positions: int, /) -> int: ...
    def free_pages(self) -> int: ...
    def info(self) -> dict[str, Any]: ...

@final
class Plan:
    def __new__(cls, model: Model) -> Plan: ...
    def capture(
        self, point: int, steps: ArrayLike, layers: ArrayLike, positions: NDArray[np.int32], array: NDArray[Any], /
    ) -> None: ...
    def edit(
        self,
        kind: int,
        point: int,
        steps: ArrayLike,
        layers: ArrayLike,
        heads: ArrayLike | None,
        positions: NDArray[np.int32] | None,
        array: NDArray[np.float32] | None,
        scale: float,
        seed: int,
        /,
    ) -> None: ...
    def call(
        self,
        point: int,
        steps: ArrayLike,
        layers: ArrayLike,
        function: Callable[[NDArray[np.float32], int, int, int, NDArray[np.int64]], NDArray[np.float32] | None],
        /,
    ) -> None: ...

@final
class Engine:
    def __new__(
        cls,
        model: Model,
        max_lanes: int,
        max_cache_bytes: int = ...,
        prefix_cache_bytes: int = ...,
        prefill_lanes: int = ...,
        max_queue: int = ...,
        record: bool = ...,
    ) -> Engine: ...
    def submit(
        self,
        tokens: NDArray[np.int32],
        max_new_tokens: int,
        n_steps: int,
        exit_at_step: int,
        weighted_exit: bool,
        exit_kind: str,
        exit_threshold: float,
        exit_min_steps: int,
        exit_delay: int,
        exit_rule: Callable[[dict[str, Any]], bool] | None,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        stream: int,
        stop_ids: ArrayLike,
        n_top: int,
        speculate: int,
        kv_policy: int = ...,
        follow: ArrayLike = ...,
        plan: Plan | None = ...,
    ) -> int: ...
    def step(self) -> list[tuple[Any, ...]]: ...
    def cancel(self, request: int, /) -> None: ...
    def pending(self) -> int: ...
    def interrupt(self) -> None: ...
    def record(self) -> list[tuple[int, int, int, int, int, int]]: ...
    def stats(self) -> dict[str, Any]: ...

@final
class Kept:
    def __new__(cls, model: Model, positions: int, passes: int) -> Kept: ...

@final
class Forks:
    def __new__(
        cls, model: Model, tokens: NDArray[np.int32], n_steps: int, embeddings: NDArray[np.float32] | None, max_lanes: int
    ) -> Forks: ...
    def states(self) -> NDArray[np.float32]: ...
    def run(
        self, forks: NDArray[np.int32], source: NDArray[np.float32], positions: NDArray[np.int32], max_lanes: int, max_bytes: int, /
    ) -> tuple[NDArray[np.float32], int]: ...
