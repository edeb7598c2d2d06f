"""Packed models: written, opened by mapping or copying, the same bits as the checkpoint; read by a C program."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from builders import edit_config
from conftest import load
from paths import FIXTURES, RANDOM, TINY

import ouro
from ouro import _core

CSRC = Path(__file__).parent.parent / "csrc"
KINDS = {"float32": {}, "bfloat16": {}, "int8": {}, "int4": {}, "int8 head": {"formats": {"head": "int8"}},
         "int4 mixed": {"formats": {"o": "int8", "down": "int8", "head": "bfloat16", "embed": "bfloat16"}},
         "int4 down": {"formats": {"down": "int8"}}}  # fmt: skip
PROMPT = [40, 55, 88, 71, 50]


def built(name, kind):
    return _built(name, kind)


@cache
def _built(name, kind):
    directory = TINY if name == "trained" else FIXTURES / name
    return ouro.load(directory, compute=kind.partition(" ")[0], **KINDS[kind])


def same(a, b, ids=(PROMPT, [3, 1, 4])):
    """All states, gates and readouts, bit for bit."""
    one, two = (m.trace([list(i) for i in ids], logits="all") for m in (a, b))
    for x, y in ((one.states, two.states), (one.gate_logit, two.gate_logit), (one.logits, two.logits)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["trained", *RANDOM])
def test_round_trip(tmp_path, name, kind):
    """Tied and untied, grouped heads, odd sizes: the packed model is the checkpoint to the last bit, mapped and copied."""
    model = built(name, kind)
    model.save_packed(tmp_path / "m")
    for mmap in (True, False):
        back = ouro.load(tmp_path / "m", mmap=mmap)
        assert back.compute == model.compute and back.config == model.config and back.kv_dtype == model.kv_dtype
        assert back.info()["mapped"] == mmap
        assert [back.info()[k] for k in ("formats", "weight_bytes")] == [model.info()[k] for k in ("formats", "weight_bytes")]
        same(model, back)
    assert os.path.getsize(tmp_path / "m" / "model.ouro") == 4096 + model.info()["weight_bytes"]


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_reads_the_same_file(tmp_path, kind):
    model = built("trained", kind)
    model.save_packed(tmp_path / "m")
    features = _core.cpu_features().split()
    for isa in ("scalar", *(i for i in ("avx2", "avx512", "neon") if any(f.startswith(i) for f in features))):
        back = ouro.load(tmp_path / "m", isa=isa)
        assert back.info()["kernels"] == isa
        same(model, back)


def test_packed_again_is_the_same_file(tmp_path):
    load("trained", "int4").save_packed(tmp_path / "a")
    ouro.load(tmp_path / "a").save_packed(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    again = ouro.load(tmp_path / "b")
    assert again.generate("One day", max_new_tokens=8).text == load("trained", "int4").generate("One day", max_new_tokens=8).text
    assert again.chat_prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", ["trained", "tiny-gqa-tied", "tiny-sharded"])
def test_error_of_every_group(name):
    """int8: half a step, and what rounding of the scale to bf16 may clip; int4: never worse than half a step of the plain scale
    in square. By the matrices as they are multiplied with."""
    exact, int8, int4 = (load(name, compute) for compute in ("float32", "int8", "int4"))
    for part in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        w, w8, w4 = (m.weight(f"model.layers.0.{part}.weight").astype(np.float64) for m in (exact, int8, int4))
        for k in range(0, w.shape[1], 128):
            g, e = w[:, k : k + 128], np.abs(w - w8)[:, k : k + 128]
            largest = np.abs(g).max(1, keepdims=True)
            assert np.all(e <= largest * (0.5 / 127 * (1 + 2**-8) + 2**-8) + 1e-12)
            assert np.all(np.median(e, axis=1) <= largest[:, 0] / 127 * 0.5 * (1 + 2**-8) + 1e-12)
        for k in range(0, w.shape[1], 64):
            g, e = w[:, k : k + 64], (w - w4)[:, k : k + 64]
            step = np.abs(g).max(1) / 8 * (1 + 2**-8)
            assert np.all((e**2).mean(1) <= (step / 2) ** 2 + step**2 / 64 + 1e-12)


def test_formats_of_parts():
    mixed = {"layers": "int4", "o": "int8", "down": "int8", "head": "bfloat16", "embed": "bfloat16"}
    assert built("trained", "int4 mixed").info()["formats"] == mixed
    assert built("trained", "int8").info()["formats"]["head"] == "bfloat16" and built("trained", "int8").compute == "int8"
    assert built("trained", "int4 mixed").compute == "int4 (o int8, down int8, head bfloat16)"
    assert built("tiny-gqa-tied", "int4").info()["formats"]["embed"] == "int8"
    assert built("tiny-gqa-tied", "int8").info()["formats"]["embed"] == "bfloat16"  # tied: one table
    sizes = [built("trained", k).info()["weight_bytes"] for k in ("int4", "int4 down", "int8 head", "int8", "bfloat16")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5


@pytest.mark.parametrize(("compute", "formats"), [("bfloat16", {"o": "int8"}), (None, {"o": "int8"}), ("int4", {"head": "int4"}),
                                                  ("int4", {"embed": "int4"}), ("int8", {"down": "bfloat16"}), ("int8", {"qkv": "int8"})],
                         ids=str)  # fmt: skip
def test_formats_that_make_no_sense(compute, formats):
    with pytest.raises(ValueError, match="formats"):
        ouro.load("ouro-tiny", compute=compute, formats=formats)


def test_compute_of_a_packed_model(tmp_path):
    """Its own; bfloat16 weights also serve float32, as the checkpoint they came from does."""
    load("trained", "bfloat16").save_packed(tmp_path / "bf16")
    load("trained", "int8").save_packed(tmp_path / "int8")
    same(ouro.load(tmp_path / "bf16", compute="float32"), load("trained", "float32"))
    assert ouro.load(tmp_path / "bf16", compute="bfloat16").kv_dtype == "bfloat16"
    assert ouro.load(tmp_path / "int8", kv_dtype="int8").kv_dtype == "int8"
    for directory, compute in (("bf16", "int8"), ("int8", "int4"), ("int8", "float32")):
        with pytest.raises(ValueError, match=r"packed for compute='(bfloat16|int8)'"):
            ouro.load(tmp_path / directory, compute=compute)
    with pytest.raises(ValueError, match="packed already"):
        ouro.load(tmp_path / "int8", compute="int4", formats={"o": "int8"})
    with pytest.raises(ValueError, match="kv_dtype"):
        ouro.load(tmp_path / "int8", kv_dtype="float32")


def test_config_beside_it_must_fit(tmp_path):
    load("trained", "int8").save_packed(tmp_path / "m")
    edit_config(tmp_path / "m", total_ut_steps=3)
    with pytest.raises(ouro.CheckpointError, match=r"n_steps differs; found 4; expected 3") as caught:
        ouro.load(tmp_path / "m")
    assert caught.value.file == str(tmp_path / "m" / "model.ouro")


# ---- writing ------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    model = load("trained", "bfloat16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="exists already"):
            model.save_packed(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        model.save_packed(tmp_path / "no" / "m")
    model.save_packed(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C, or a full disk, while writing."""
    model = load("trained", "bfloat16")

    class Stopped:
        n = 0

        def __init__(self, **arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
            raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.auto.tqdm", Stopped)
    with pytest.raises(KeyboardInterrupt):
        model.save_packed(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_killed_while_writing(tmp_path):
    """A process that dies half-way leaves no directory of that name, and the next one succeeds."""
    code = ("import os, ouro, ouro.packed as p; m = ouro.load('ouro-tiny'); "
            "p._core.Model; old = p._write_into; p._write_into = lambda *a: (old(*a), os._exit(9)); m.save_packed('m')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 9 and [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    load("trained", "bfloat16").save_packed(tmp_path / "m")
    assert ouro.load(tmp_path / "m")


@pytest.mark.core
def test_progress_reaches_the_end(tmp_path):
    seen = []
    core = load("trained", "int8")._core
    core.save(tmp_path / "w", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (core.info()["weight_bytes"],) * 2
    with pytest.raises(ZeroDivisionError):
        core.save(tmp_path / "other", lambda done, total: 1 / 0)
    with pytest.raises(OSError, match="cannot create"):
        core.save(tmp_path / "no" / "w")
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o666 & ~umask


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "ouro", "quantize", "ouro-tiny", "t", "--compute", "int4", "--formats", "down=int8"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "int4 (down int8)" in done.stderr, done.stderr
    same(ouro.load(tmp_path / "t"), built("trained", "int4 down"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1 and "exists already" in done.stderr and "Traceback" not in done.stderr


# ---- in use -------------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("how", ["cut", "longer", "touched", "replaced", "removed"])
def test_file_that_changes_while_it_is_mapped(tmp_path, how):
    """Cut short, its pages would be fatal to touch: refused before. A new file of the name, or none, does no harm."""
    load("trained", "int8").save_packed(tmp_path / "m")
    path = tmp_path / "m" / "model.ouro"
    model, copied = ouro.load(tmp_path / "m"), ouro.load(tmp_path / "m", mmap=False)
    before = model.generate(PROMPT, max_new_tokens=4).token_ids
    loop = model.stream(PROMPT, max_new_tokens=40, eos_token_id=[])
    next(loop)
    if how == "cut":
        os.truncate(path, 5000)
    elif how == "longer":
        os.truncate(path, path.stat().st_size + 1)
    elif how == "touched":
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        shutil.copyfile(path, tmp_path / "n")
        os.replace(tmp_path / "n", path)
    else:
        path.unlink()
    if how in ("replaced", "removed"):
        assert model.generate(PROMPT, max_new_tokens=4).token_ids == before
    else:
        for work in (lambda: model.generate(PROMPT, max_new_tokens=4), lambda: model.trace(PROMPT), lambda: next(loop),
                     lambda: model._core.readout(np.zeros((1, 128), np.float32), False)):  # fmt: skip
            with pytest.raises(ouro.CheckpointError, match="changed while"):
                work()
    assert copied.generate(PROMPT, max_new_tokens=4).token_ids == before


@pytest.mark.core
def test_concurrent_loads_and_work(tmp_path):
    """Several threads open one file while others run a model on it."""
    load("trained", "int8").save_packed(tmp_path / "m")
    running, stop = ouro.load(tmp_path / "m"), threading.Event()
    want = running.generate(PROMPT, max_new_tokens=6).token_ids

    def work():
        while not stop.is_set():
            assert running.generate(PROMPT, max_new_tokens=6).token_ids == want

    def open_and_run(i):
        return ouro.load(tmp_path / "m", mmap=i % 2 == 0, verify=i % 3 > 0).generate(PROMPT, max_new_tokens=6).token_ids

    with ThreadPoolExecutor(6) as crew:
        worker = crew.submit(work)
        found = list(crew.map(open_and_run, range(12)))
        stop.set()
        worker.result()
    assert found == [want] * 12


def test_nothing_is_left_open(tmp_path):
    load("trained", "int8").save_packed(tmp_path / "m")
    before = len(os.listdir("/proc/self/fd"))
    for mmap in (True, False):
        model = ouro.load(tmp_path / "m", mmap=mmap, threads=1)
        del model
    assert len(os.listdir("/proc/self/fd")) == before
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "m") not in maps


# ---- the C API ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The C example, built with the compiler at hand."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("needs a C compiler and the sources")
    out = tmp_path_factory.mktemp("example") / "generate"
    sources = [p for d in ("base", "model", "engine", "tap") for p in (CSRC / d).glob("*.c")]
    sources += [CSRC / "kernels" / f"{name}.c" for name in ("scalar", "pack", "dispatch")]
    command = [compiler, "-std=c11", "-O2", "-D_GNU_SOURCE", "-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, CSRC / "example" / "generate.c", *sources, "-lm", "-ldl", "-pthread", "-o", out], check=True)
    return out


def run(example, *arguments):
    return subprocess.run([example, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_c_program_gives_the_same_tokens(example, tmp_path, kind):
    model = built("trained", kind)
    model.save_packed(tmp_path / "m")
    made = run(example, tmp_path / "m" / "model.ouro", *PROMPT)
    assert [int(i) for i in made.stdout.split()] == model.generate(PROMPT, max_new_tokens=16, eos_token_id=[]).token_ids


def test_c_program_refuses_damage(example, tmp_path):
    path = tmp_path / "m.ouro"
    load("tiny-gqa-tied")._core.save(path)
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole[:20] + b"\7" + whole[21:], whole[:-9] + b"\1" + whole[-8:]):
        path.write_bytes(data)
        done = run(example, path, 1)
        assert done.returncode == 1 and "bad format" in done.stderr and "m.ouro" in done.stderr
    assert "system error" in run(example, tmp_path / "none", 1).stderr


def test_directory_is_what_the_docs_say(tmp_path):
    load("trained", "bfloat16").save_packed(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "model.ouro", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja"}  # fmt: skip
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "ouro"
