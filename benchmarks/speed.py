"""Prefill, plain decoding and speculation over steps, side by side in one run.

    python benchmarks/speed.py [--size 1.4b] [--compute bfloat16 int8 int4] [--alpha 0.005 0.02] [--rounds 3] [--torch]

Machines are shared and noisy: candidates take turns within each round, medians are printed, and only ratios of one run mean
anything. `--torch` adds a plain PyTorch forward of the same checkpoint (bf16, needs torch in this environment). Prints a
table and one JSON line. Weights are made once in a cache folder ($OURO_BENCH_CACHE, ~/.cache/ouro-bench).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from make_weights import SHAPES, make

import ouro

CACHE = Path(os.environ.get("OURO_BENCH_CACHE", Path.home() / ".cache" / "ouro-bench"))


def measure(model: ouro.Model, ids: list[int], new: int, *, speculate: bool) -> dict[str, float]:
    """One prompt, `new` greedy tokens."""
    g = model.generate(ids, max_new_tokens=new, eos_token_id=[], speculate=speculate)
    s = g.stats
    return {"decode": (new - 1) / s.decode_seconds, "prefill": len(ids) / s.prefill_seconds, "passes": s.passes, "p1": s.p1, "p2": s.p2}


def passes_per_token(p1: float, p2: float) -> float:
    """What two guesses need: E = p1 + 2 (1 - p1) p2 + 4 (1 - p1) (1 - p2)."""
    return p1 + 2 * (1 - p1) * p2 + 4 * (1 - p1) * (1 - p2)


def run(directory: Path, compute: str, rounds: int, prompt: int, new: int) -> dict[str, float]:
    """Medians over rounds of plain, speculative, prefill, in turns."""
    model = ouro.load(directory, compute=compute)
    rng = np.random.default_rng(1)
    long, short = rng.integers(3, model.config.d_vocab, prompt).tolist(), rng.integers(3, model.config.d_vocab, 32).tolist()
    measure(model, short, 2, speculate=False)
    seen: dict[str, list[float]] = {k: [] for k in ("prefill", "plain", "spec", "ratio")}
    for _ in range(rounds):
        seen["prefill"].append(measure(model, long, 1 + 1, speculate=False)["prefill"])
        plain, spec = (measure(model, short, new, speculate=s) for s in (False, True))
        seen["plain"].append(plain["decode"])
        seen["spec"].append(spec["decode"])
        seen["ratio"].append(spec["decode"] / plain["decode"])
    info, c = model.info(), model.config
    out = {k: statistics.median(v) for k, v in seen.items()}
    read = c.n_steps * info["layer_bytes"] + info["head_bytes"]
    steps = passes_per_token(spec["p1"], spec["p2"] if spec["p2"] == spec["p2"] else 0.0)
    bound = read / (steps * (info["layer_bytes"] + info["head_bytes"]))
    found = {"gb_per_s": out["plain"] * read / 1e9, "p1": spec["p1"], "p2": spec["p2"]}
    return {**out, **found, "bound": bound, "of_bound": out["ratio"] / bound}


def torch_speed(directory: Path, prompt: int) -> dict[str, float]:
    """Prefill and decode of `torch_reference.py` in bf16."""
    import torch
    from torch_reference import Reference

    model = Reference(directory, torch.bfloat16)
    ids = torch.randint(3, model.config.d_vocab, (prompt,))
    model.step(ids[:32])
    begin = time.perf_counter()
    cache = model.step(ids)
    prefill = prompt / (time.perf_counter() - begin)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        cache = model.step(ids[:1], cache)
        times.append(time.perf_counter() - begin)
    return {"prefill": prefill, "plain": 1 / statistics.median(times)}


def main() -> None:
    """Measure what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SHAPES, default="1.4b")
    p.add_argument("--compute", nargs="+", default=["bfloat16", "int8", "int4"])
    p.add_argument("--alpha", nargs="+", type=float, default=[0.005, 0.02])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--new", type=int, default=24)
    p.add_argument("--torch", action="store_true")
    a = p.parse_args()
    print(f"{'compute':10}{'alpha':>7}{'prefill':>9}{'plain':>8}{'GB/s':>7}{'spec':>8}{'ratio':>7}", end="")
    print(f"{'p1':>6}{'p2':>6}{'bound':>7}{'of bound':>9}")
    rows = []
    for alpha in a.alpha:
        directory = make(CACHE / f"{a.size}-{alpha}", a.size, alpha)
        for compute in a.compute:
            r = run(directory, compute, a.rounds, a.prompt, a.new)
            rows.append({"compute": compute, "alpha": alpha, **r})
            print(f"{compute:10}{alpha:7}{r['prefill']:9.1f}{r['plain']:8.2f}{r['gb_per_s']:7.1f}{r['spec']:8.2f}{r['ratio']:7.2f}"
                  f"{r['p1']:6.2f}{r['p2']:6.2f}{r['bound']:7.2f}{r['of_bound']:9.2f}", flush=True)  # fmt: skip
    if a.torch:
        r = torch_speed(CACHE / f"{a.size}-{a.alpha[0]}", a.prompt)
        rows.append({"compute": "torch bf16", **r})
        print(f"{'torch bf16':17}{r['prefill']:9.1f}{r['plain']:8.2f}")
    print(json.dumps({"size": a.size, "threads": ouro._core.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
