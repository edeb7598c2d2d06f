"""The model in plain NumPy, one position at a time with its caches in the open: what the cache policies must compute.

Written from the formulas (MODEL sections 2 to 4 of the paper and the released code), float64 where that is easy, no batching,
no pages. Slow and short: for the tiny fixtures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ouro.checkpoint import open_checkpoint


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Oracle:
    """Weights of a checkpoint in float64."""

    def __init__(self, directory: Path) -> None:
        with open_checkpoint(directory) as checkpoint:
            self.config = checkpoint.config
            self.w = {name: checkpoint.read_f32(name).astype(np.float64) for name in checkpoint.tensors}
        self.embed = self.w["model.embed_tokens.weight"]
        self.head = self.w.get("lm_head.weight", self.embed)

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x) + self.config.eps) * self.w[f"{name}.weight"]

    def rope(self, x, pos):
        """Half rotation of [heads, d_head]."""
        half = x.shape[-1] // 2
        angle = pos * self.config.rope_theta ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)

    def step(self, h, pos, past):
        """One sweep of the layers for one position.

        `past(layer)` gives (keys, values) of the positions before, [pos, kv head, d_head]. Returns the state, the gate
        logit and this position's own (key, value) per layer: it always sees itself with these.
        """
        c, own = self.config, []
        heads, kv_heads, d_head = c.n_heads, c.n_key_value_heads, c.d_head
        for layer in range(c.n_layers):
            name = f"model.layers.{layer}."
            u = self.norm(h, name + "input_layernorm")
            q, k, v = (
                (self.w[f"{name}self_attn.{p}_proj.weight"] @ u).reshape(n, d_head)
                for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = self.rope(q, pos), self.rope(k, pos)
            own.append((k, v))
            keys, values = (np.concatenate([old, new[None]]) for old, new in zip(past(layer), (k, v), strict=True))
            z = np.empty((heads, d_head))
            for head in range(heads):
                of = head // (heads // kv_heads)
                s = keys[:, of] @ q[head] / np.sqrt(d_head)
                p = np.exp(s - s.max())
                z[head] = p / p.sum() @ values[:, of]
            h = h + self.norm(self.w[name + "self_attn.o_proj.weight"] @ z.reshape(-1), name + "input_layernorm_2")
            u = self.norm(h, name + "post_attention_layernorm")
            gate, up = self.w[name + "mlp.gate_proj.weight"] @ u, self.w[name + "mlp.up_proj.weight"] @ u
            h = h + self.norm(self.w[name + "mlp.down_proj.weight"] @ (gate * sigmoid(gate) * up), name + "post_attention_layernorm_2")
        h = self.norm(h, "model.norm")
        return h, self.w["model.early_exit_gate.weight"][0] @ h + self.w["model.early_exit_gate.bias"][0], own

    def greedy(self, prompt, new, *, policy="full", n_steps=None, q=None, exit_at_step=None, given=None):
        """Greedy continuation under a cache policy.

        Returns tokens, log probabilities, exit steps and the margin of the best two logits at each token. `given` are tokens
        to follow instead of the argmax (the log probabilities are then theirs).
        """
        c = self.config
        depth = exit_at_step + 1 if exit_at_step is not None else n_steps or c.n_steps
        cache = [[[] for _ in range(c.n_layers)] for _ in range(depth)]  # [step][layer] list of (key, value)
        tokens, out = list(prompt), {"tokens": [], "logprobs": [], "exit_steps": [], "margins": []}

        def past(step):
            def of(layer):
                rows = cache[step][layer]
                empty = np.empty((0, c.n_key_value_heads, c.d_head))
                return (np.array([k for k, _ in rows]), np.array([v for _, v in rows])) if rows else (empty, empty)

            return of

        for pos in range(len(prompt) + new - 1):
            is_new, h, survival, cdf, left, ran = pos >= len(prompt), self.embed[tokens[pos]], 1.0, 0.0, None, []
            for t in range(depth):
                h, gate, own = self.step(h, pos, past(t))
                ran.append(own)
                cdf += survival * sigmoid(gate)
                survival *= 1 - sigmoid(gate)
                if left is None and (t == depth - 1 or (q is not None and q < 1 and cdf >= q)):
                    left, z = t, self.head @ h
                    if is_new and policy != "full":
                        break
            for t in range(depth):
                for layer in range(c.n_layers):
                    cache[t][layer].append(self.kept(policy if is_new else "full", [own[layer] for own in ran], t))
            if pos == len(prompt) - 1 and policy in ("last_step", "average", "first_step"):
                cache = [[[self.kept(policy, entry, t) for entry in zip(*[cache[s][layer] for s in range(depth)], strict=True)]
                          for layer in range(c.n_layers)] for t in range(depth)]  # fmt: skip
            if pos >= len(prompt) - 1:
                order = np.argsort(-z)
                token = int(order[0]) if given is None else given[pos - len(prompt) + 1]
                tokens.append(token)
                out["tokens"].append(token)
                out["logprobs"].append(z[token] - z.max() - np.log(np.exp(z - z.max()).sum()))
                out["exit_steps"].append(left)
                out["margins"].append(z[order[0]] - z[order[1]])
        return out

    @staticmethod
    def kept(policy, entries, t):
        """What one position's entries [steps run] leave for step t, (key, value)."""
        if policy == "last_step":
            return entries[-1]
        if policy == "average":
            return tuple(np.mean([entry[i] for entry in entries], axis=0) for i in (0, 1))
        if policy == "first_step":
            return entries[0]
        return entries[min(t, len(entries) - 1)]
