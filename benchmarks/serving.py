"""What requests of one engine cost each other, and what they save.

    python benchmarks/serving.py MODEL [latency] [reuse] [passes] [guesses] [--prompt 256] [--new 8] [--rounds 3] [--requests 1 2 4]

latency: one request decodes, plain; the time between its tokens is taken alone, and while a prompt is read under several
`prefill_lanes`, beside how fast that prompt is read. reuse: the time to the first token of a prompt, cold, and when an
earlier request had the same beginning. passes: what a pass of so many lanes costs, without readouts. guesses: tokens per second of
several requests with `speculate=True` and "auto", over plain, in turns, ratios taken within a round. (Tokens per second of many
requests together: `ouro bench --batch`.) Prints tables and one JSON line.
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


def pass_times(model: ouro.Model, requests: int, new: int) -> list[float]:
    """Seconds of the steps of so many plain requests in which nothing is read or decided: passes of that many lanes."""
    log: list[dict[str, Any]] = []
    found = []
    with ouro.Engine(model, background=False, prefix_cache_bytes=0, prefill_lanes=256, log=log) as engine:
        for i in range(requests):
            engine.submit(tokens(model, 16, 1 + i), max_new_tokens=new, **PLAIN)
        more = True
        while more:
            begin = time.perf_counter()
            more = engine.step()
            seconds = time.perf_counter() - begin
            if not log[-1]["events"] and [lane[1] for lane in log[-1]["lanes"]] == ["lead"] * requests:
                found.append(seconds)
    return found


def rate(model: ouro.Model, requests: int, new: int, speculate: Any) -> tuple[float, float]:
    """Tokens per second of all from when each has its first token until `new` more for each, and the p1 of guesses."""
    with ouro.Engine(model, background=False, prefix_cache_bytes=0) as engine:
        same: dict[str, Any] = {"max_new_tokens": 4 * new + 8, "eos_token_id": [], "speculate": speculate}
        handles = [engine.submit(tokens(model, 16, 1 + i), **same) for i in range(requests)]
        made = [h.generation.token_ids for h in handles]
        while not all(made):
            engine.step()
        begin, before = time.perf_counter(), sum(map(len, made))
        while sum(map(len, made)) < before + new * requests:
            engine.step()
        speed = (sum(map(len, made)) - before) / (time.perf_counter() - begin)
        for h in handles:
            h.cancel()
        found = [h.result().stats for h in handles]
        return speed, float(np.mean([s.p1 for s in found]))


def guesses(model: ouro.Model, new: int, rounds: int, counts: Sequence[int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    say('| requests | p1 | plain, tokens/s | `True` over plain | each round | "auto" over plain | each round |')
    say("|---|---|---|---|---|---|---|")
    for n in counts:
        plain, always, auto, p1 = [], [], [], 0.0
        for _ in range(rounds):
            plain.append(rate(model, n, new, False)[0])
            speed, p1 = rate(model, n, new, True)
            always.append(speed / plain[-1])
            auto.append(rate(model, n, new, "auto")[0] / plain[-1])
        each = [" ".join(f"{x:.2f}" for x in sorted(values)) for values in (always, auto)]
        say(f"| {n} | {p1:.2f} | {np.median(plain):.2f} | {np.median(always):.2f} | {each[0]} | {np.median(auto):.2f} | {each[1]} |")
        out[str(n)] = {"p1": p1, "plain": plain, "true": always, "auto": auto}
    return out


def say(text: str) -> None:
    print(text, flush=True)


def latency(model: ouro.Model, prompt: int, new: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    say(f"| while a prompt of {prompt} tokens is read | p50, ms | p95, ms | prompt, tokens/s |\n|---|---|---|---|")
    for lanes in (0, 32, 256, 8):
        r = gaps(model, prefill_lanes=lanes or 32, prompt=prompt, prompts=lanes > 0, new=new)
        name = f"`prefill_lanes={lanes}`" if lanes else "nothing is read"
        say(f"| {name} | {1e3 * r['p50']:.0f} | {1e3 * r['p95']:.0f} | {r['prompt_tokens_per_s']:.1f} |")
        found[name] = r
    return found


def reuse(model: ouro.Model, prompt: int) -> dict[str, float]:
    r = first_token(model, shared=prompt, own=16)
    say(f"first token of {r['prompt_tokens']} tokens: {r['cold']:.2f} s, with {r['prefix_tokens']} of them taken over {r['reused']:.2f} s")
    return r


def passes(model: ouro.Model, new: int) -> dict[str, float]:
    found = {n: 1e3 * float(np.median(pass_times(model, n, new))) for n in (1, 2, 3, 4, 6, 8, 12, 16)}
    say("| lanes of a pass |" + "".join(f" {n} |" for n in found) + "\n|---|" + "---|" * len(found))
    say("| ms |" + "".join(f" {ms:.1f} |" for ms in found.values()))
    return {str(n): ms for n, ms in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("what", nargs="*", default=["latency", "reuse"], help="latency, reuse, passes, guesses (default: the first two)")
    p.add_argument("--compute", help="default: that of the model")
    p.add_argument("--prompt", type=int, default=256, help="tokens of a prompt that is read (default: %(default)s)")
    p.add_argument("--new", type=int, default=8, help="tokens of each request (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="guesses: turns (default: %(default)s)")
    p.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4], help="guesses: so many at once (default: %(default)s)")
    a = p.parse_args(argv)
    model = ouro.load(a.model, compute=a.compute)
    model.generate(tokens(model, 8, 9), max_new_tokens=2, **PLAIN)
    parts = {"latency": lambda: latency(model, a.prompt, a.new), "reuse": lambda: reuse(model, a.prompt),
             "passes": lambda: passes(model, a.new), "guesses": lambda: guesses(model, a.new, a.rounds, a.requests)}  # fmt: skip
    print(json.dumps({"compute": model.compute, **{what: parts[what]() for what in a.what}}))


if __name__ == "__main__":
    main()
