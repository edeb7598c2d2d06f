"""The forward of MODEL section 2 in plain NumPy (float64), with every hook point, edits and programs: what the core must say.

    run = HookOracle(directory); run(ids, n_steps) -> {full name: array [pos, ...]}

`edit(name, array) -> array or None` is called at every point, in order. Attention and norms are written from their formulas,
nothing is shared with the package but the reading of tensors.
"""

import numpy as np

from ouro.checkpoint import open_checkpoint


class HookOracle:
    def __init__(self, directory):
        self.checkpoint = open_checkpoint(directory)
        self.c = self.checkpoint.config
        self.seen = {}

    def tensor(self, name):
        if name not in self.seen:
            self.seen[name] = self.checkpoint.read_f32(name).astype(np.float64)
        return self.seen[name]

    def __call__(self, ids, n_steps=None, edit=None, turns=None):
        c, out = self.c, {}
        steps = c.n_steps if n_steps is None else n_steps
        turns = turns or [(t, range(c.n_layers), True) for t in range(steps)]

        def see(name, x):
            if edit is not None:
                changed = edit(name, x)
                x = x if changed is None else np.asarray(changed, np.float64)
            out[name] = x
            return x

        def norm(name, x, weight):
            scale = see(f"{name}.hook_scale", np.sqrt(np.mean(x * x, -1) + c.eps))
            return see(f"{name}.hook_normalized", x / scale[:, None] * self.tensor(weight))

        h = see("hook_embed", self.tensor("model.embed_tokens.weight")[np.asarray(ids)])
        opens = True
        for step, layers, closes in turns:
            if opens:
                h = see(f"steps.{step}.hook_resid_pre", h)
            for layer in layers:
                h = self.layer(f"steps.{step}.blocks.{layer}", layer, h, see, norm)
            opens = closes
            if not closes:
                continue
            h = see(f"steps.{step}.hook_resid_post", h)
            h = norm(f"steps.{step}.ln_final", h, "model.norm.weight")
            gate = h @ self.tensor("model.early_exit_gate.weight")[0] + self.tensor("model.early_exit_gate.bias")[0]
            see(f"steps.{step}.exit_gate.hook_logit", gate)
            head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
            see(f"steps.{step}.unembed.hook_out", h @ self.tensor(head).T)
        return out

    def layer(self, at, layer, h, see, norm):
        c, w = self.c, f"model.layers.{layer}"
        n, dh, group = len(h), c.d_head, c.n_heads // c.n_key_value_heads
        h = see(f"{at}.hook_resid_pre", h)
        u = norm(f"{at}.ln1", h, f"{w}.input_layernorm.weight")
        q = see(f"{at}.attn.hook_q", (u @ self.tensor(f"{w}.self_attn.q_proj.weight").T).reshape(n, -1, dh))
        k = see(f"{at}.attn.hook_k", (u @ self.tensor(f"{w}.self_attn.k_proj.weight").T).reshape(n, -1, dh))
        v = see(f"{at}.attn.hook_v", (u @ self.tensor(f"{w}.self_attn.v_proj.weight").T).reshape(n, -1, dh))
        q = see(f"{at}.attn.hook_rot_q", rotate(q, c.rope_theta))
        k = see(f"{at}.attn.hook_rot_k", rotate(k, c.rope_theta))
        scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, group, 1)) / np.sqrt(dh)
        scores = see(f"{at}.attn.hook_attn_scores", np.where(np.tri(n, dtype=bool), scores, -np.inf))
        e = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = see(f"{at}.attn.hook_pattern", e / e.sum(-1, keepdims=True))
        z = see(f"{at}.attn.hook_z", np.einsum("hij,jhd->ihd", pattern, np.repeat(v, group, 1)))
        o = self.tensor(f"{w}.self_attn.o_proj.weight").reshape(c.d_model, c.n_heads, dh)
        result = see(f"{at}.attn.hook_result", np.einsum("ihd,mhd->ihm", z, o))
        a = norm(f"{at}.ln1_post", result.sum(1), f"{w}.input_layernorm_2.weight")
        h = see(f"{at}.hook_resid_mid", h + see(f"{at}.hook_attn_out", a))
        u = norm(f"{at}.ln2", h, f"{w}.post_attention_layernorm.weight")
        gate = see(f"{at}.mlp.hook_pre", u @ self.tensor(f"{w}.mlp.gate_proj.weight").T)
        up = see(f"{at}.mlp.hook_pre_linear", u @ self.tensor(f"{w}.mlp.up_proj.weight").T)
        post = see(f"{at}.mlp.hook_post", gate / (1 + np.exp(-gate)) * up)
        m = norm(f"{at}.ln2_post", post @ self.tensor(f"{w}.mlp.down_proj.weight").T, f"{w}.post_attention_layernorm_2.weight")
        return see(f"{at}.hook_resid_post", h + see(f"{at}.hook_mlp_out", m))


def rotate(x, base):
    n, _, dh = x.shape
    angle = np.arange(n)[:, None] * base ** (-2.0 * np.arange(dh // 2) / dh)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : dh // 2], x[..., dh // 2 :]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)
