"""The notebooks as they are stored: valid, executed, small, and free of errors and of the machine they ran on.

That they run is the business of .ci/stages/75-notebooks.sh; that their code compiles and calls names that exist, of this file.
"""

import ast
import json
import re
from pathlib import Path

import pytest

import ouro

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 150_000


def cells(path, kind):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def text_of(output):
    data = {"text": output.get("text", "")} | {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return "".join("".join(v) for v in data.values())


def test_all_seven_are_there_and_listed():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{i:02d}" for i in range(1, 8)]
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in NOTEBOOKS if f"({p.name})" not in listed] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_valid_and_executed(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["name"]) == (4, "python3")
    try:
        import nbformat
    except ImportError:
        pass
    else:
        nbformat.validate(book)
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert outputs and {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(o.get("name") == "stderr" for o in outputs)
    silent = [c for c in cells(path, "code") if not c["outputs"]]
    assert len(silent) <= 3, "cells that show nothing"
    assert path.stat().st_size <= LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_nothing_of_the_machine(path):
    shown = "\n".join(text_of(o) for c in cells(path, "code") for o in c["outputs"])
    source = "\n".join("".join(c["source"]) for kind in ("code", "markdown") for c in cells(path, kind))
    for text in (shown, source):
        assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|opt|usr|mnt|Users|var)/\S*", text) == []
        assert "0x7f" not in text and "site-packages" not in text
    assert "<script" not in shown and "src=" not in shown and "http" not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_says_what_it_can_show_and_how_to_take_the_real_weights(path):
    words = "".join("".join(c["source"]) for c in cells(path, "markdown"))
    assert "ouro-tiny" in words and "TEXT-" not in words
    first = "".join(cells(path, "code")[0]["source"])
    assert 'MODEL = "ByteDance/Ouro-1.4B"' in first and 'MODEL = "ouro-tiny"' in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_names_of_the_package_exist(path):
    """Each `ouro.a.b` that a cell names is there: a renamed function is noticed before the notebooks run."""
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            chain = []
            while isinstance(node, ast.Attribute):
                chain.append(node.attr)
                node = node.value
            if not (isinstance(node, ast.Name) and node.id == "ouro" and chain):
                continue
            found = ouro
            for name in reversed(chain):
                if not hasattr(found, name) and name == "probes":
                    pytest.importorskip("sklearn")
                found = getattr(found, name)
                if not hasattr(found, "__path__"):
                    break
