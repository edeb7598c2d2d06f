"""A patching sweep against the naive loop: one whole run with an edit for each place.

    python benchmarks/sweep.py [--size 1.4b] [--tokens 32] [--compute bfloat16] [--layers 0 8 16 23] [--naive 6] [--rounds 2]

Both do the same thing (tests/test_patching.py: the same bits). The naive loop is timed on a few places spread over the grid and
scaled; the two take turns. The work of the whole grid of (step, layer, position) follows from the schedule alone and is printed
in whole forwards. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from make_weights import SHAPES, make

import ouro
from ouro.edits import Swap
from ouro.patching import sweep

CACHE = Path(os.environ.get("OURO_BENCH_CACHE", Path.home() / ".cache" / "ouro-bench"))


def full_grid(steps: int, layers: int, tokens: int) -> float:
    """Forwards that a sweep over every (step, layer, position) of a residual takes, the base run included."""
    places = itertools.product(range(steps), range(layers), range(tokens))
    lane_layers = sum((tokens - p) * (steps * layers - (s * layers + i)) for s, i, p in places)
    return 1 + lane_layers / (steps * layers * tokens)


def main() -> None:
    """Measure what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SHAPES, default="1.4b")
    p.add_argument("--alpha", type=float, default=0.005)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--compute", default="bfloat16")
    p.add_argument("--layers", nargs="+", type=int, default=[0, 8, 16, 23])
    p.add_argument("--naive", type=int, default=6, help="places at which the naive loop is timed")
    p.add_argument("--rounds", type=int, default=2)
    a = p.parse_args()
    model = ouro.load(make(CACHE / f"{a.size}-{a.alpha}", a.size, a.alpha), compute=a.compute)
    c, rng = model.config, np.random.default_rng(0)
    clean, corrupted = (rng.integers(3, c.d_vocab, a.tokens).tolist() for _ in range(2))
    _, cache = model.run_with_cache(clean, "resid_pre", logits="none")
    places = [(s, i, q) for s in range(c.n_steps) for i in a.layers for q in range(a.tokens)]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, a.naive).astype(int)]
    swept, naive = [], []
    for _ in range(a.rounds):
        begin = time.perf_counter()
        found = sweep(model, cache, corrupted, 5, layers=a.layers, progress=False)
        swept.append((time.perf_counter() - begin) / len(places))
        begin = time.perf_counter()
        for step, layer, pos in chosen:
            edit = Swap("resid_pre", cache, steps=[step], layers=[layer], pos=[pos])
            model.trace(corrupted, edits=[edit], logits="last")
        naive.append((time.perf_counter() - begin) / len(chosen))
    one, each = statistics.median(swept), statistics.median(naive)
    whole = c.n_steps * c.n_layers * a.tokens
    row = {
        "size": a.size, "compute": a.compute, "tokens": a.tokens, "variants": len(places), "forwards": found.attrs["forwards"],
        "seconds_per_variant": one, "naive_seconds_per_variant": each, "times_faster": each / one, "full_grid_variants": whole,
        "full_grid_forwards": full_grid(c.n_steps, c.n_layers, a.tokens),
    }  # fmt: skip
    print(f"{len(places)} of {whole} places: {found.attrs['forwards']:.0f} forwards of work; naive {len(places)}")
    print(f"a variant: {one * 1e3:.1f} ms in the sweep, {each * 1e3:.1f} ms alone: {each / one:.1f} times faster")
    print(f"all {whole} places: {row['full_grid_forwards']:.0f} forwards; naive {whole}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
