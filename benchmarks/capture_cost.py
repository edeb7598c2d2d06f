"""What looking costs: a forward with a capture beside one without, in turns, the median of each, as time added.

    python benchmarks/capture_cost.py DIRECTORY [--tokens 128] [--rounds 5] [--only NAME ...]

Three captures: into new memory (which a virtual machine may have to get from its host), as when it is the first; a later one,
which takes the memory of a freed one; and one that writes over an earlier cache (`out=`). Beside them what the machine takes to
write as many bytes once, from one thread, to new and to used memory.
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


def writing(n):
    """Seconds to write n bytes to new memory, and again."""
    array = None

    def new():
        nonlocal array
        array = np.empty(n, np.uint8)
        array.fill(1)

    return seconds(new), seconds(lambda: array.fill(2))


def measure(model, ids, names, dtype, rounds):
    """Seconds without, with new memory, with that of a freed capture, with the same arrays, and to write the bytes."""

    def capture(out=None):
        return model.run_with_cache(ids, names, dtype=dtype, logits="none", max_bytes=8 << 30, out=out)[1]

    times = {name: [] for name in ("plain", "new", "again", "out", "write_new", "write")}
    ouro.free_memory()
    kept = capture()
    for _ in range(rounds):
        model.trace(ids, logits="none")         # while the system takes back what was freed
        times["plain"].append(seconds(lambda: model.trace(ids, logits="none")))
        times["new"].append(seconds(capture))
        times["again"].append(seconds(capture))
        times["out"].append(seconds(lambda: capture(kept)))
        new, again = writing(kept.nbytes)       # not where the captures wrote: that memory is kept
        times["write_new"].append(new)
        times["write"].append(again)
        ouro.free_memory()
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CAPTURES), choices=list(CAPTURES), metavar="NAME")
    arguments = parser.parse_args()
    model = ouro.load(arguments.directory)
    ids = np.random.default_rng(0).integers(0, model.config.d_vocab, arguments.tokens)
    whole = model.plan(ids).nbytes
    model.trace(ids, logits="none")
    print(f"{'kept':24}{'MiB':>7}{'share':>8}{'without':>10}{'new':>8}{'again':>8}{'out=':>8}   writing: {'new':>7}{'again':>7}")
    for name in arguments.only:
        names, dtype = CAPTURES[name], "bfloat16" if "bfloat16" in name else "float32"
        plan = model.plan(ids, names, dtype=dtype)
        if plan.nbytes > 3 << 30:
            print(f"{name:24}{plan.nbytes / 2**20:7.0f}  skipped")
            continue
        t = measure(model, ids, names, dtype, arguments.rounds)
        added = {k: 100 * (t[k] / t["plain"] - 1) for k in ("new", "again", "out")}
        write = {k: 100 * t[k] / t["plain"] for k in ("write_new", "write")}
        print(f"{name:24}{plan.nbytes / 2**20:7.0f}{100 * plan.nbytes / whole:6.0f} %{t['plain']:8.3f} s"
              + "".join(f"{v:+6.1f} %" for v in added.values()) + " " * 11 + "".join(f"{v:5.1f} %" for v in write.values()))  # fmt: skip
        print(json.dumps({"capture": name, "bytes": plan.nbytes, "tokens": arguments.tokens, **t}))


if __name__ == "__main__":
    main()
