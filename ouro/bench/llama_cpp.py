"""llama.cpp as a peer: fetched, built and run by the benchmark, in the cache folder.

The sources are those inside the source archive of `llama-cpp-python` on PyPI, of a version fixed here, built for this
processor. Weights are the checkpoint's own (`gguf_file`), quantised by its own tool.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro.bench.errors import PeerError
from ouro.bench.gguf_file import write_gguf
from ouro.bench.machine import peak_memory

VERSION = "0.3.36"  # of llama-cpp-python
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")
CMAKE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
         "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF")  # fmt: skip
BITS = {"BF16": (16.0, 16.0), "Q8_0": (8.5, 8.5), "Q4_0": (4.5, 6.5625)}  # per weight of layers, head (Q6_K in a Q4_0 file)


def cache_folder() -> Path:
    """$OURO_BENCH_CACHE, or ~/.cache/ouro-bench."""
    return Path(os.environ.get("OURO_BENCH_CACHE") or Path.home() / ".cache" / "ouro-bench")


def _run(command: Sequence[object], what: str) -> tuple[str, int]:
    """Standard output of a command and its largest resident size; PeerError with the end of what it said when it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(words, stdout=out, stderr=err)
        except FileNotFoundError:
            raise PeerError(f"{what}: {words[0]} is not installed") from None
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, peak_memory(process.pid))
                time.sleep(0.05)
        finally:
            process.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if process.returncode:
        raise PeerError(f"{what} failed ({' '.join(words)}): {(texts[1] or texts[0]).strip()[-600:]}")
    return texts[0], peak


def _fetch(to: Path) -> Path:
    """The unpacked source archive."""
    folder = to / f"llama_cpp_python-{VERSION}"
    if folder.is_dir():
        return folder
    name = f"llama-cpp-python=={VERSION}"
    print(f"fetching {name} (once)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", to, name]
    _run(pip, "fetching the sources of llama.cpp")
    archive = to / f"{folder.name}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    archive.unlink()
    return folder


@dataclass(frozen=True)
class LlamaCpp:
    """A build: where its programs are."""

    programs: Path

    @classmethod
    def ensure(cls, cache: Path | None = None) -> LlamaCpp:
        """Fetch and build what is not there yet (some minutes, once).

        Raises
        ------
        PeerError
            Saying which part is missing: network, cmake, a C++ compiler.
        """
        cache = cache or cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        source = cache / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        build = source / "build"
        if not all((build / "bin" / name).exists() for name in PROGRAMS):
            source = _fetch(cache) / "vendor" / "llama.cpp"
            print(f"building llama.cpp in {build} (once, some minutes)", file=sys.stderr)
            _run(["cmake", "-S", source, "-B", build, *CMAKE], "configuring llama.cpp")
            jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
            _run(["cmake", "--build", build, "-j", jobs, "--target", *PROGRAMS], "building llama.cpp")
        return cls(build / "bin")

    def weights(self, directory: Path, kind: str, cache: Path | None = None) -> Path:
        """The checkpoint as BF16, Q8_0 or Q4_0 GGUF, made once."""
        folder = (cache or cache_folder()) / "gguf"
        wide = write_gguf(directory, folder / f"{directory.name}-BF16.gguf")
        path = folder / f"{directory.name}-{kind}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            _run([self.programs / "llama-quantize", wide, partial, kind], f"quantising to {kind}")
            os.replace(partial, path)
        return path

    def bench(self, weights: Path, threads: int, prompt: int, new: int, depth: int = 0) -> dict[str, Any]:
        """What llama-bench prints for a prompt, or for `new` tokens behind `depth` others; and the "peak" bytes resident.

        Its own warm-up would run the whole prompt once more; a short prompt before it serves as well.
        """
        what = ["-p", f"16,{prompt}", "-n", "0", "--no-warmup"] if prompt else ["-p", "0", "-n", str(new), "-d", str(depth)]
        command = [self.programs / "llama-bench", "-m", weights, "-t", str(threads), *what, "-r", "1", "-o", "json"]
        text, peak = _run(command, "llama-bench")
        return {**json.loads(text)[-1], "peak": peak}

    def batched(self, weights: Path, threads: int, prompt: int, new: int, requests: Sequence[int]) -> list[dict[str, Any]]:
        """What llama-batched-bench prints, one entry per number of requests."""
        context = max(requests) * (prompt + new) + 64
        command = [self.programs / "llama-batched-bench", "-m", weights, "-t", str(threads), "-tb", str(threads), "-c", str(context),
                   "-npp", str(prompt), "-ntg", str(new), "-npl", ",".join(map(str, requests)), "--output-format", "jsonl"]  # fmt: skip
        lines = _run(command, "llama-batched-bench")[0].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
