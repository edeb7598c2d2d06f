"""What other requests cost one that decodes, and what a shared beginning saves.

    python benchmarks/serving.py MODEL [--compute bfloat16] [--prompt 256] [--prompts 2] [--tokens 12]

One request decodes (plain, no speculation). The time between its tokens is taken alone, and while prompts are read under
several `prefill_lanes`; beside it how fast those prompts are read. Then the time to the first token of a prompt is taken
cold, and again when an earlier request had the same beginning. Prints a table and one JSON line. Total tokens per second of
many requests: `ouro bench --batch 1,2,4,8,16`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import ouro

PLAIN: dict[str, Any] = {"eos_token_id": [], "speculate": False}


def tokens(model: ouro.Model, n: int, seed: int) -> list[int]:
    """Random ids."""
    return np.random.default_rng(seed).integers(3, model.config.d_vocab, n).tolist()


def gaps(model: ouro.Model, *, prefill_lanes: int, prompt: int, prompts: int, new: int) -> dict[str, float]:
    """Seconds between tokens of one request while `prompts` prompts of `prompt` tokens are read (0: alone)."""
    with ouro.Engine(model, background=False, prefill_lanes=prefill_lanes, prefix_cache_bytes=0) as engine:
        one = engine.submit(tokens(model, 16, 1), max_new_tokens=new + 400, **PLAIN)
        while len(one.generation.token_ids) < 2:
            engine.step()
        others = [engine.submit(tokens(model, prompt, 2 + i), max_new_tokens=1, **PLAIN) for i in range(prompts)]
        times, begin, seen = [time.perf_counter()], time.perf_counter(), len(one.generation.token_ids)
        while not all(h.done for h in others) or len(times) <= (0 if others else new):
            engine.step()
            if len(one.generation.token_ids) > seen:
                seen = len(one.generation.token_ids)
                times.append(time.perf_counter())
        seconds = time.perf_counter() - begin
    found = np.diff(times)
    p50, p95 = np.percentile(found, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "tokens": len(found), "prompt_tokens_per_s": prompt * prompts / seconds}


def first_token(model: ouro.Model, *, shared: int, own: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of shared + own tokens: cold, and when `shared` of them were read before."""
    with ouro.Engine(model, background=False, prefix_cache_bytes=4 << 30) as engine:
        beginning, seconds = tokens(model, shared, 1), []
        for i in range(2):
            begin = time.perf_counter()
            g = engine.submit(beginning + tokens(model, own, 2 + i), max_new_tokens=1, **PLAIN).result()
            seconds.append(time.perf_counter() - begin)
    return {"cold": seconds[0], "reused": seconds[1], "prefix_tokens": g.stats.prefix_tokens, "prompt_tokens": shared + own}


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--compute", default="bfloat16")
    p.add_argument("--prompt", type=int, default=256)
    p.add_argument("--prompts", type=int, default=2)
    p.add_argument("--tokens", type=int, default=12)
    a = p.parse_args(argv)
    model = ouro.load(a.model, compute=a.compute)
    model.generate(tokens(model, 8, 9), max_new_tokens=2, **PLAIN)
    rows = {"alone": gaps(model, prefill_lanes=32, prompt=a.prompt, prompts=0, new=a.tokens)}
    for lanes in (8, 32, 256):
        rows[f"prefill_lanes={lanes}"] = gaps(model, prefill_lanes=lanes, prompt=a.prompt, prompts=a.prompts, new=a.tokens)
    print(f"| while {a.prompts} prompts of {a.prompt} tokens are read | p50, ms | p95, ms | prompts, tokens/s |")
    print("|---|---|---|---|")
    for name, r in rows.items():
        print(f"| {name} | {1e3 * r['p50']:.0f} | {1e3 * r['p95']:.0f} | {r['prompt_tokens_per_s']:.1f} |")
    reuse = first_token(model, shared=a.prompt, own=16)
    print(f"first token of {reuse['prompt_tokens']} tokens: {reuse['cold']:.2f} s, "
          f"with {reuse['prefix_tokens']} of them taken over {reuse['reused']:.2f} s")  # fmt: skip
    print(json.dumps({"compute": a.compute, "latency": rows, "reuse": reuse}))


if __name__ == "__main__":
    main()
