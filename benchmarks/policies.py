"""Cache policies against full: drift on the packaged model, memory and speed behind a long context.

    python benchmarks/policies.py drift
    python benchmarks/policies.py cost [--size small] [--context 8192] [--new 24] [--rounds 3] [--policies last_step ...]
    python benchmarks/policies.py speed [--size small] [--context 8192] [--new 24] [--rounds 3] [--q 0.5] [--policies last_step ...]

drift: each prompt is continued greedily under kv_policy "full"; the other policies then follow the same tokens (`follow=`), so that
readouts are compared behind the same text. KL(full || policy) is over the 64 most likely tokens that both report and one bucket for
the rest: a lower bound, which the small vocabulary makes tight. `top-1` is how often the most likely token is the same; `free run`
how many tokens a greedy run of its own shares with full's before the first difference.

cost: random weights; the prompt is read once per policy, decoding takes turns. `cache` is what the sequence holds after the prompt,
`resident` the growth of the process.

speed: random weights; the prompt is read once, and every policy takes over its blocks (all but "average", which takes none), first
with all steps and then with Q-exit at `--q`. Per policy: tokens per second, milliseconds per token, mean steps, and the bytes of
keys and values that a token reads, by count: one row of the context for every lane that ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import numpy as np
from make_weights import make
from wavefront import CACHE

import ouro
from ouro import _core
from ouro.generation import KV_POLICIES

PROMPTS = ["One day Ann took", "Bob went to the", "In the morning Cid", "Ann is the boss of Bob. Bob is the teacher of Cid.", "The boss of"]
QUESTIONS = ["Sort: 3 1 2", "Reverse: 5 4 9 1", "Count: 2 7 7",
             "Ann is the boss of Bob. Bob is the teacher of Cid. Who is the boss of the teacher of Cid?"]  # fmt: skip


FIRST = 4
"""Tokens that are not timed: beside them the last rows of the prompt still run their deeper steps."""


def divergence(a: dict[int, float], b: dict[int, float]) -> float:
    """KL(a || b), nats, of two reports of log probabilities: tokens that both name, and one bucket for the rest."""
    both = sorted(a.keys() & b.keys())
    p, q = (np.exp([x[i] for i in both]) for x in (a, b))
    p, q = (np.append(x, max(1 - x.sum(), 1e-12)) for x in (p, q))
    return float((p * np.log(p / q)).sum())


def shared(a: list[int], b: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def drift(new: int, compute: Any) -> list[dict[str, Any]]:
    """One row per policy and exit rule."""
    model = ouro.load("ouro-tiny", compute=compute, threads=1)
    prompts = [model.to_tokens(p) for p in PROMPTS]
    prompts += [model.to_tokens(model.chat_prompt([{"role": "user", "content": q}])) for q in QUESTIONS]
    rows = []
    for name, control in (("all steps", {}), ("Q-exit 0.6", {"exit_threshold": 0.6})):
        same: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": [], "logprobs": 64, **control}
        full = [model.generate(p, **same) for p in prompts]
        for policy in KV_POLICIES[1:]:
            kl, top, cost, free, steps = [], [], [], [], []
            for prompt, reference in zip(prompts, full, strict=True):
                made = model.generate(prompt, kv_policy=policy, follow=reference.token_ids, **same)
                assert made.top_logprobs is not None and reference.top_logprobs is not None
                pairs = list(zip(reference.top_logprobs, made.top_logprobs, strict=True))
                kl += [divergence(a, b) for a, b in pairs]
                top += [max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in pairs]
                cost += [a - b for a, b in zip(reference.logprobs, made.logprobs, strict=True)]
                steps += [a == b for a, b in zip(reference.exit_steps, made.exit_steps, strict=True)]
                free.append(shared(reference.token_ids, model.generate(prompt, kv_policy=policy, **same).token_ids))
            rows.append({"exit": name, "policy": policy, "kl": statistics.mean(kl), "kl_99": float(np.quantile(kl, 0.99)),
                         "top1": statistics.mean(top), "loss": statistics.mean(cost), "free_run": statistics.mean(free),
                         "same_exit": statistics.mean(steps), "tokens": len(kl)})  # fmt: skip
    return rows


def cost(directory: Any, context: int, new: int, rounds: int, compute: Any, policies: list[str]) -> list[dict[str, Any]]:
    """One row per policy: bytes held behind the prompt, growth of the process, tokens per second of plain decoding."""
    model = ouro.load(directory, compute=compute)
    prompt = np.random.default_rng(1).integers(3, model.config.d_vocab, context).tolist()
    model.generate(prompt[:300], max_new_tokens=2)
    speed: dict[str, list[float]] = {p: [] for p in policies}
    held: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        for policy in policies:
            before = _core.resident_memory()
            with ouro.Engine(model, prefix_cache_bytes=0, background=False) as engine:
                handle = engine.submit(prompt, max_new_tokens=new, eos_token_id=[], kv_policy=policy, speculate=False)
                while len(handle.generation.token_ids) < 2:
                    engine.step()
                held[policy] = engine.stats.cache_bytes, _core.resident_memory() - before
                speed[policy].append((new - 1) / handle.result().stats.decode_seconds)
    return [{"policy": p, "cache_mib": a / 2**20, "resident_mib": b / 2**20, "tokens_per_s": statistics.median(speed[p]),
             "of_full": statistics.median(x / y for x, y in zip(speed[p], speed["full"], strict=True))}
            for p, (a, b) in held.items()]  # fmt: skip


def speed(directory: Any, context: int, new: int, rounds: int, compute: Any, policies: list[str], q: float) -> list[dict[str, Any]]:
    """One row per exit and policy: decoding behind one prompt that all share; policies take turns within a round."""
    model = ouro.load(directory, compute=compute)
    prompt = np.random.default_rng(1).integers(3, model.config.d_vocab, context).tolist()
    exits: dict[str, dict[str, Any]] = {"all steps": {}, f"Q-exit {q:g}": {"exit_threshold": q}}
    seen: dict[tuple[str, str], list[dict[str, float]]] = {(name, p): [] for name in exits for p in policies}
    with ouro.Engine(model, prefix_cache_bytes=1 << 40, background=False) as engine:
        same: dict[str, Any] = {"eos_token_id": [], "speculate": False}
        engine.submit(prompt, max_new_tokens=2, **same).result()
        per_row = engine.stats.cache_bytes / (len(prompt) // 64 * 64) / model.config.n_steps     # bytes of one position at one step
        for _ in range(rounds):
            for name, control in exits.items():
                for policy in policies:
                    made = engine.submit(prompt, max_new_tokens=new, kv_policy=policy, **control, **same).result()
                    steps = float(np.mean(made.exit_steps[FIRST:])) + 1
                    lanes = model.config.n_steps if policy == "full" else steps       # exact: deeper steps run later
                    seen[name, policy].append({"tokens_per_s": (new - FIRST) / (made.token_times[-1] - made.token_times[FIRST - 1]),
                                               "steps": steps, "read_gb": lanes * (context + new / 2) * per_row / 1e9})  # fmt: skip
    rows = []
    for (name, policy), runs in seen.items():
        row = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs, seen[name, "full"], strict=True)]
        rows.append({"exit": name, "policy": policy, **row, "of_full": statistics.median(ratios)})
    return rows


def main() -> None:
    """A table and one JSON line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["drift", "cost", "speed"])
    p.add_argument("--compute", default="bfloat16")
    p.add_argument("--new", type=int, default=96)
    p.add_argument("--size", default="small")
    p.add_argument("--context", type=int, default=8192)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--alpha", type=float, default=0.02, help="random weights: make_weights.py")
    p.add_argument("--q", type=float, default=0.5, help="speed: the threshold of Q-exit")
    p.add_argument("--policies", nargs="+", choices=KV_POLICIES, default=KV_POLICIES, help="cost, speed: some of them, beside full")
    a = p.parse_args()
    if a.what == "drift":
        rows = drift(a.new, a.compute)
        print("| exit | policy | KL, nats | KL, 99 % | top-1 | loss, nats | free run, tokens | exit steps kept |")
        print("|---|---|---|---|---|---|---|---|")
        for r in rows:
            print(f"| {r['exit']} | {r['policy']} | {r['kl']:.4f} | {r['kl_99']:.3f} | {r['top1']:.3f} | {r['loss']:+.4f} | "
                  f"{r['free_run']:.0f} of {a.new} | {r['same_exit']:.3f} |")  # fmt: skip
    else:
        directory = make(CACHE / f"{a.size}-{a.alpha:g}", a.size, a.alpha)
        policies = ["full", *(p for p in a.policies if p != "full")]
        if a.what == "cost":
            rows = cost(directory, a.context, a.new, a.rounds, a.compute, policies)
            print("| policy | cache, MiB | resident, MiB | tokens/s | of full |\n|---|---|---|---|---|")
            for r in rows:
                print(f"| {r['policy']} | {r['cache_mib']:.0f} | {r['resident_mib']:.0f} | {r['tokens_per_s']:.1f} | {r['of_full']:.2f} |")
        else:
            rows = speed(directory, a.context, a.new, a.rounds, a.compute, policies, a.q)
            print("| exit | policy | mean steps | keys and values read, GB/token | tokens/s | of full |\n|---|---|---|---|---|---|")
            for r in rows:
                print(f"| {r['exit']} | {r['policy']} | {r['steps']:.2f} | {r['read_gb']:.2f} | {r['tokens_per_s']:.2f} | "
                      f"{r['of_full']:.2f} |")  # fmt: skip
    print(json.dumps({k: v for k, v in vars(a).items()} | {"rows": rows}))


if __name__ == "__main__":
    main()
