"""Early exit: passes and time per token against the mean exit step.

    python benchmarks/exits.py [MODEL ...] [--compute bfloat16] [--q 0.3 0.5 0.7 0.9 1.0] [--new 32] [--rounds 3] [--speculate]

MODEL is a directory or a packaged name (default: ouro-tiny). Plain decoding without an exit rule takes turns with each threshold;
ratios are taken within a round. `ideal` is the mean number of steps that the readouts needed, what a decoder without any loss would
pay per token; the released code runs all steps and selects afterwards, so it pays n_steps whatever leaves early. Times, and the
ideal beside them, count from token n_steps on, when the prompt has run all its steps. The exit steps are compared with those of a
trace of the finished text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import numpy as np

import ouro


def seconds_behind(made: ouro.Generation, n: int) -> float:
    """From token n to the last. In the passes before it the prompt's many rows may still be at deeper steps."""
    return made.token_times[-1] - made.token_times[n - 1]


def run(
    name: str, compute: Any, thresholds: list[float], new: int, rounds: int, threads: int | None, speculate: bool
) -> list[dict[str, Any]]:
    """One row per threshold."""
    model = ouro.load(name, compute=compute, threads=threads)
    if model.tokenizer:
        prompt = model.to_tokens("One day Ann took")
    else:
        prompt = np.random.default_rng(1).integers(3, model.config.d_vocab, 32).tolist()
    same: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": []}
    model.generate(prompt, max_new_tokens=2)
    n = model.config.n_steps
    seen: dict[float, list[float]] = {q: [] for q in thresholds}
    speed: dict[float, list[float]] = {q: [] for q in thresholds}
    rows: dict[float, dict[str, Any]] = {}
    for _ in range(rounds):
        base = model.generate(prompt, speculate=False, **same)
        for q in thresholds:
            made = model.generate(prompt, exit_threshold=q, speculate=speculate, **same)
            speed[q].append((new - n) / seconds_behind(made, n))
            seen[q].append(seconds_behind(base, n) / seconds_behind(made, n))
            ideal = float(np.mean(made.exit_steps[1:])) + 1
            rows[q] = {"q": q, "ideal": ideal, "timed": float(np.mean(made.exit_steps[n:])) + 1,
                       "passes": (made.stats.passes - made.exit_steps[0] - 1) / (new - 1), "made": made}  # fmt: skip
    for row in rows.values():
        made = row.pop("made")
        steps = model.trace(prompt + made.token_ids[:-1], logits="none").exit_step(row["q"])[0, len(prompt) - 1 :]
        row["same_steps"] = bool((steps == made.exit_steps).all())
    return [{"model": model.path.name, **row, "released": n, "tokens_per_s": statistics.median(speed[q]),
             "ratio": statistics.median(seen[q]), "ideal_ratio": n / row["timed"]} for q, row in rows.items()]  # fmt: skip


def main() -> None:
    """A table and one JSON line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="*", default=["ouro-tiny"])
    p.add_argument("--compute", default="bfloat16")
    p.add_argument("--q", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.9, 1.0])
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int)
    p.add_argument("--speculate", action="store_true", help="speculation over steps on top")
    a = p.parse_args()
    rows = []
    print("| model | q | mean steps (ideal) | passes per token | released code | tokens/s | faster than all steps | ideal | exit steps |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in a.model:
        for r in run(name, a.compute, a.q, a.new, a.rounds, a.threads, a.speculate):
            rows.append(r)
            print(f"| {r['model']} | {r['q']:g} | {r['ideal']:.2f} | {r['passes']:.2f} | {r['released']} | {r['tokens_per_s']:.2f} | "
                  f"{r['ratio']:.2f} | {r['ideal_ratio']:.2f} | {'as traced' if r['same_steps'] else 'differ'} |", flush=True)  # fmt: skip
    print(json.dumps({"compute": a.compute, "new": a.new, "rows": rows}))


if __name__ == "__main__":
    main()
