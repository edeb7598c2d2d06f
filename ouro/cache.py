"""`ActivationCache`: what a run kept, by name. Every step of the loop is there, not only the last."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ouro.capture import Block, from_bfloat16
from ouro.config import ModelConfig
from ouro.hooks import ALIASES, BY_SHORT, Place, Point, names_of, point, unknown
from ouro.labelled import LabelledArray

if TYPE_CHECKING:
    from ouro.model import Model

Index = int | slice | Sequence[int] | None
Key = str | tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class ActivationCache(Mapping[Any, NDArray[np.float32]]):
    """Activations by name.

    A full name gives `[batch, pos, ...]`; a name without a step, or `(short, layer)`, gives `[step, batch, pos, ...]`; a short
    name alone gives `[step, layer, batch, pos, ...]`. Scores and patterns are `[..., batch, head, dest_pos, src_pos]`. Layers
    and steps may be negative. What has no value is NaN: positions beyond a sequence, steps that a program never ran.

    Attributes
    ----------
    config : ModelConfig
    n_steps : int
        Steps of the run.
    lengths : list of int
        Tokens of each sequence.
    token_ids : list of list of int
        The sequences.
    positions : array [batch, pos]
        The position each place of the pos axis holds; -1 where a shorter sequence has none.

    Examples
    --------
    >>> import ouro
    >>> model = ouro.load("ouro-tiny")
    >>> logits, cache = model.run_with_cache("One day Ann took", names_filter=["resid_post", "pattern"])
    >>> cache["resid_post", 3].shape
    (4, 1, 5, 128)
    >>> cache["steps.2.blocks.1.attn.hook_pattern"].shape
    (1, 4, 5, 5)
    >>> cache.sel("resid_post", step=-1, layer=-1, pos=-1).shape
    (1, 128)
    """

    blocks: list[tuple[Block, NDArray[Any]]]
    config: ModelConfig
    n_steps: int
    lengths: list[int]
    token_ids: list[list[int]]
    positions: NDArray[np.int64]
    tokens: list[list[str]] | None = field(default=None, repr=False)

    # -- names -------------------------------------------------------------------------------------------------------

    @cached_property
    def _where(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Full name to (block, index of its leading axes)."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for i, (b, _) in enumerate(self.blocks):
            for s, step in enumerate(b.steps):
                for k, layer in enumerate(b.layers):
                    lead = {"run": (), "step": (s,), "layer": (s, k)}[b.point.of]
                    found[b.point.name(step, layer)] = (i, lead)
        return found

    @property
    def points(self) -> list[str]:
        """Short names of what was kept."""
        return list(dict.fromkeys(b.point.short for b, _ in self.blocks))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        try:
            self._places(key)
        except (KeyError, IndexError, TypeError):
            return False
        return True

    def _places(self, key: Any) -> tuple[Point, list[Place], str]:
        """A key as a point, its places that were kept, and which leading axes the result has."""
        names = names_of(self.config, self.n_steps)
        if isinstance(key, tuple):
            if not 1 <= len(key) <= 3:
                raise KeyError(f"{key!r} has {len(key)} parts, expected (short name, layer, step); cache.sel takes other axes")
            p = point(str(key[0]))
            got = [at for _, at in names._tuple(key)]
            axes = "sl"[: 3 - len(key)] if p.of == "layer" else "s"
        elif key in self._where:
            p, at = names.by_name[key]
            got, axes = [at], ""
        elif ALIASES.get(key, key) in BY_SHORT:
            p = point(key)
            got, axes = names.places(p), {"run": "", "step": "s", "layer": "sl"}[p.of]
        elif isinstance(key, str) and key in names._without_step:
            found = names._without_step[key]
            p, got, axes = found[0][0], [at for _, at in found], "s" if found[0][0].of != "run" else ""
        else:
            raise KeyError(unknown(key, [*self.points, *self._where]))
        kept = [at for at in got if p.name(*at) in self._where]
        if not kept:
            raise KeyError(f"{key!r} was not captured; there are {', '.join(self.points)}")
        return p, kept, axes

    # -- values ------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> NDArray[np.float32]:
        return _float32(self.raw(key))

    def raw(self, key: Key) -> NDArray[Any]:
        """As `cache[key]`, in the type of the capture: float32, or the bits of bfloat16 as uint16. A view where possible."""
        p, places, axes = self._places(key)
        steps, layers = sorted({t for t, _ in places}), sorted({layer for _, layer in places})
        if not axes:
            i, lead = self._where[p.name(*places[0])]
            one: NDArray[Any] = self.blocks[i][1][lead]
            return one
        if len(places) != len(steps) * len(layers):
            raise KeyError(f"{key!r} was captured at different steps for different layers: ask for one layer, or by full name")
        for b, a in self.blocks:
            if b.point == p and set(places) <= {(t, layer) for t in b.steps for layer in b.layers}:
                part: NDArray[Any] = a[_span([b.steps.index(t) for t in steps])]
                if p.of != "layer":
                    return part
                part = part[:, _span([b.layers.index(layer) for layer in layers])]
                return part if axes == "sl" else part[:, 0]
        parts = [[self.raw(p.name(t, layer)) for layer in layers] for t in steps]
        whole = np.array(parts)
        return whole if axes == "sl" else whole[:, 0]

    def stack(self, short: str) -> NDArray[np.float32]:
        """All steps and layers of a point `[step, layer, batch, pos, ...]` (`[step, batch, pos, ...]` for one of a step)."""
        return self[point(short).short]

    def steps(self, short: str) -> list[int]:
        """The steps a point was kept at: labels of the step axis of `stack`."""
        return sorted({t for t, _ in self._places(short)[1]})

    def layers(self, short: str) -> list[int]:
        """The layers a point was kept at."""
        return sorted({layer for _, layer in self._places(short)[1]})

    def sel(
        self, short: str, *, step: Index = None, layer: Index = None, batch: Index = None, pos: Index = None, head: Index = None,
        src_pos: Index = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Some of a point: a number drops its axis, a slice or list keeps it, None keeps all.

        `step` and `layer` are those of the model (negative from the end); `pos` (for scores and patterns the attending
        position) counts along the captured axis, which is the position itself when all were captured.

        Raises
        ------
        KeyError, IndexError
            For a point, step or layer that was not captured; for an axis the point does not have.
        """
        p = point(short)
        a, dims = self[p.short], self.dims(short)
        chosen: dict[str, Any] = {"step": step, "layer": layer, "batch": batch, "pos": pos, "head": head, "src_pos": src_pos}
        chosen = {k: v for k, v in chosen.items() if v is not None}
        if p.square and "pos" in chosen:
            chosen["dest_pos"] = chosen.pop("pos")
        if "head" in chosen and "kv_head" in dims:
            chosen["kv_head"] = chosen.pop("head")
        for name, labels, size in (("step", self.steps(short), self.n_steps), ("layer", self.layers(short), self.config.n_layers)):
            if name in chosen and name in dims:
                chosen[name] = _labels(name, chosen[name], labels, size)
        for dim in chosen:
            if dim not in dims:
                raise IndexError(f"{p.short} has no axis {dim!r}; it has {', '.join(dims)}")
            _within(dim, chosen[dim], a.shape[dims.index(dim)])
        for axis, dim in reversed(list(enumerate(dims))):
            if dim in chosen:
                index = chosen[dim]
                if not isinstance(index, (int, np.integer, slice)):
                    index = np.asarray(index)
                a = a[(slice(None),) * axis + (index,)]
        return a

    def dims(self, short: str) -> tuple[str, ...]:
        """Names of the axes of `stack(short)`."""
        return next(b.dims for b, _ in self.blocks if b.point == point(short))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for _, a in self.blocks)

    # -- the residual stream, taken apart ----------------------------------------------------------------------------

    def accumulated_resid(self, *, incl_mid: bool = False) -> LabelledArray:
        """The residual stream as it grows `[component, batch, pos, d_model]`: before each layer of each step (`"1.3_pre"`: step
        1, layer 3), between attention and feed-forward (`"1.3_mid"`), and behind each step, before its norm (`"1_post"`).

        Needs `resid_pre` (and `resid_mid`); `step_resid_post` is added where it was kept.
        """
        parts: list[tuple[str, NDArray[np.float32]]] = []
        for t in self.steps("resid_pre"):
            for layer in self.layers("resid_pre"):
                parts.append((f"{t}.{layer}_pre", self["resid_pre", layer, t]))
                if incl_mid:
                    parts.append((f"{t}.{layer}_mid", self["resid_mid", layer, t]))
            if f"steps.{t}.hook_resid_post" in self:
                parts.append((f"{t}_post", self[f"steps.{t}.hook_resid_post"]))
        return self._components(parts, ("batch", "pos", "d_model"), "accumulated_resid")

    def decompose_resid(
        self, step: int, layer: int | None = None, *, mode: str = "all", heads: Model | None = None
    ) -> LabelledArray:
        """What was added up, within a step, to the input of `layer` (None: to the end of the step) `[component, batch, pos, d_model]`.

        The first component, `"start"`, is what the step started from: between steps stands a norm, so a sum over components
        does not reach further back. They add up to `("resid_pre", layer, step)`, or `step_resid_post`, up to rounding.

        Parameters
        ----------
        mode
            "all", or "attn" or "mlp" for one kind of addition without the start. Needs `attn_out`, `mlp_out` and, for "all",
            the `resid_pre` of layer 0.
        heads
            The model of this cache: what attention adds is taken apart by head (`"2_attn_out.5"`, see `stack_head_results`). Needs
            `result` and `ln1_post_scale` instead of `attn_out`.
        """
        if mode not in ("all", "attn", "mlp"):
            raise ValueError(f"mode is {mode!r}, expected 'all', 'attn' or 'mlp'")
        t, n = step % self.n_steps, self.config.n_layers
        parts = [("start", self["resid_pre", 0, t])] if mode == "all" else []
        for i in range(n if layer is None else layer % n):
            if mode != "mlp" and heads is not None:
                parts += [(f"{i}_attn_out.{h}", a) for h, a in enumerate(self._head_shares(i, t, heads))]
            elif mode != "mlp":
                parts.append((f"{i}_attn_out", self["attn_out", i, t]))
            if mode != "attn":
                parts.append((f"{i}_mlp_out", self["mlp_out", i, t]))
        if not parts:
            raise ValueError(f"nothing was added before layer {layer}")
        return self._components(parts, ("batch", "pos", "d_model"), "decompose_resid")

    def stack_head_results(self, step: int | None = None, *, apply_norm: Model | None = None) -> LabelledArray:
        """`attn.hook_result` of every head `[component, batch, pos, d_model]`, labelled `"1.3.5"`: step, layer, head.

        These are shares of the output projection, before the norm behind attention: of one layer they add up to what
        that norm reads, not to `attn_out`. Needs `result`, which a filter must name.

        Parameters
        ----------
        apply_norm
            The model of this cache: each share goes through that norm with the scale it had, `result / ln1_post_scale * weight`. The
            heads of a layer then add up to its `attn_out`, up to rounding (unless an edit changed what lies between). Needs
            `ln1_post_scale`.

        Examples
        --------
        >>> import ouro
        >>> model = ouro.load("ouro-tiny")
        >>> _, cache = model.run_with_cache("One day", ["result", "ln1_post_scale", "attn_out"])
        >>> heads = cache.stack_head_results(3, apply_norm=model).values[:4]        # step 3, layer 0
        >>> bool(abs(heads.sum(0) - cache["attn_out", 0, 3]).max() < 1e-4)
        True
        """
        parts: list[tuple[str, NDArray[np.float32]]] = []
        for t in self.steps("result"):
            for layer in self.layers("result") if step is None or t == step % self.n_steps else ():
                plain = np.moveaxis(self["result", layer, t], 2, 0)
                shares = plain if apply_norm is None else self._head_shares(layer, t, apply_norm)
                parts += [(f"{t}.{layer}.{h}", a) for h, a in enumerate(shares)]
        return self._components(parts, ("batch", "pos", "d_model"), "head_results")

    def _head_shares(self, layer: int, step: int, model: Model) -> NDArray[np.float32]:
        """What each head adds to the residual stream `[head, batch, pos, d_model]`."""
        if model.config != self.config:
            raise ValueError(f"the cache is of a model with {self.config}, got one with {model.config}")
        weight = model.weight(f"model.layers.{layer}.input_layernorm_2.weight")
        shares = self["result", layer, step] / self["ln1_post_scale", layer, step][:, :, None, None] * weight
        return np.moveaxis(shares, 2, 0)

    def _components(self, parts: list[tuple[str, NDArray[np.float32]]], dims: tuple[str, ...], name: str) -> LabelledArray:
        labels, values = zip(*parts, strict=True)
        return LabelledArray(np.stack(values), ("component", *dims), {"component": np.array(labels)}, name=name)

    # -- files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write as one safetensors file: the arrays, and in its metadata their names, axes, tokens and positions.

        The file appears whole or not at all. `ouro.ActivationCache.load` maps it back; other readers of the format see the
        plain arrays.
        """
        from ouro.cache_files import write_cache

        write_cache(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> ActivationCache:
        """A saved cache; its arrays are mapped, and read from the file when they are used.

        Raises
        ------
        CheckpointError
            For a file that is damaged or is not a saved cache.
        """
        from ouro.cache_files import read_cache

        return read_cache(Path(path))

    # -- other forms ---------------------------------------------------------------------------------------------------

    def labelled(self, short: str) -> LabelledArray:
        """A point with the names of its axes, steps, layers, positions and tokens."""
        dims = self.dims(short)
        coords: dict[str, Any] = {"step": self.steps(short), "layer": self.layers(short)}
        coords = {k: v for k, v in coords.items() if k in dims}
        along, of = ("dest_pos", "dest_") if "dest_pos" in dims else ("pos", "")
        coords[f"{of}position"] = (("batch", along), self.positions)
        if self.tokens is not None:
            words = [[row[i] if i >= 0 else "" for i in places] for row, places in zip(self.tokens, self.positions, strict=True)]
            coords[f"{of}token"] = (("batch", along), np.array(words))
        return LabelledArray(self.stack(short), dims, coords, name=point(short).short)

    def to_xarray(self) -> Any:
        """An `xarray.Dataset` of all points (the notebook extra)."""
        import xarray

        return xarray.Dataset({short: self.labelled(short).to_xarray() for short in self.points})

    def to_dataframe(self, short: str | None = None) -> Any:
        """One row for each number of a point (the notebook extra); the point may be left out when there is only one."""
        if short is None and len(self.points) != 1:
            raise ValueError(f"which point? there are {', '.join(self.points)}")
        return self.labelled(short or self.points[0]).to_dataframe()

    def to_transformer_lens(self) -> dict[str, NDArray[np.float32]]:
        """A flat dict on virtual layers: layer l of step t is `blocks.{t * n_layers + l}`, as if the loop were unrolled.

        Points of a step other than the last have no place there and are left out; scales get their trailing axis of 1.
        `torch.from_dlpack(a)` or `torch.from_numpy(a)` makes a tensor of each without copying.
        """
        out: dict[str, NDArray[np.float32]] = {}
        for name in self:
            p, (step, layer) = self._names[name]
            a = self[name]
            if p.path.endswith("hook_scale"):
                a = a[..., None]
            if p.of == "layer":
                out[f"blocks.{step * self.config.n_layers + layer}.{p.path}"] = a
            elif p.of == "run" or (step == self.n_steps - 1 and p.path.startswith("ln_final")):
                out[p.path] = a
        return out

    @cached_property
    def _names(self) -> dict[str, tuple[Point, Place]]:
        return names_of(self.config, self.n_steps).by_name

    def __repr__(self) -> str:
        batch, pos = self.positions.shape
        return f"ActivationCache({len(self)} arrays of {len(self.points)} points, batch={batch}, pos={pos}, {self.nbytes / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        rows = []
        for b, a in self.blocks:
            shape = ", ".join(f"{dim} {n}" for dim, n in zip(b.dims, a.shape, strict=True))
            rows.append(f"<tr><td>{html.escape(b.point.short)}</td><td>{html.escape(shape)}</td><td>{a.nbytes / 2**20:.2f} MiB</td></tr>")
        head = f"<caption>{html.escape(repr(self))}</caption><tr><th>point</th><th>axes</th><th>size</th></tr>"
        return f"<table>{head}{''.join(rows)}</table>"


def _float32(a: NDArray[Any]) -> NDArray[np.float32]:
    return from_bfloat16(a) if a.dtype == np.uint16 else a


def _span(indices: list[int]) -> Any:
    """A slice where the indices are one, so that a view comes out."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return indices


def _within(name: str, wanted: Any, size: int) -> None:
    """Refuse numbers that an axis does not have."""
    for i in () if isinstance(wanted, slice) else np.atleast_1d(wanted):
        if isinstance(i, (int, np.integer)) and not -size <= i < size:
            raise IndexError(f"{name} is {i}, expected {-size} to {size - 1}")


def _labels(name: str, wanted: Any, labels: list[int], size: int) -> Any:
    """Model's step or layer numbers as places along a captured axis."""

    def place(i: Any) -> int:
        if not isinstance(i, (int, np.integer)) or not -size <= i < size:
            raise IndexError(f"{name} is {i!r}, expected {-size} to {size - 1}")
        if int(i) % size not in labels:
            raise IndexError(f"{name} {int(i) % size} was not captured; there are {labels}")
        return labels.index(int(i) % size)

    if isinstance(wanted, slice):
        return [labels.index(i) for i in range(size)[wanted] if i in labels]
    return place(wanted) if isinstance(wanted, (int, np.integer)) else [place(i) for i in wanted]
