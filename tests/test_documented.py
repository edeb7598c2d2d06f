"""What is documented runs: examples in docstrings, Python blocks and command lines of README.md and docs/*.md, all offline.

In Markdown the Python blocks of one file run in order in one namespace and an empty directory. A block with `>>>` is held
to the output it shows. A line `<!-- not run: reason -->` before a block leaves it out (it must still compile), and a block
that needs an extra which is not installed is skipped. Command lines (`    ouro ...`) must parse, and the quick ones run.
"""

import doctest
import importlib
import pkgutil
import re
import shlex
import socket
from pathlib import Path

import pytest

import ouro
from ouro import cli

ROOT = Path(__file__).parent.parent
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.is_file()]
MODULES = ["ouro", *sorted(m.name for m in pkgutil.walk_packages(ouro.__path__, "ouro.") if not m.name.endswith("__main__"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXTRAS = {"matplotlib", "pandas", "xarray", "sklearn", "joblib", "torch", "IPython"}
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^>\n]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^    (ouro [a-z][^\n]*)$", re.M)
QUICK = {"generate", "chat", "inspect", "info", "quantize"}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty directory, no network, no window, no input."""

    def refuse(*arguments):
        raise OSError("an example wants the network: give it a `not run` line")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("builtins.input", lambda prompt="": "")
    monkeypatch.chdir(tmp_path)


def run_doctest(test):
    said = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=said.append)
    if runner.failures:
        pytest.fail("".join(said))


def skip_for_extra(error):
    """Skip when what is missing is an extra; everything else stays an error."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in EXTRAS:
        pytest.skip(f"needs {error.name}")
    raise error


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, offline):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        skip_for_extra(error)
    for test in doctest.DocTestFinder().find(module, name):
        if test.examples:
            run_doctest(test)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks(page, offline):
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    assert text.count("```python") == len(FENCE.findall(text)), "a block is not closed, or its not-run line is malformed"
    for block in FENCE.finditer(text):
        code, line = block["code"], text[: block.start("code")].count("\n")
        where = f"{page.name} line {line + 1}"
        if block["why"]:
            if ">>>" not in code:
                compile(code, where, "exec")
        elif ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, where, str(page), line)
            test.globs = names  # what one block names the next may use
            said = []
            runner = doctest.DocTestRunner(optionflags=FLAGS)
            runner.run(test, out=said.append, clear_globs=False)
            assert not runner.failures, "".join(said)
        else:
            try:
                exec(compile("\n" * line + code, str(page), "exec"), names)
            except ImportError as error:
                skip_for_extra(error)


def commands():
    for page in PAGES:
        for line in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(re.split(r"\s[>|&]", line)[0], comments=True)
            if not any(w.isupper() or w.startswith("[") for w in words):  # a form to fill in, not a command
                yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_command_lines(words, offline, capsys):
    arguments = cli.parser().parse_args(words)
    if arguments.command in QUICK and "/" not in getattr(arguments, "model", ""):
        if getattr(arguments, "plot", None):
            pytest.importorskip("matplotlib")
        assert cli.main(words) == 0, capsys.readouterr().err


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("[CT]*.md"))], ids=lambda p: p.name)
def test_links_between_files(page):
    """Links inside the repository lead somewhere, and every page of docs/ is in the index."""
    found = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in found if not (page.parent / link).exists()] == []
    if page == ROOT / "docs" / "README.md":
        assert {p.name for p in page.parent.glob("*.md")} - {"README.md"} <= set(found)


def test_every_source_file_has_its_place_in_the_tour():
    """docs/internals.md names every file of the core and of the package, or the folder of a subpackage; and nothing that is not there."""
    named = set(re.findall(r"`(?:[\w.]+/)*([\w*]+\.(?:c|h|py))`", (text := (ROOT / "docs" / "internals.md").read_text())))
    core = {p.name for p in (ROOT / "csrc").rglob("*.c") if not p.name.startswith("test_")}
    package = {p.name for p in (ROOT / "ouro").glob("*.py") if not p.name.startswith("__")}
    assert sorted((core | package) - named) == []
    folders = {f"ouro/{p.parent.name}" for p in (ROOT / "ouro").glob("*/__init__.py")}
    assert sorted(f for f in folders if f not in text) == []
    there = {p.name for top in ("csrc", "ouro", "tests") for p in (ROOT / top).rglob("*") if p.suffix in (".c", ".h", ".py")}
    assert sorted(n for n in named - there if "*" not in n) == []
