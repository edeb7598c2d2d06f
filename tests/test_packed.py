"""Packed files and the C API: written, read by a C program, refused when damaged."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load

import ouro

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The C example, built with the compiler at hand."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("needs a C compiler and the sources")
    out = tmp_path_factory.mktemp("example") / "generate"
    sources = [p for d in ("base", "model", "engine") for p in (CSRC / d).glob("*.c")]
    sources += [CSRC / "kernels" / f"{name}.c" for name in ("scalar", "pack", "dispatch")]
    command = [compiler, "-std=c11", "-O2", "-D_GNU_SOURCE", "-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, CSRC / "example" / "generate.c", *sources, "-lm", "-ldl", "-pthread", "-o", out], check=True)
    return out


def run(example, *arguments):
    return subprocess.run([example, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8", "int4"])
def test_c_program_gives_the_same_tokens(example, tmp_path, compute):
    model, prompt = load("trained", compute), [40, 455, 288, 571, 500]
    model.save_packed(tmp_path / "m.ouro")
    made = run(example, tmp_path / "m.ouro", *prompt)
    assert [int(i) for i in made.stdout.split()] == model.generate(prompt, max_new_tokens=16, eos_token_id=[]).token_ids


def test_damage_is_refused(example, tmp_path):
    path = tmp_path / "m.ouro"
    load("tiny-gqa-tied").save_packed(path)
    whole = path.read_bytes()
    cases = {"magic": b"X" + whole[1:], "version": whole[:8] + b"\2" + whole[9:], "header": whole[:20] + b"\7" + whole[21:],
             "short": whole[:50], "truncated": whole[:-1], "weights": whole[:-9] + b"\1" + whole[-8:], "empty": b""}  # fmt: skip
    for name, data in cases.items():
        path.write_bytes(data)
        done = run(example, path, 1)
        assert done.returncode == 1 and "bad format" in done.stderr and "m.ouro" in done.stderr, name
    assert "system error" in run(example, tmp_path / "none", 1).stderr


def test_unwritable(tmp_path):
    with pytest.raises(OSError, match="cannot create"):
        load("trained", "bfloat16").save_packed(tmp_path / "no" / "m.ouro")
    done = subprocess.run([sys.executable, "-m", "ouro", "pack", str(tmp_path / "t.ouro")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "t.ouro").read_bytes()[:8] == b"OUROPACK"
    assert ouro.load("ouro-tiny").info()["weight_bytes"] + 4096 == (tmp_path / "t.ouro").stat().st_size
