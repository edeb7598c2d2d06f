"""The OpenBLAS that ships in the package: opened by its full path, free of other BLAS, right, and never silently absent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import load
from paths import TINY

import ouro
from ouro import loading

needs_blas = pytest.mark.skipif(loading.blas_library() is None, reason="no OpenBLAS in this installation")
TEXT = "Ann is the boss of Bob. Bob is the teacher of Cid. Who is the boss of the teacher of Cid?"


@needs_blas
def test_opens_by_path_from_anywhere(tmp_path: Path):
    """Its Fortran runtime is found beside it: no search path of the environment helps."""
    code = f"import ctypes; print(bool(ctypes.CDLL({str(loading.blas_library())!r}).scipy_cblas_sgemm))"
    clean = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert run.stdout.strip() == "True", run.stderr


@needs_blas
def test_licences_come_along():
    library = loading.blas_library()
    assert library is not None
    texts = [p.read_text(errors="replace") for p in library.parent.iterdir() if "LICENSE" in p.name]
    assert any(re.search("OpenBLAS|Redistribution", t) for t in texts)


@needs_blas
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_trace_agrees_to_rounding(threads: int):
    exact = load("trained").trace(TEXT, logits="all")
    model = load("trained", exact=False, threads=threads)
    loose = model.trace(TEXT, logits="all")
    assert model.info()["blas"].startswith("OpenBLAS")
    for name in ("states", "gate_logit", "logits"):
        a, b = getattr(exact, name), getattr(loose, name)
        assert np.abs(a - b).max() < 2e-5 * np.abs(a).max(), name


def test_exact_does_not_open_it():
    assert not load("trained").info()["blas"]


def test_absent_library_is_an_error_only_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "blas_library", lambda: None)
    with pytest.raises(OSError, match="OpenBLAS"):
        ouro.load(TINY, compute="float32", exact=False)
    assert ouro.load(TINY, compute="float32").generate("One day", max_new_tokens=2).token_ids


def test_what_is_no_blas_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "libscipy_openblas.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(loading, "blas_library", lambda: broken)
    with pytest.raises((OSError, RuntimeError, ouro.OuroError), match=str(broken)):
        ouro.load(TINY, compute="float32", exact=False)
