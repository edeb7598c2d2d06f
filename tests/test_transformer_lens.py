"""The TransformerLens column of docs/transformer_lens.md, run by TransformerLens on a random model of its own (no download).

Needs `transformer_lens` and `torch`, which are no extras of ours: skipped without them. Release 2 and 3 make the model from a
configuration; since release 4 a Hugging Face model is wrapped, here a random Llama.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import ouro

tl = pytest.importorskip("transformer_lens")
pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parent.parent / "docs" / "transformer_lens.md").read_text(encoding="utf-8")
SIZES = {"vocab_size": 896, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
OURS = Path(ouro.__file__).parent / "models" / "ouro-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers of four heads, with the tokenizer of the packaged model."""
    import torch
    import transformers

    directory, end = tmp_path_factory.mktemp("random"), "<|endoftext|>"
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(OURS / "tokenizer.json"), bos_token=end, eos_token=end, pad_token=end)
    made.save_pretrained(directory)
    torch.manual_seed(0)
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        config = transformers.LlamaConfig(**SIZES, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        return TransformerBridge.boot_transformers(str(directory), device="cpu")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    config = HookedTransformerConfig(
        n_layers=4, d_model=64, n_ctx=256, d_head=16, n_heads=4, d_mlp=128, d_vocab=896, act_fn="silu", normalization_type="RMS",
        gated_mlp=True, positional_embedding_type="rotary", rotary_dim=16, seed=0, device="cpu", default_prepend_bos=True,
        use_normalization_before_and_after=True,
    )  # fmt: skip
    return HookedTransformer(config, tokenizer=tokenizer)


def their_side():
    """The numbered statements of the page's blocks marked as TransformerLens's."""
    blocks = re.findall(r"<!-- not run: TransformerLens[^>]*-->\n```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 1
    return blocks[0]


def test_every_row_of_the_table_is_run():
    rows = re.findall(r"^\| (\d+) \|", PAGE, re.M)
    numbers = {n for marks in re.findall(r"#\s*([\d, ]+)(?=[:\n])", their_side()) for n in re.findall(r"\d+", marks)}
    assert rows == [str(i) for i in range(1, 21)] and numbers == set(rows)


def test_their_column_runs(model):
    pytest.importorskip("circuitsvis")
    names = {"model": model}
    exec(compile(their_side(), "docs/transformer_lens.md", "exec"), names)
    cache, layers = names["cache"], 4
    assert names["ids"].shape == (1, 7) and int(names["ids"][0, 0]) == 0  # BOS in front
    assert names["logits"].shape == (1, 7, 896) and len(names["some"]) == 2
    assert cache["resid_post", 3].shape == (1, 7, 64) and names["pattern"].shape == (1, 4, 7, 7)
    assert names["z"].shape == (layers, 1, 7, 4, 16) and names["accumulated"].shape == (layers + 1, 1, 7, 64)
    assert names["parts"].shape == (2 * 3 + 1, 1, 7, 64) and names["heads"].shape == (16, 1, 7, 64)
    assert names["read"].shape == (layers + 1, 1, 7, 896) and names["attributed"].shape[1:] == (1, 7)
    hooked, inside, plain = (np.asarray(names[n].detach()) for n in ("hooked", "inside", "logits"))
    assert (hooked == inside).all() and not (hooked == plain).all()
    assert names["found"].shape == (layers, 8)


def test_names_of_a_flat_cache_are_theirs(model):
    """What `to_transformer_lens` calls an activation, a sandwich-normed `HookedTransformer` calls it too; loop points aside."""
    if type(model).__name__ != "HookedTransformer":
        pytest.skip("a bridge has more names, and those of the wrapped model")
    _, theirs = model.run_with_cache("One day")
    ours = ouro.load("ouro-tiny").run_with_cache("One day")[1].to_transformer_lens()
    names = {n for n in ours if n.startswith("blocks.0.")}
    assert names <= set(theirs)
