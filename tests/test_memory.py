"""What a model takes: packed weights, cache, and a constant (docs/quantization.md, "Memory")."""

import json
import subprocess
import sys

import numpy as np
import pytest
from builders import edit_config, write_parts
from paths import FIXTURES

from ouro.checkpoint import expected_shapes
from ouro.config import load_config

pytestmark = pytest.mark.slow
CONSTANT = 32 << 20  # readers' buffers, scratch of passes, threads: measured 10 to 20 MiB
MEASURE = """
import json, re, sys
import ouro
from ouro import _core
ouro.load("ouro-tiny", compute=sys.argv[2]).generate([1, 2], max_new_tokens=2)      # libraries are in memory now
before = _core.resident_memory()
model = ouro.load(sys.argv[1], compute=None if sys.argv[3] == "packed" else sys.argv[2])
loaded = _core.resident_memory()
g = model.generate(list(range(1, 200)), max_new_tokens=60, eos_token_id=[])
if sys.argv[3] == "save":
    model.save_packed(sys.argv[4])
cache = model.info()["kv_page_bytes"] * model.config.n_steps * 5
print(json.dumps(dict(before=before, loaded=loaded, after=_core.resident_memory(), weights=model.info()["weight_bytes"], cache=cache,
                      peak=1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, 40 MiB in bf16."""
    d = tmp_path_factory.mktemp("synthetic")
    (d / "config.json").write_bytes((FIXTURES / "tiny-mha" / "config.json").read_bytes())
    edit_config(d, hidden_size=512, intermediate_size=1408, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
                vocab_size=4096, layer_types=["full_attention"] * 5)  # fmt: skip
    rng, header, parts, at = np.random.default_rng(0), {}, [], 0
    for name, shape in expected_shapes(load_config(d)).items():
        values = np.ones(shape, np.float32) if "norm" in name else rng.standard_normal(shape, np.float32) * np.float32(0.05)
        raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    write_parts(d / "model.safetensors", header, b"".join(parts))
    return d


def measure(*arguments):
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int4"])
def test_resident_is_weights_cache_and_a_constant(checkpoint, tmp_path, compute):
    """At the peak of loading too: no tensor is ever held twice. Opening a packed model takes its pages and no more."""
    for how, where in (("save", checkpoint), ("packed", tmp_path / "m")):
        m = measure(where, compute, how, tmp_path / "m")
        for name, limit in (("loaded", m["weights"]), ("after", m["weights"] + m["cache"]), ("peak", m["weights"] + m["cache"])):
            assert m[name] - m["before"] < limit + CONSTANT, (how, name, m)
        assert m["loaded"] - m["before"] > 0.9 * m["weights"], (how, m)
