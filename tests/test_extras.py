"""A library of an extra that is not there is named together with the extra."""

import sys

import pytest

from ouro.extras import did_you_mean, need


def test_missing_library_names_the_extra(tiny, monkeypatch):
    from ouro.plots import plot_steps

    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden("matplotlib"), *sys.meta_path])
    with pytest.raises(ImportError, match=r"matplotlib is not installed.*ouro-lm\[notebook\]"):
        plot_steps(tiny.trace("One day"))


class Hidden:
    """Finds nothing of that name."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_library_that_is_there_and_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "brokenlib.py").write_text("import no_such_library_of_its_own")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library_of_its_own"):
        need("brokenlib", "notebook")


def test_near_names():
    assert did_you_mean("ouro-tyni", ["ouro-tiny"]) == "; did you mean 'ouro-tiny'?"
    assert did_you_mean("xyz", ["ouro-tiny"]) == ""
