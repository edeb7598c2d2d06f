"""`ouro bench`: arguments, and the rounds in which candidates take turns."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import ouro
from ouro import _core
from ouro.bench.batched import batched_table, latency_line, latency_text, run_batched
from ouro.bench.candidates import Runner, Task, candidates
from ouro.bench.llama_cpp import VERSION
from ouro.bench.machine import LARGEST_READ, UNITS, peak_rate, processor, read_rates
from ouro.bench.results import Report, Row, pairs_of
from ouro.config import load_config
from ouro.files import check_output, is_directory
from ouro.hub import resolve

COMPUTES = ("float32", "bfloat16", "int8", "int4")
RUNTIMES = ("torch", "llama.cpp")
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp", ".eps")
SHORT = 32  # tokens before decoding "at a short context"


def _list_of(choices: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        wrong = [part for part in found if part not in choices]
        if wrong or not found:
            raise argparse.ArgumentTypeError(f"{text!r} names {wrong or 'nothing'}, expected some of {', '.join(choices)}")
        return found

    return parse


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 1,2,4")
    return found


def picture(text: str) -> Path:
    """A file name whose ending says which picture it is."""
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(PICTURES)}")
    return path


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The options of `ouro bench`."""
    p.add_argument("-m", "--model", default="ouro-tiny", help="packaged name, directory or hub id (default: %(default)s)")
    p.add_argument("--compute", type=_list_of(COMPUTES), default=["bfloat16", "int8", "int4"], metavar="KIND,...",
                   help=f"some of {', '.join(COMPUTES)} (default: bfloat16,int8,int4)")  # fmt: skip
    p.add_argument("--threads", type=int, help="for every candidate (default: all processors allowed)")
    p.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed; 0: none (default: %(default)s)")
    p.add_argument("--new", type=int, default=24, help="tokens decoded for a sample; 0: none (default: %(default)s)")
    p.add_argument("--context", type=_numbers, default=[SHORT], metavar="N,...", help="tokens before those (default: 32); e.g. 32,4096")
    p.add_argument("--rounds", type=int, default=3, help="turns of each candidate (default: %(default)s); 0: show the --log")
    p.add_argument("--seconds", type=float, default=float("inf"), help="start no further sample after so long (default: no limit)")
    p.add_argument("--speculate", action="store_true", help="decode with speculation over steps too")
    p.add_argument("--against", type=_list_of(RUNTIMES), default=[], metavar="torch,llama.cpp",
                   help="peers, in turns with ours; llama.cpp is built once in $OURO_BENCH_CACHE (~/.cache/ouro-bench)")  # fmt: skip
    p.add_argument("--batch", type=_numbers, metavar="N,...",
                   help="instead: so many requests at once, e.g. 1,2,4,8,16; with 1 also its latency beside prompts")  # fmt: skip
    p.add_argument("--exit-threshold", type=float, default=0.5, help="q of Q-exit with --batch (default: %(default)s)")
    p.add_argument("--log", type=Path, metavar="FILE", help="add the JSON line to FILE; its rounds of the same settings count too")
    p.add_argument("--plot", type=picture, metavar="FILE", help="draw the roofline (needs matplotlib)")
    p.add_argument("--json", action="store_true", help="print the JSON line only")
    p.add_argument("--local-files-only", action="store_true", help="never ask the hub")


def tasks_of(a: argparse.Namespace) -> list[Task]:
    """What is measured of each candidate in a turn."""
    found = [Task("prefill", a.prompt)] if a.prompt else []
    if a.new:
        found += [Task("decode", context, a.new) for context in a.context]
        found += [Task("decode", a.context[0], a.new, "speculate")] if a.speculate else []
    return found


def _limits(runner: Runner, threads: int) -> tuple[float, float]:
    return median(read_rates(runner.entry.cost.layer_bytes, threads)), peak_rate(runner.entry.unit, threads)[1]


def _turns(task: Task, runners: list[Runner], rows: list[Row], threads: int) -> None:
    """One sample of a task from each candidate, one directly after the other, limits in between.

    A candidate that reads its own weights between its tokens says itself what a read took.
    """
    for runner, row in zip(runners, rows, strict=True):
        if task.mode == "plain" or runner.entry.runtime == "ouro":
            before = _limits(runner, threads)
            sample = runner.measure(task)
            after = _limits(runner, threads)
            row.add(task.key, sample, (sample.get("read", (before[0] + after[0]) / 2), (before[1] + after[1]) / 2))


def measure(a: argparse.Namespace, directory: Path, threads: int, report: Report) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Fill the report's rows; returns figures of batches and of latency instead when batches were asked for."""
    batched: list[dict[str, Any]] = []
    latency: list[dict[str, Any]] = []
    stop = time.monotonic() + a.seconds
    for compute in a.compute if a.rounds else ():
        with candidates(directory, compute, a.against, threads) as runners:
            if a.batch:
                batched += run_batched(runners, a.batch, a.new, a.rounds, a.exit_threshold)
                if 1 in a.batch:
                    latency.append(latency_line(runners[0], a.new, a.rounds))
                continue
            rows = [Row(runner.entry) for runner in runners]
            for i, task in itertools.product(range(a.rounds), tasks_of(a)):
                if time.monotonic() < stop:
                    print(f"{compute}, round {i + 1} of {a.rounds}: {task.key}", file=sys.stderr, flush=True)
                    _turns(task, runners, rows, threads)
            report.rows += rows
            report.pairs |= pairs_of(rows)
    return batched, latency


def _versions(against: list[str]) -> dict[str, str]:
    found = {"ouro": ouro.__version__}
    if "torch" in against:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found["torch"] = version("torch")
        except PackageNotFoundError:
            found["torch"] = "not installed"
    if "llama.cpp" in against:
        found["llama.cpp"] = f"of llama-cpp-python {VERSION}"
    return found


def new_report(a: argparse.Namespace, directory: Path, threads: int) -> Report:
    """Everything but the rows."""
    c = load_config(directory)
    peaks = {name: dict(zip(("instruction", "rate"), peak_rate(name, threads), strict=True)) for name in UNITS}
    read = max(read_rates(LARGEST_READ, threads))
    machine = {"processor": processor(), "features": _core.cpu_features(), "threads": threads, "read": read, "peak": peaks}
    names = ("n_layers", "n_steps", "d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp", "d_vocab", "n_params")
    model = {"name": directory.name, **{name: getattr(c, name) for name in names}}
    settings = {"prompt": a.prompt, "new": a.new, "context": a.context, "speculate": a.speculate, "threads": threads}
    return Report(machine, model, settings, _versions(a.against), [])


def bench(a: argparse.Namespace) -> None:
    """Limits of this machine, what they allow for a model, what is reached; peers in turns."""
    threads = _core.cpu_count() if a.threads is None else a.threads
    if not 1 <= threads <= 1024 or a.rounds < 0 or a.prompt < 0 or a.new < 0 or not a.seconds > 0 or not tasks_of(a):
        raise ValueError("expected 1 to 1024 threads, rounds, seconds above 0, and a prompt or new tokens to time")
    check_output(a.plot)
    if a.log and is_directory(a.log):
        raise IsADirectoryError(errno.EISDIR, "is a directory, expected a file to write", str(a.log))
    if not a.rounds and (a.batch or not a.log or not a.log.exists()):
        raise ValueError("no rounds to measure: expected --log with the file of earlier runs")
    directory = resolve(a.model, local_files_only=a.local_files_only)
    report = new_report(a, directory, threads)
    batched, latency = measure(a, directory, threads, report)
    if batched:
        line = json.dumps({"schema": "ouro-bench-batch/1", "machine": report.machine, "model": report.model, "versions": report.versions,
                           "rows": batched, "latency": latency})  # fmt: skip
        print(line if a.json else "\n".join([batched_table(batched), "", *map(latency_text, latency), "", line]))
        _append(a.log, line)
        return
    line = report.line()
    if a.log:
        if a.rounds:
            _append(a.log, line)
        report.absorb(a.log)
    if a.plot:
        plot(report, a.plot)
    print(report.line() if a.json else f"{report.table()}\n\n{report.line()}")


def _append(path: Path | None, line: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            log.write(line + "\n")


def plot(report: Report, path: Path) -> None:
    """The picture, and where it is."""
    from ouro.bench.plot import plot_roofline

    plot_roofline(report, path)
    print(f"wrote {path}", file=sys.stderr)
