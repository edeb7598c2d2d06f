"""What looking costs: forwards with and without captures, alternating, the median of each.

    python benchmarks/capture_cost.py DIRECTORY [--tokens 128] [--rounds 5]
"""

import argparse
import json
import statistics
import time

import numpy as np

import ouro

CAPTURES = {
    "resid_post": ["resid_post"],
    "residual stream and z": ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"],
    "the same in bfloat16": ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"],
    "mlp": ["pre", "pre_linear", "post"],
    "pattern": ["pattern"],
    "result": ["result"],
    "everything but result": None,
}


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CAPTURES))
    arguments = parser.parse_args()
    model = ouro.load(arguments.directory)
    ids = np.random.default_rng(0).integers(0, model.config.d_vocab, arguments.tokens)
    whole = model.plan(ids).nbytes
    model.trace(ids, logits="none")
    for name in arguments.only:
        names, dtype = CAPTURES[name], "bfloat16" if "bfloat16" in name else "float32"
        plan = model.plan(ids, names, dtype=dtype)
        if plan.nbytes > 6 << 30:
            print(f"{name:24} {plan.nbytes / 2**20:8.0f} MiB  skipped")
            continue
        plain, seen = [], []
        for _ in range(arguments.rounds):
            plain.append(seconds(lambda: model.trace(ids, logits="none")))
            seen.append(seconds(lambda n=names, d=dtype: model.run_with_cache(ids, n, dtype=d, logits="none", max_bytes=8 << 30)))
        a, b = statistics.median(plain), statistics.median(seen)
        share, more = 100 * plan.nbytes / whole, 100 * (b / a - 1)
        print(f"{name:24} {plan.nbytes / 2**20:8.0f} MiB  {share:5.1f} %  {a:6.2f} s  {b:6.2f} s  {more:+6.1f} %")
        print(json.dumps({"capture": name, "bytes": plan.nbytes, "plain_seconds": a, "seconds": b, "tokens": arguments.tokens}))


if __name__ == "__main__":
    main()
