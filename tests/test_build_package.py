"""What is installed: data, command and dependencies, and which shared libraries the extension and OpenBLAS look for."""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ouro
from ouro import _core

PACKAGE = Path(ouro.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_libs/*.so*"))


def dynamic_section(path: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout


def test_data_of_the_package_is_there():
    for name in ("py.typed", "_core.pyi", "models/ouro-tiny/config.json", "models/ouro-tiny/tokenizer.json"):
        assert (PACKAGE / name).is_file(), name
    assert list((PACKAGE / "models" / "ouro-tiny").glob("*.safetensors"))


def test_metadata_and_command():
    try:
        found = importlib.metadata.distribution("ouro-lm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert found.version == ouro.__version__
    assert [e.value for e in found.entry_points if e.name == "ouro"] == ["ouro.cli:main"]
    needed = {re.split(r"[^\w-]", r)[0] for r in found.requires or [] if "extra ==" not in r}
    assert needed == {"numpy", "tokenizers", "huggingface_hub", "jinja2", "tqdm"}


def test_extension_needs_only_the_system():
    """No BLAS: that one is opened later, by path."""
    text = dynamic_section(Path(_core.__file__))
    needed = {re.split(r"\.so", n)[0] for n in re.findall(r"NEEDED.*\[(.+)\]", text)}
    system = r"(lib(c|m|dl|pthread|gcc_s|python[\d.]+)|ld-linux.*)"
    sanitizers = r"lib(a|ub|t)san"
    assert needed and all(re.fullmatch(f"{system}|{sanitizers}", n) for n in needed), needed


@pytest.mark.skipif(not LIBRARIES, reason="no OpenBLAS in this installation")
def test_libraries_find_each_other_beside_them():
    here = {p.name for p in LIBRARIES}
    for library in LIBRARIES:
        text = dynamic_section(library)
        bundled = [n for n in re.findall(r"NEEDED.*\[(.+)\]", text) if re.match("lib(gfortran|quadmath)", n)]
        assert set(bundled) <= here, library.name
        assert not bundled or "$ORIGIN" in text, library.name
