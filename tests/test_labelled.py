"""Labelled results: picking, reducing, tables; NaN is never counted."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ouro.labelled import LabelledArray, LabelledSet


@pytest.fixture
def ragged():
    """[step 3, batch 2, pos 4], the second sequence one token short; tokens by (batch, pos)."""
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    values[:, 1, 3] = np.nan
    tokens = np.array([["a", "b", "c", "d"], ["e", "a", "b", ""]])
    return LabelledArray(values, ("step", "batch", "pos"), {"step": [1, 2, 3], "token": (("batch", "pos"), tokens)}, name="loss",
                         attrs={"units": "nats"})  # fmt: skip


def test_picking_by_label_and_by_number(ragged):
    assert ragged.sel(step=2).dims == ("batch", "pos")
    assert np.array_equal(ragged.sel(step=2, batch=0), ragged.values[1, 0])
    assert np.array_equal(ragged.sel(step=[3, 1]), ragged.values[[2, 0]], equal_nan=True)
    assert np.array_equal(ragged.sel(step=slice(2, 3)), ragged.values[1:], equal_nan=True), "both ends are included"
    assert ragged.isel(pos=-1, step=0).coords["token"].tolist() == ["d", ""]
    both = ragged.isel(step=[0, 2], pos=[1, 0])
    assert np.array_equal(both, ragged.values[np.ix_([0, 2], [0, 1], [1, 0])])
    assert both.coords["token"].tolist() == [["b", "a"], ["a", "e"]]
    floats = LabelledArray([1, 2], ("q",), {"q": [0.1, 0.3]})
    assert floats.sel(q=0.1 + 0.2).values == 2


@pytest.mark.parametrize(
    "wrong, message",
    [({"step": 0}, "step has 1, 2, 3"), ({"setp": 1}, "near: 'step'"), ({"step": [1, 9]}, "step=9 does not exist")],
)
def test_wrong_labels_name_what_there_is(ragged, wrong, message):
    with pytest.raises(KeyError, match=message):
        ragged.sel(**wrong)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="one distinct name for each axis"):
        LabelledArray(np.zeros((2, 3)), ("step",))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        LabelledArray(np.zeros(2), ("step",), {"step": [1, 2, 3]})
    with pytest.raises(ValueError, match="runs over"):
        LabelledArray(np.zeros(2), ("step",), {"token": (("pos",), ["a"])})
    with pytest.raises(ValueError, match="another array of the set"):
        LabelledSet({"a": LabelledArray(np.zeros((2, 1)), ("step", "pos")), "b": LabelledArray(np.zeros(3), ("step",))})


def test_means_do_not_count_what_is_missing(ragged):
    flat = ragged.values.reshape(3, -1)
    assert np.allclose(ragged.mean("batch", "pos"), [row[~np.isnan(row)].mean() for row in flat])
    assert ragged.mean().dims == () and float(ragged.mean()) == pytest.approx(np.nanmean(ragged.values))
    nothing = LabelledArray([[np.nan, np.nan], [1, 3]], ("a", "b")).mean("b")
    assert np.isnan(nothing.values[0]) and nothing.values[1] == 2
    grouped = ragged.group_mean("token")
    assert grouped.dims == ("step", "token") and list(grouped.coords["token"]) == list("abcde")
    assert np.allclose(grouped.sel(token="a"), ragged.values[:, [0, 1], [0, 1]].mean(1))


def test_tidy_table(ragged):
    pytest.importorskip("pandas")
    table = ragged.to_dataframe()
    assert list(table.columns) == ["step", "batch", "pos", "token", "loss"] and len(table) == 24
    row = table[(table.step == 2) & (table.batch == 1) & (table.pos == 0)]
    assert row.token.item() == "e" and row.loss.item() == 12
    assert len(ragged.to_dataframe(dropna=True)) == 21


def test_set_shares_axes(ragged):
    pd, xr = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    s = LabelledSet({"steps": LabelledArray(np.ones((4, 2)), ("pos", "batch")), "loss": ragged}, title="both")
    assert s.dims == ("step", "batch", "pos") and s.sizes == {"step": 3, "batch": 2, "pos": 4}
    assert s.sel(step=1)["steps"].dims == ("pos", "batch") and s.sel(step=1)["loss"].dims == ("batch", "pos")
    assert s.mean("pos")["steps"].values.tolist() == [1, 1]
    table = s.to_dataframe()
    assert list(table.columns) == ["step", "batch", "pos", "token", "steps", "loss"] and len(table) == 24
    pd.testing.assert_frame_equal(s.to_dataframe("loss"), ragged.to_dataframe())
    assert isinstance(s.to_xarray(), xr.Dataset)
    with pytest.raises(KeyError, match="near: 'loss'"):
        s["los"]


def test_xarray_has_the_same(ragged):
    pytest.importorskip("xarray")
    x = ragged.to_xarray()
    assert x.dims == ragged.dims and x.attrs["units"] == "nats" and x.name == "loss"
    assert np.array_equal(x.sel(step=2), ragged.sel(step=2), equal_nan=True)
    assert x.coords["token"].values.tolist() == ragged.coords["token"].tolist()


def test_html_has_no_script_and_escapes():
    a = LabelledArray([1.0], ("pos",), {"pos": ["<script>"]}, name="<b>", attrs={"formula": "a < b"})
    page = a._repr_html_() + LabelledSet({"x<y": a}, title="<i>")._repr_html_()
    assert "<script" not in page and "<i>" not in page and "a &lt; b" in page


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_any_result_can_be_drawn(ragged, style):
    plt = pytest.importorskip("matplotlib.pyplot")
    with plt.style.context(style):
        for what in (ragged, ragged.mean("batch", "pos"), ragged.mean("batch"), LabelledSet({"loss": ragged})):
            ax = what.plot()
            assert "loss" in ax.get_title() and ax.get_xlabel()
            plt.close(ax.figure)
        _, ax = plt.subplots()
        assert ragged.mean("pos", "batch").plot(ax=ax) is ax
        plt.close(ax.figure)
    with pytest.raises(ValueError, match="nothing to draw"):
        ragged.mean().plot()


def test_extras_are_imported_only_when_asked_for():
    code = ("import sys, ouro, ouro.labelled, ouro.plots; ouro.LabelledArray([1.], ('pos',))._repr_html_();"
            "assert not {'xarray', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
