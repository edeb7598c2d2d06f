"""Several requests at once: total tokens per second, ours plain, with Q-exit and with speculation, beside llama-batched-bench."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ouro.bench.candidates import Runner, WorkerRunner

PROMPT = 32  # tokens of each prompt
OTHERS, OTHER_PROMPT = 2, 256  # prompts that are read beside a request whose latency is measured


def modes_of(runner: Runner, q: float) -> list[str]:
    """Ways of decoding that a candidate has."""
    return ["plain", f"q={q:g}", "speculate"] if runner.entry.runtime == "ouro" else ["plain"]


def run_batched(runners: Sequence[Runner], requests: Sequence[int], new: int, rounds: int, q: float) -> list[dict[str, Any]]:
    """Samples in turns; one entry per candidate, mode and number of requests."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for _ in range(rounds):
        for count in requests:
            for runner in runners:
                if runner.entry.runtime == "torch":
                    continue
                for mode in modes_of(runner, q):
                    sample = runner.batch(count, PROMPT, new, mode)
                    key = (runner.entry.name, mode, count)
                    entry = found.setdefault(key, {"candidate": key[0], "mode": mode, "requests": count, "rates": []})
                    entry["rates"].append(sample["rate"])
                    if "mean_steps" in sample:
                        entry["mean_steps"] = sample["mean_steps"]
    return [{**entry, "median": median(entry["rates"])} for entry in found.values()]


def latency_line(runner: Runner, new: int, rounds: int) -> dict[str, Any]:
    """Seconds between the tokens of one request, alone and while other prompts are read; ours."""
    assert isinstance(runner, WorkerRunner)
    samples = [runner.latency(OTHERS, OTHER_PROMPT, new) for _ in range(rounds)]
    figures = {key: median(sample[key] for sample in samples) for key in samples[0]}
    return {"candidate": runner.entry.name, "others": OTHERS, "prompt": OTHER_PROMPT, **figures, "samples": samples}


def latency_text(found: dict[str, Any]) -> str:
    """One line for people."""
    return (f"{found['candidate']}: {found['alone'] * 1e3:.0f} ms from token to token alone, {found['beside'] * 1e3:.0f} ms (longest "
            f"{found['longest'] * 1e3:.0f}) while {found['others']} prompts of {found['prompt']} tokens are read")  # fmt: skip


def batched_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per candidate and mode, one column per number of requests."""
    counts = sorted({row["requests"] for row in rows})
    lines = [f"{'all requests, tokens/s':36}" + "".join(f"{count:>9}" for count in counts)]
    for name in dict.fromkeys((row["candidate"], row["mode"]) for row in rows):
        cells = {row["requests"]: row for row in rows if (row["candidate"], row["mode"]) == name}
        line = f"{name[0]} {name[1]}"
        steps = [row["mean_steps"] for row in cells.values() if "mean_steps" in row]
        if name[1].startswith("q=") and steps:
            line += f" ({median(steps):.2f} steps)"
        lines.append(f"{line:36}" + "".join(f"{cells[c]['median']:9.2f}" if c in cells else " " * 9 for c in counts))
    return "\n".join(lines)
