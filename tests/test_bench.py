"""`ouro bench`: arithmetic of bounds, ratios and merging, the JSON line, the GGUF that is written. Nothing is timed here."""

import argparse
import json
import struct

import numpy as np
import pytest
from paths import FIXTURES, TINY

import ouro
from ouro import _core
from ouro.bench.bounds import Cost
from ouro.bench.candidates import Entry, Task
from ouro.bench.command import add_arguments, tasks_of
from ouro.bench.errors import PeerError
from ouro.bench.gguf_file import metadata, tensor_names, write_gguf
from ouro.bench.llama_cpp import _run
from ouro.bench.results import SCHEMA, Report, Row, merge, merge_pairs, pairs_of
from ouro.bench.worker import Ouro
from ouro.checkpoint import open_checkpoint
from ouro.config import ModelConfig, load_config

BIG = ModelConfig(24, 4, 16, 16, 2048, 128, 5632, 49152, 65536, 1e-6, 1e6, False, 1.0)


def row(runtime="ouro", compute="bfloat16", **rates):
    entry = Entry(runtime, compute, "bfloat16", Cost.of_formats(BIG, 16, 16), 1.0, {"resident": 5, "peak": 7})
    made = Row(entry)
    for key, values in rates.items():
        for value in values:
            made.add(key.replace("_", "@"), {"rate": value, "passes": 4}, (36e9, 460e9))
    return made


def report(*rows):
    peak = {"bfloat16": {"instruction": "x", "rate": 460e9}}
    machine = {"processor": "p", "features": "", "threads": 2, "read": 36e9, "peak": peak}
    model = {"name": "big", "n_layers": 24, "n_steps": 4, "d_model": 2048, "n_params": 1}
    return Report(machine, model, {"prompt": 512}, {"ouro": "0"}, list(rows), pairs_of(rows))


def test_the_1_4b_shape_costs_what_the_design_says():
    cost = Cost.of_formats(BIG, 16, 16)
    assert cost.layer_params == 24 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
    assert cost.decode_bytes(0) == pytest.approx(10.07e9, rel=0.002)
    assert cost.kv_bytes == 768 * 1024
    assert cost.bound("decode", 0, 36e9, 460e9) == pytest.approx(3.6, abs=0.03)
    assert cost.bound("prefill", 512, 36e9, 460e9) == pytest.approx(46, abs=0.8)
    assert Cost.of_formats(BIG, 8, 8).bound("prefill", 512, 36e9, 920e9) == pytest.approx(92, abs=2)


def test_bounds_take_the_slower_of_bytes_and_operations():
    cost = Cost(n_steps=2, layer_params=100, head_params=10, layer_bytes=200.0, head_bytes=20.0, attention=4, kv_bytes=8.0)
    assert cost.decode_bytes(3) == 2 * 200 + 20 + 3 * 8
    assert cost.decode_operations(3) == 2 * (2 * 100 + 10) + 3 * 4
    assert cost.prefill_operations(3) == 2 * (3 * 2 * 100 + 10) + 4 * (1 + 2 + 3)
    assert cost.prefill_bytes(257) == 2 * 2 * 200 + 20
    assert cost.bound("decode", 0, read=42.0, peak=1e9) == pytest.approx(0.1)
    assert cost.bound("decode", 0, read=1e9, peak=42.0) == pytest.approx(0.1)
    assert cost.bound("prefill", 3, read=1e9, peak=1244.0) == pytest.approx(3)
    assert cost.intensity("decode", 0) == 1.0
    assert cost.operations("prefill", 3) == cost.prefill_operations(3) / 3


def test_shares_and_ratios_are_taken_by_round():
    ours, rival = row(prefill_512=[40, 20], decode_32=[3, 2]), row("llama.cpp", "BF16", prefill_512=[20, 20], decode_32=[2, 4])
    pairs = pairs_of([ours, rival, row(compute="int8", decode_32=[1])])
    names = ("ouro bfloat16", "llama.cpp BF16")
    assert pairs == {names: {"prefill@512": [2.0, 1.0], "decode@32": [1.5, 0.5]}}
    assert merge_pairs([pairs, {names: {"decode@32": [3.0]}}])[names]["decode@32"] == [1.5, 0.5, 3.0]
    assert ours.share("decode@32") == pytest.approx(2.5 / ours.bounds("decode@32")[0])


def test_rounds_of_runs_come_together_and_the_line_survives_a_round_trip(tmp_path):
    first, second = report(row(decode_32=[3.0])), report(row(decode_32=[2.0]))
    log = tmp_path / "log"
    log.write_text("\n".join([first.line(), json.dumps({"schema": "other"}), second.line()]))
    second.absorb(log)
    assert [r.rates for r in second.rows] == [{"decode@32": [3.0, 2.0]}]
    found = json.loads(second.line())
    assert found["schema"] == SCHEMA and found["rows"][0]["figures"]["decode@32"]["median"] == 2.5
    assert Row.from_dict(found["rows"][0]) == second.rows[0]
    both = report(row(decode_32=[3.0]), row("torch", decode_32=[1.5]))
    log.write_text(f"{both.line()}\n{first.line()}\n{both.line()}\n")
    both.absorb(log)
    assert both.rows[0].rates == {"decode@32": [3.0] * 3}
    assert both.pairs == {("ouro bfloat16", "torch bfloat16"): {"decode@32": [2.0, 2.0]}}
    assert len(merge([row(decode_32=[1.0]), row(decode_32=[1.0]), row(compute="int8", decode_32=[1.0])])) == 2


def test_the_table_has_a_line_per_candidate_and_pair():
    text = report(row(prefill_512=[40], decode_32=[3]), row("llama.cpp", "BF16", prefill_512=[20])).table()
    assert "ouro bfloat16 / llama.cpp BF16" in text and "2.00 (2.00 to 2.00)" in text
    assert sum(line.startswith(("ouro", "llama.cpp")) for line in text.splitlines()) == 3


def test_arguments_become_tasks(capsys):
    p = argparse.ArgumentParser()
    add_arguments(p)
    tasks = tasks_of(p.parse_args(["--context", "32,4096", "--speculate", "--new", "8"]))
    assert [t.key for t in tasks] == ["prefill@512", "decode@32", "decode@4096", "decode@32 speculate"]
    assert Task("decode", 32, 8) == tasks[1]
    for wrong in (["--compute", "fp3"], ["--against", "vllm"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            p.parse_args(wrong)
        assert "expected" in (said := capsys.readouterr().err) or "is not a list" in said


@pytest.mark.core
@pytest.mark.parametrize("unit", ["float32", "bfloat16", "int8"])
def test_the_core_measures_units(unit):
    instruction, rates = _core.peak(unit, 1, 2)
    assert instruction and len(rates) == 2 and min(rates) > 0


@pytest.mark.core
def test_the_core_measures_a_read_and_refuses_nonsense():
    assert min(_core.read_bandwidth(1 << 20, 2, 3)) > 0
    with pytest.raises(ValueError, match="512 bytes"):
        _core.read_bandwidth(10, 1, 1)
    with pytest.raises(ValueError, match="rounds"):
        _core.read_bandwidth(1 << 20, 1, 0)
    with pytest.raises(ValueError, match="unknown unit 'int3'"):
        _core.peak("int3", 1, 1)
    with pytest.raises(MemoryError):
        _core.read_bandwidth(1 << 60, 1, 1)


@pytest.mark.core
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int4"])
def test_a_model_reads_its_own_weights(compute):
    model = ouro.load(TINY, compute=compute, threads=2)
    nbytes, seconds = model._core.read_weights()
    assert nbytes == model.info()["layer_bytes"] and seconds > 0


def test_a_token_is_compared_with_reads_beside_it():
    found = Ouro(TINY, "int8", 1).decode(8, 5, False)
    assert found["passes"] == 5 * 4 and found["cache_bytes"] > 0
    assert min(found[name] for name in ("rate", "read", "prefill_rate")) > 0
    guessed = Ouro(TINY, "int8", 1).decode(8, 5, True)
    assert "read" not in guessed and guessed["passes"] <= 6 * 4


@pytest.mark.parametrize("name", ["tiny-mha", "tiny-gqa-tied"])
def test_gguf_names_and_metadata_follow_the_checkpoint(name):
    c = load_config(FIXTURES / name)
    found = metadata(c)
    assert found["nanbeige.num_loops"] == c.n_steps and found["nanbeige.block_count"] == c.n_layers
    assert found["nanbeige.attention.head_count_kv"] == c.n_key_value_heads
    names = dict(tensor_names(c))
    assert names["blk.1.ffn_down.weight"] == "model.layers.1.mlp.down_proj.weight"
    assert ("output.weight" in names) == (not c.tie_word_embeddings)
    with open_checkpoint(FIXTURES / name) as checkpoint:
        assert set(names.values()) <= set(checkpoint.tensors)


def test_gguf_holds_the_bytes_of_the_checkpoint(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = write_gguf(FIXTURES / "tiny-mha", tmp_path / "tiny.gguf")
    assert struct.unpack("<4sI", path.read_bytes()[:8]) == (b"GGUF", 3)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("nanbeige.num_loops").contents() == 4
    assert reader.get_field("general.architecture").contents() == "nanbeige"
    found = {t.name: t for t in reader.tensors}
    q = found["blk.1.attn_q.weight"]
    assert q.tensor_type == gguf.GGMLQuantizationType.BF16
    with open_checkpoint(FIXTURES / "tiny-mha") as checkpoint:
        want = checkpoint.read_f32("model.layers.1.self_attn.q_proj.weight")
        wide = (np.asarray(q.data).view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(want.shape)
        assert np.array_equal(wide, want)
        assert np.array_equal(found["output_norm.weight"].data, checkpoint.read_f32("model.norm.weight"))


def test_torch_forward_agrees_with_the_reference():
    torch = pytest.importorskip("torch")
    from ouro.bench.torch_forward import Reference

    model, reference = Reference(FIXTURES / "tiny-mha"), np.load(FIXTURES / "tiny-mha" / "reference.npz")
    ids = torch.from_numpy(reference["input_ids"][0].astype(np.int64))
    found = torch.stack(model.states(ids, {})).numpy()
    assert np.abs(found - reference["state"][:, 0]).max() < 5e-5


def test_a_peer_that_fails_says_why():
    with pytest.raises(PeerError, match="no-such-program is not installed"):
        _run(["no-such-program"], "building")
    with pytest.raises(PeerError, match=r"building failed .*said so"):
        _run(["sh", "-c", "echo said so >&2; exit 3"], "building")


@pytest.mark.core
def test_command_prints_a_table_and_a_line(tmp_path, capsys, monkeypatch):
    from ouro.cli import main

    pytest.importorskip("matplotlib")
    monkeypatch.setattr("ouro.bench.command.LARGEST_READ", 1 << 22)
    log = tmp_path / "log.jsonl"
    options = ["bench", "-m", str(TINY), "--compute", "int8", "--threads", "1", "--prompt", "8", "--new", "2", "--rounds", "1"]
    assert main([*options, "--log", str(log)]) == 0
    assert main([*options, "--log", str(log), "--json"]) == 0
    text = capsys.readouterr().out
    assert "ouro int8" in text and "plain read" in text
    last = json.loads(text.splitlines()[-1])
    assert [len(f["rates"]) for f in last["rows"][0]["figures"].values()] == [2, 2]
    assert last["rows"][0]["memory"]["peak"] > 0
    assert main([*options[:-1], "0", "--log", str(log), "--plot", str(tmp_path / "roofline.png")]) == 0
    assert len(log.read_text().splitlines()) == 2 and (tmp_path / "roofline.png").stat().st_size > 10_000
    assert main([*options[:-1], "0"]) == 1
    assert "expected --log" in capsys.readouterr().err


@pytest.mark.core
def test_command_of_batches(capsys, monkeypatch):
    from ouro.cli import main

    monkeypatch.setattr("ouro.bench.command.LARGEST_READ", 1 << 22)
    assert main(["bench", "-m", str(TINY), "--compute", "int8", "--threads", "1", "--new", "3", "--rounds", "1", "--batch", "1,2"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert [(r["mode"], r["requests"]) for r in found["rows"]] == [(m, n) for n in (1, 2) for m in ("plain", "q=0.5", "speculate")]
    assert found["latency"][0]["beside"] > 0 and "from token to token" in text
