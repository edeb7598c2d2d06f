"""Labelled results: NumPy arrays that know the names of their axes.

Everything that measures a model returns a `LabelledArray`, or several in a `LabelledSet`. They carry what a picture or a table
needs and no more; `to_xarray` and `to_dataframe` go on to the real thing (the notebook extra), which is imported only then.

Axes have one name everywhere: `batch, pos, step, layer, head, d_model, d_head, d_mlp, d_vocab, dest_pos, src_pos`. A value
that does not exist (beyond a sequence's length, the change before the first step) is NaN and is never counted.
"""

from __future__ import annotations

import difflib
import html
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ouro.extras import need

Coord = tuple[tuple[str, ...], NDArray[Any]]


def _coords(given: Mapping[str, Any], dims: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, Coord]:
    """Every coordinate as (dims, values), checked; a dimension that has none is numbered from 0."""
    sizes = dict(zip(dims, shape, strict=True))
    out: dict[str, Coord] = {}
    for name, value in given.items():
        over, labels = value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) else ((name,), value)
        labels = np.asarray(labels)
        if not set(over) <= set(dims):
            raise ValueError(f"coordinate {name!r} runs over {over}, the array has {dims}")
        if labels.shape != tuple(sizes[d] for d in over):
            raise ValueError(f"coordinate {name!r} has shape {labels.shape}, expected {tuple(sizes[d] for d in over)} for {over}")
        out[name] = (over, labels)
    return {d: ((d,), np.arange(sizes[d])) for d in dims if d not in out} | out


def _position(labels: NDArray[Any], wanted: Any, dim: str) -> int:
    """Index of a label; a missing one names what there is."""
    found = np.flatnonzero(labels == wanted)
    if not len(found) and labels.dtype.kind == "f":
        found = np.flatnonzero(np.isclose(labels, wanted))
    if not len(found):
        near = difflib.get_close_matches(str(wanted), [str(x) for x in labels])
        has = ", ".join(str(x) for x in labels[:12]) + (", ..." if len(labels) > 12 else "")
        raise KeyError(f"{dim}={wanted!r} does not exist{f'; near: {near}' if near else ''}; {dim} has {has}")
    return int(found[0])


def _where(labels: NDArray[Any], wanted: Any, dim: str) -> Any:
    """An index for one label, a list of labels, or a slice of labels (both ends included, as in xarray)."""
    if isinstance(wanted, slice):
        if wanted.step is not None:
            raise ValueError(f"{dim}: a slice of labels has no step")
        begin = 0 if wanted.start is None else _position(labels, wanted.start, dim)
        end = len(labels) if wanted.stop is None else _position(labels, wanted.stop, dim) + 1
        return slice(begin, end)
    if isinstance(wanted, (list, tuple, np.ndarray)):
        return np.array([_position(labels, w, dim) for w in wanted], int)
    return _position(labels, wanted, dim)


class LabelledArray:
    """An array with names.

    Parameters
    ----------
    values : array
    dims : sequence of str
        One name for each axis.
    coords : mapping, optional
        Labels: `{dim: 1-d labels}`, or `{name: ((dim, ...), labels)}` for a further one that runs over some of the axes, such
        as `token` over `(batch, pos)`. An axis without labels is numbered from 0.
    name : str
        What is measured; the column of `to_dataframe`.
    attrs : mapping, optional
        `units`, `formula`, `source` and whatever else belongs beside the numbers.
    plotter : str
        The function of `ouro.plots` that `.plot()` calls.

    Examples
    --------
    >>> from ouro.labelled import LabelledArray
    >>> a = LabelledArray([[1.0, 2.0], [3.0, float("nan")]], ("step", "pos"), name="entropy", attrs={"units": "nats"})
    >>> a.sel(step=1).values
    array([ 3., nan])
    >>> a.mean("pos").values
    array([1.5, 3. ])
    >>> a
    LabelledArray 'entropy' [nats] (step=2, pos=2)
    [[ 1.  2.]
     [ 3. nan]]
    """

    def __init__(
        self,
        values: ArrayLike,
        dims: Sequence[str],
        coords: Mapping[str, Any] | None = None,
        *,
        name: str = "value",
        attrs: Mapping[str, Any] | None = None,
        plotter: str = "plot_array",
    ) -> None:
        self.values: NDArray[Any] = np.asarray(values)
        self.dims = tuple(dims)
        if len(self.dims) != self.values.ndim or len(set(self.dims)) != len(self.dims):
            raise ValueError(f"array of shape {self.values.shape} with dims {self.dims}: expected one distinct name for each axis")
        self._coords = _coords(coords or {}, self.dims, self.values.shape)
        self.name = name
        self.attrs = dict(attrs or {})
        self.plotter = plotter

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.values.shape

    @property
    def sizes(self) -> dict[str, int]:
        """Size by axis name."""
        return dict(zip(self.dims, self.values.shape, strict=True))

    @property
    def coords(self) -> dict[str, NDArray[Any]]:
        """Labels by name; those that are no axis of their own included."""
        return {name: labels for name, (_, labels) in self._coords.items()}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.values.astype(dtype or self.values.dtype, copy=bool(copy))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        """NumPy indexing of the values; `sel` and `isel` keep the names."""
        return self.values[index]

    def __float__(self) -> float:
        return float(self.values)

    def _axis(self, dim: str) -> int:
        if dim not in self.dims:
            near = difflib.get_close_matches(dim, self.dims)
            raise KeyError(f"no axis {dim!r}{f' (near: {near[0]!r})' if near else ''}; there are {self.dims}")
        return self.dims.index(dim)

    def _like(self, values: NDArray[Any], dims: tuple[str, ...], coords: Mapping[str, Any]) -> LabelledArray:
        return LabelledArray(values, dims, coords, name=self.name, attrs=self.attrs, plotter=self.plotter)

    def with_values(self, values: ArrayLike, *, name: str | None = None, attrs: Mapping[str, Any] | None = None) -> LabelledArray:
        """Other values of the same shape on the same axes and coordinates; name and attributes unless given.

        >>> from ouro.labelled import LabelledArray
        >>> a = LabelledArray([1.0, 2.0], ("step",), name="loss")
        >>> a.with_values(a.values - 1, name="above").sel(step=1).values
        array(1.)
        """
        given = np.asarray(values)
        if given.shape != self.shape:
            raise ValueError(f"values have shape {given.shape}, expected {self.shape}")
        chosen = self.attrs if attrs is None else attrs
        return LabelledArray(given, self.dims, self._coords, name=name or self.name, attrs=chosen, plotter=self.plotter)

    # -- picking -----------------------------------------------------------------------------------------------------

    def isel(self, **indices: Any) -> LabelledArray:
        """Pick by number: an int drops the axis, a slice or a list keeps it."""
        key: list[Any] = [slice(None)] * self.values.ndim
        for dim, index in indices.items():
            key[self._axis(dim)] = np.asarray(index) if isinstance(index, (list, tuple)) else index
        values = self.values
        coords: dict[str, Coord] = {}
        for axis in range(len(key) - 1, -1, -1):  # one axis at a time: lists of two axes pick a grid, as in xarray
            values = values[(slice(None),) * axis + (key[axis],)]
        dims = tuple(d for d, k in zip(self.dims, key, strict=True) if not isinstance(k, (int, np.integer)))
        picked = dict(zip(self.dims, key, strict=True))
        for name, (over, labels) in self._coords.items():
            for axis in range(len(over) - 1, -1, -1):
                labels = labels[(slice(None),) * axis + (picked[over[axis]],)]
            coords[name] = (tuple(d for d in over if d in dims), labels)
        return self._like(values, dims, {n: c for n, c in coords.items() if c[0]})

    def sel(self, **labels: Any) -> LabelledArray:
        """Pick by label: one label drops the axis, a list or a slice (both ends included) keeps it.

        Raises
        ------
        KeyError
            For a label or an axis that does not exist, naming those that do.
        """
        for dim in labels:
            self._axis(dim)
        return self.isel(**{d: _where(self._coords[d][1], w, d) for d, w in labels.items()})

    # -- reducing ----------------------------------------------------------------------------------------------------

    def mean(self, *dims: str) -> LabelledArray:
        """Mean over the named axes (all when none is named); NaN is not counted, a mean of nothing is NaN."""
        axes = tuple(self._axis(d) for d in (dims or self.dims))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
            values = np.nanmean(self.values.astype(np.float64, copy=False), axis=axes)
        left = tuple(d for d in self.dims if d not in (dims or self.dims))
        coords = {n: c for n, c in self._coords.items() if set(c[0]) <= set(left)}
        return self._like(np.asarray(values), left, coords)

    def group_mean(self, by: str) -> LabelledArray:
        """Mean over the axes of the coordinate `by`, apart for each of its labels (a new axis `by`, last, sorted).

        >>> from ouro.labelled import LabelledArray
        >>> a = LabelledArray([1.0, 2.0, 6.0], ("pos",), {"kind": (("pos",), ["word", "mark", "word"])})
        >>> a.group_mean("kind").coords["kind"], a.group_mean("kind").values
        (array(['mark', 'word'], dtype='<U4'), array([2. , 3.5]))
        """
        if by not in self._coords:
            raise KeyError(f"no coordinate {by!r}; there are {', '.join(self._coords)}")
        over, labels = self._coords[by]
        axes = [self._axis(d) for d in over]
        rest = [i for i in range(self.values.ndim) if i not in axes]
        flat = np.transpose(self.values.astype(np.float64, copy=False), rest + axes)
        flat = flat.reshape(*flat.shape[: len(rest)], -1)
        kinds = [k for k in np.unique(labels.astype(str)) if k]
        columns = [flat[..., labels.astype(str).reshape(-1) == k] for k in kinds]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
            values = np.stack([np.nanmean(c, axis=-1) for c in columns], axis=-1)
        dims = tuple(self.dims[i] for i in rest)
        coords = {n: c for n, c in self._coords.items() if set(c[0]) <= set(dims)}
        return self._like(values, (*dims, by), {**coords, by: np.array(kinds)})

    # -- going on ----------------------------------------------------------------------------------------------------

    def to_dataframe(self, *, dropna: bool = False) -> Any:
        """A tidy pandas DataFrame: one row per value, a column per axis and further coordinate, and the value under its name."""
        pd = need("pandas", "notebook")
        return pd.DataFrame(_dropped(_columns(self, self.dims, self.sizes) | {self.name: self.values.reshape(-1)}, [self.name], dropna))

    def to_xarray(self) -> Any:
        """An `xarray.DataArray` with the same axes, coordinates and attributes."""
        xr = need("xarray", "notebook")
        return xr.DataArray(self.values, dims=self.dims, coords=dict(self._coords), name=self.name, attrs=self.attrs)

    def plot(self, ax: Any = None, **arguments: Any) -> Any:
        """Draw it with the `ouro.plots` function that fits; returns the matplotlib Axes."""
        return getattr(importlib.import_module("ouro.plots"), self.plotter)(self, ax=ax, **arguments)

    # -- showing -----------------------------------------------------------------------------------------------------

    def _size_text(self) -> str:
        units = f"[{self.attrs['units']}] " if self.attrs.get("units") else ""
        return f"{units}({', '.join(f'{d}={n}' for d, n in self.sizes.items())})"

    def _head(self) -> str:
        return f"{self.name!r} {self._size_text()}"

    def __repr__(self) -> str:
        body = np.array2string(self.values, precision=4, threshold=40, edgeitems=2, suppress_small=True)
        return f"{type(self).__name__} {self._head()}\n{body}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(n)}</td><td>{html.escape(str(over))}</td><td>{html.escape(_short(labels))}</td></tr>"
            for n, (over, labels) in self._coords.items()
        )
        notes = "".join(f"<div><small>{html.escape(str(k))}: {html.escape(str(v))}</small></div>" for k, v in self.attrs.items())
        body = html.escape(np.array2string(self.values, precision=4, threshold=40, edgeitems=2, suppress_small=True))
        return f"<div><b>{html.escape(self._head())}</b>{notes}<table>{rows}</table><pre>{body}</pre></div>"


def _short(labels: NDArray[Any]) -> str:
    flat = labels.reshape(-1)
    return ", ".join(str(x) for x in flat[:8]) + (f", ... ({flat.size})" if flat.size > 8 else "")


def _columns(a: LabelledArray, dims: tuple[str, ...], sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Every coordinate of `a`, spread over all of `dims` and flattened."""
    shape = tuple(sizes[d] for d in dims)
    ordered = {d: a._coords[d] for d in a.dims} | a._coords
    return {name: np.broadcast_to(_spread(labels, over, dims), shape).reshape(-1) for name, (over, labels) in ordered.items()}


def _spread(values: NDArray[Any], over: tuple[str, ...], dims: tuple[str, ...]) -> NDArray[Any]:
    """`values` with axes `over`, transposed and given axes of size 1, so that it broadcasts over `dims`."""
    order = [over.index(d) for d in dims if d in over]
    return np.transpose(values, order)[tuple(slice(None) if d in over else None for d in dims)]


def _dropped(columns: dict[str, NDArray[Any]], names: list[str], dropna: bool) -> dict[str, NDArray[Any]]:
    """The columns without the rows where all of `names` are missing."""
    if not dropna:
        return columns
    real = np.any([~np.isnan(columns[n]) if columns[n].dtype.kind == "f" else np.ones(len(columns[n]), bool) for n in names], axis=0)
    return {n: c[real] for n, c in columns.items()}


class LabelledSet(Mapping[str, LabelledArray]):
    """Several labelled arrays that share axes, by name.

    Parameters
    ----------
    arrays : mapping of str to LabelledArray
    title : str
        What they are together.
    attrs : mapping, optional
    plotter : str
        The function of `ouro.plots` that `.plot()` calls with the whole set.

    Examples
    --------
    >>> from ouro.labelled import LabelledArray, LabelledSet
    >>> s = LabelledSet({"loss": LabelledArray([2.0, 1.5], ("step",), name="loss")}, title="by step")
    >>> s["loss"].sel(step=1).values
    array(1.5)
    >>> s
    LabelledSet 'by step'
      loss  (step=2)
    """

    def __init__(
        self, arrays: Mapping[str, LabelledArray], *, title: str = "", attrs: Mapping[str, Any] | None = None, plotter: str = "plot_array"
    ) -> None:
        self._arrays = dict(arrays)
        self.title = title
        self.attrs = dict(attrs or {})
        self.plotter = plotter
        for name, a in self._arrays.items():
            a.name = name
            for dim, size in a.sizes.items():
                if self.sizes[dim] != size:
                    raise ValueError(f"{name!r} has {dim}={size}, another array of the set has {self.sizes[dim]}")

    @property
    def dims(self) -> tuple[str, ...]:
        """All axes, those of the widest array first."""
        widest = sorted(self._arrays.values(), key=lambda a: -len(a.dims))
        return tuple(dict.fromkeys(d for a in widest for d in a.dims))

    @property
    def sizes(self) -> dict[str, int]:
        """Size by axis name."""
        return {d: next(a.sizes[d] for a in self._arrays.values() if d in a.dims) for d in self.dims}

    def __getitem__(self, name: str) -> LabelledArray:
        if name not in self._arrays:
            near = difflib.get_close_matches(name, self._arrays)
            raise KeyError(f"no {name!r}{f' (near: {near[0]!r})' if near else ''}; there are {', '.join(self._arrays)}")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def _each(self, method: str, dims: Sequence[str], *arguments: Any, **named: Any) -> LabelledSet:
        """Apply a method to each array, with those of the named axes that it has."""
        unknown = [d for d in dims if d not in self.dims]
        if unknown:
            raise KeyError(f"no axis {unknown[0]!r}; there are {self.dims}")
        out = {}
        for name, a in self._arrays.items():
            own = [d for d in dims if d in a.dims]
            if not own:
                out[name] = a
            elif named:
                out[name] = getattr(a, method)(**{d: named[d] for d in own})
            else:
                out[name] = getattr(a, method)(*own)
        return LabelledSet(out, title=self.title, attrs=self.attrs, plotter=self.plotter)

    def sel(self, **labels: Any) -> LabelledSet:
        """`LabelledArray.sel` of each array that has the axis."""
        return self._each("sel", list(labels), **labels)

    def isel(self, **indices: Any) -> LabelledSet:
        """`LabelledArray.isel` of each array that has the axis."""
        return self._each("isel", list(indices), **indices)

    def mean(self, *dims: str) -> LabelledSet:
        """`LabelledArray.mean` of each array, over those of the axes that it has."""
        return self._each("mean", dims or self.dims)

    def to_dataframe(self, *names: str, dropna: bool = False) -> Any:
        """A tidy DataFrame with a column for each array (or for the named ones), spread over the axes they have together.

        `dropna` leaves out the rows where every array is NaN.
        """
        pd = need("pandas", "notebook")
        chosen = LabelledSet({n: self[n] for n in names}) if names else self
        dims, sizes = chosen.dims, chosen.sizes
        shape = tuple(sizes[d] for d in dims)
        columns: dict[str, NDArray[Any]] = {}
        for a in chosen.values():
            columns |= {n: c for n, c in _columns(a, dims, sizes).items() if n not in columns}
        for name, a in chosen.items():
            columns[name] = np.broadcast_to(_spread(a.values, a.dims, dims), shape).reshape(-1)
        ordered = [*dims, *(n for n in columns if n not in dims)]
        return pd.DataFrame(_dropped({n: columns[n] for n in ordered}, list(chosen), dropna))

    def to_xarray(self) -> Any:
        """An `xarray.Dataset`."""
        xr = need("xarray", "notebook")
        return xr.Dataset({n: a.to_xarray() for n, a in self._arrays.items()}, attrs={"title": self.title, **self.attrs})

    def plot(self, ax: Any = None, **arguments: Any) -> Any:
        """Draw it with the `ouro.plots` function that fits; returns the matplotlib Axes."""
        return getattr(importlib.import_module("ouro.plots"), self.plotter)(self, ax=ax, **arguments)

    def _lines(self) -> list[tuple[str, str]]:
        return [(n, a._size_text()) for n, a in self._arrays.items()]

    def __repr__(self) -> str:
        width = max((len(n) for n in self._arrays), default=0)
        return "\n".join([f"{type(self).__name__} {self.title!r}", *(f"  {n:{width}}  {head}" for n, head in self._lines())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td><b>{html.escape(n)}</b></td><td>{html.escape(head)}</td></tr>" for n, head in self._lines())
        notes = "".join(f"<div><small>{html.escape(str(k))}: {html.escape(str(v))}</small></div>" for k, v in self.attrs.items())
        return f"<div><b>{html.escape(self.title)}</b>{notes}<table>{rows}</table></div>"
