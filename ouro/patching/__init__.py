"""Patching: what a run would have said with some activations taken from another run.

`sweep` replaces activations of a corrupted run by those of a clean one, at every step, layer, position or head, and measures
each variant; the functions with the names of TransformerLens, causal tracing, path patching and direct attribution stand on it.

>>> import ouro
>>> model = ouro.load("ouro-tiny")
>>> clean, corrupted = "Ann is the boss of Bob. Who is the boss of Bob?", "Cid is the boss of Bob. Who is the boss of Bob?"
>>> found = ouro.patching.sweep(model, clean, corrupted, (" Ann", " Cid"), axes=("step", "layer"), progress=False)
>>> found.dims, found.shape
(('step', 'layer'), (4, 4))
"""

from ouro.patching.attribution import logit_attribution
from ouro.patching.forks import ForkSet
from ouro.patching.named import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_out,
    get_act_patch_block_every,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from ouro.patching.sweep import sweep
from ouro.patching.tracing import causal_trace

__all__ = [
    "ForkSet", "causal_trace", "get_act_patch_attn_head_all_pos_every", "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_out_all_pos", "get_act_patch_attn_head_out_by_pos", "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_v_all_pos", "get_act_patch_attn_out", "get_act_patch_block_every", "get_act_patch_mlp_out",
    "get_act_patch_resid_mid", "get_act_patch_resid_pre", "logit_attribution", "sweep",
]  # fmt: skip
