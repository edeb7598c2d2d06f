"""Patching: what a run would have said with some activations taken from another run.

`sweep` replaces activations of a corrupted run by those of a clean one, at every step, layer, position or head, and measures
each variant; the functions with the names of TransformerLens, causal tracing, path patching and direct attribution stand on it.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> clean = model.chat_prompt([{"role": "user", "content": "Ann is the boss of Finn. Who is the boss of Finn?"}])
>>> found = ouro.patching.sweep(model, clean, clean.replace("Ann", "Dan"), ("Ann", "Dan"), axes=("step", "pos"), progress=False)
>>> found.dims, found.shape
(('step', 'pos'), (4, 22))
>>> found.attrs["corrupted"] < 0 < found.attrs["clean"]
True
"""

from ouro.patching.attribution import logit_attribution
from ouro.patching.forks import ForkSet
from ouro.patching.named import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from ouro.patching.paths import Receiver, path_patching
from ouro.patching.patterns import pattern_sweep
from ouro.patching.sweep import sweep
from ouro.patching.tracing import causal_trace

__all__ = [
    "ForkSet", "Receiver", "causal_trace", "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every", "get_act_patch_attn_head_k_all_pos", "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos", "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos", "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos", "get_act_patch_attn_head_q_by_pos", "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos", "get_act_patch_attn_out", "get_act_patch_block_every",
    "get_act_patch_mlp_out", "get_act_patch_resid_mid", "get_act_patch_resid_pre", "logit_attribution",
    "path_patching", "pattern_sweep", "sweep",
]  # fmt: skip
