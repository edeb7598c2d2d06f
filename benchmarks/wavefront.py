"""Speculation over steps against plain decoding: the speed-up at each acceptance, beside what the bytes allow.

    python benchmarks/wavefront.py [--alpha 0.1 0.02 0.005] [--compute bfloat16 int8 int4] [--new 32] [--rounds 3] [--repeat] [--log FILE]
    python benchmarks/wavefront.py --log FILE --plot docs/wavefront.png

Random weights of the 1.4B shape; `--alpha` sets how often an early readout already has the final token (make_weights.py). Within
a round plain, `speculate=True` and `speculate="auto"` take turns; ratios are taken within a round and their medians printed.
The bound counts bytes: plain decoding reads n_steps sweeps of the layers and one head for a token, speculation E sweeps and E heads,
E = p1 + 2 (1 - p1) p2 + 4 (1 - p1)(1 - p2), with the p1 and p2 of the same run. `--repeat` makes a text that repeats eight
tokens and goes on so (`follow=`), so that every guess is right: `lookups` is how many guesses per token came from repeats, `kept`
how many of them were right.
Runs are appended to `--log` as JSON lines, so that a long comparison can be made of short runs; with `--plot` the log is drawn and
nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from make_weights import make

import ouro

CACHE = Path(os.environ.get("OURO_BENCH_CACHE", Path.home() / ".cache" / "ouro-bench"))
MODES: dict[str, Any] = {"plain": False, "spec": True, "auto": "auto"}


def passes_per_token(p1: float, p2: float) -> float:
    """E of two guesses; a p2 that nothing was measured for counts as 0."""
    p2 = 0.0 if p2 != p2 else p2
    return p1 + 2 * (1 - p1) * p2 + 4 * (1 - p1) * (1 - p2)


def byte_bound(info: dict[str, Any], n_steps: int, passes: float) -> float:
    """Largest speed-up when only bytes cost time."""
    layers, head = info["layer_bytes"], info["head_bytes"]
    return (n_steps * layers + head) / (passes * (layers + head))


def measure(directory: Path, compute: Any, prompt: int, new: int, rounds: int, repeat: bool, seed: int = 1) -> dict[str, float]:
    """Medians over rounds for one checkpoint and compute mode."""
    model = ouro.load(directory, compute=compute)
    ids = np.random.default_rng(seed).integers(3, model.config.d_vocab, 8 if repeat else prompt).tolist() * (prompt // 8 if repeat else 1)
    follow = (ids[:8] * new)[:new] if repeat else None
    model.generate(ids, max_new_tokens=2, eos_token_id=[])
    seen: dict[str, list[float]] = {"plain": [], "spec": [], "auto": [], "spec_ratio": [], "auto_ratio": []}
    for _ in range(rounds):
        speed, tokens = {}, set()
        for mode, speculate in MODES.items():
            made = model.generate(ids, max_new_tokens=new, eos_token_id=[], speculate=speculate, follow=follow)
            tokens.add(tuple(made.token_ids))
            speed[mode] = (new - 1) / made.stats.decode_seconds
            seen[mode].append(speed[mode])
            if mode == "spec":
                stats = made.stats
        assert len(tokens) == 1, "speculation changed the tokens"
        for mode in ("spec", "auto"):
            seen[f"{mode}_ratio"].append(speed[mode] / speed["plain"])
    passes = passes_per_token(stats.p1, stats.p2)
    out = {k: statistics.median(v) for k, v in seen.items()}
    bound = byte_bound(model.info(), model.config.n_steps, passes)
    return {**out, "p1": stats.p1, "p2": stats.p2, "passes": stats.passes / new, "lanes": stats.lanes / stats.passes,
            "lookups": stats.lookups / new, "lookups_kept": stats.lookups_kept / new,
            "bound": bound, "of_bound": out["spec_ratio"] / bound}  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up against p1, one line per compute mode; the bound of each run as a dash above it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for compute, marker in (("bfloat16", "o"), ("int8", "s"), ("int4", "^")):
        of = sorted((r for r in rows if r["compute"] == compute), key=lambda r: r["p1"])
        if not of:
            continue
        p1 = [r["p1"] for r in of]
        (line,) = ax.plot(p1, [r["spec_ratio"] for r in of], marker=marker, label=f"{compute}, speculate=True")
        ax.plot(p1, [r["auto_ratio"] for r in of], marker=marker, mfc="none", ls=":", color=line.get_color(), label=f'{compute}, "auto"')
        ax.plot(p1, [r["bound"] for r in of], ls="none", marker="_", ms=14, color=line.get_color())
    ax.plot([], [], ls="none", marker="_", ms=14, color="grey", label="byte bound of the run")
    ax.axhline(1, color="grey", lw=0.8)
    ax.set(xlabel="p1: the step-0 readout already has the final token", ylabel="speed-up over plain decoding", xlim=(0, 1))
    ax.set_ylim(bottom=0.5)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, or draw what was measured."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="1.4b")
    p.add_argument("--alpha", nargs="+", type=float, default=[0.1, 0.02, 0.005])
    p.add_argument("--compute", nargs="+", default=["bfloat16", "int8", "int4"])
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--repeat", action="store_true", help="a text that repeats itself")
    p.add_argument("--log", type=Path)
    p.add_argument("--plot", type=Path)
    a = p.parse_args()
    if a.plot:
        plot([json.loads(line) for line in a.log.read_text().splitlines()], a.plot)
        return
    print("compute   alpha     p1     p2 passes  lanes  plain   spec   auto | of plain  bound  share | auto/plain lookups   kept")
    for alpha in a.alpha:
        directory = make(CACHE / f"{a.size}-{alpha:g}", a.size, alpha)
        for compute in a.compute:
            r = measure(directory, compute, a.prompt, a.new, a.rounds, a.repeat)
            columns = [r[k] for k in ("p1", "p2", "passes", "lanes", "plain", "spec", "auto")]
            print(f"{compute:9}{alpha:6g}" + "".join(f"{x:7.2f}" for x in columns)
                  + f" |{r['spec_ratio']:10.2f}{r['bound']:7.2f}{r['of_bound']:7.2f} |{r['auto_ratio']:10.2f}"
                  + f"{r['lookups']:8.2f}{r['lookups_kept']:7.2f}", flush=True)  # fmt: skip
            if a.log:
                with a.log.open("a") as out:
                    out.write(json.dumps({"compute": compute, "alpha": alpha, "new": a.new, "rounds": a.rounds, **r}) + "\n")


if __name__ == "__main__":
    main()
