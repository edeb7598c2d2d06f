"""Samples of interleaved rounds, and what follows from them: medians, bounds, shares, ratios; a table and a JSON line.

Machines are shared: a rate means little by itself. A share compares a sample with a limit measured in the same turn, a ratio
compares two candidates of one round; both are taken per round first, then their median.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ouro.bench.bounds import Cost
from ouro.bench.candidates import RIVALS, Entry

SCHEMA = "ouro-bench/1"


@dataclass
class Row:
    """One candidate's samples.

    Attributes
    ----------
    rates
        Tokens per second by task key ("prefill@512", "decode@32"), one per round.
    limits
        (bytes, operations) per second of the machine by task key, measured before and after each of those samples.
    details
        The other numbers of the last sample by task key: p1, p2, passes.
    """

    entry: Entry
    rates: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    details: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, key: str, sample: dict[str, float], limits: tuple[float, float]) -> None:
        """Keep one sample and the limits beside it."""
        self.rates.setdefault(key, []).append(sample["rate"])
        self.limits.setdefault(key, []).append(limits)
        self.details[key] = {name: value for name, value in sample.items() if name != "rate" and value == value}

    def bounds(self, key: str) -> list[float]:
        """Tokens per second at most, by round."""
        kind, n = split_key(key)
        return [self.entry.cost.bound(kind, n, read, peak) for read, peak in self.limits[key]]

    def share(self, key: str) -> float:
        """Median over rounds of what was reached of the bound."""
        return median(rate / bound for rate, bound in zip(self.rates[key], self.bounds(key), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """For the JSON line."""
        figures = {
            key: {"median": median(rates), "bound": median(self.bounds(key)), "share": self.share(key), "rates": rates,
                  "limits": self.limits[key], "intensity": self.entry.cost.intensity(*split_key(key)), **self.details.get(key, {})}
            for key, rates in self.rates.items()
        }  # fmt: skip
        e = self.entry
        return {"runtime": e.runtime, "compute": e.compute, "unit": e.unit, "cost": e.cost.to_dict(), "load_seconds": e.load_seconds,
                "memory": e.memory, "figures": figures}  # fmt: skip

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Row:
        """The inverse."""
        entry = Entry(found["runtime"], found["compute"], found["unit"], Cost(**found["cost"]), found["load_seconds"], found["memory"])
        derived = {"median", "rates", "limits", "bound", "share", "intensity"}
        limits = {key: [(read, peak) for read, peak in figure["limits"]] for key, figure in found["figures"].items()}
        rates = {key: figure["rates"] for key, figure in found["figures"].items()}
        details = {key: {k: v for k, v in figure.items() if k not in derived} for key, figure in found["figures"].items()}
        return cls(entry, rates, limits, details)


def split_key(key: str) -> tuple[str, int]:
    """Kind and n of a task key."""
    kind, _, rest = key.partition("@")
    return kind, int(rest.split()[0])


def merge(rows: Iterable[Row]) -> list[Row]:
    """Rows of the same candidate become one, its rounds one after another."""
    found: dict[str, Row] = {}
    for row in rows:
        before = found.get(row.entry.name)
        if before is None or set(before.rates) != set(row.rates):
            found[row.entry.name] = row
            continue
        rates = {key: before.rates[key] + row.rates[key] for key in row.rates}
        memory = {key: max(value, before.entry.memory.get(key, 0)) for key, value in row.entry.memory.items()}
        row.entry.memory = memory
        limits = {key: before.limits[key] + row.limits[key] for key in row.rates}
        found[row.entry.name] = Row(row.entry, rates, limits, row.details)
    return list(found.values())


def rivals(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(ours, rival) of the pairs that compare."""
    by_name = {row.entry.name: row for row in rows}
    pairs = []
    for row in rows:
        if row.entry.runtime == "ouro":
            names = [f"{runtime} {kind}" for runtime, kind in RIVALS[row.entry.compute].items()]
            pairs += [(row, by_name[name]) for name in names if name in by_name]
    return pairs


def ratios(ours: Row, rival: Row) -> dict[str, list[float]]:
    """Ours over the rival's by task key, one per round."""
    keys = [key for key in ours.rates if key in rival.rates]
    return {key: [a / b for a, b in zip(ours.rates[key], rival.rates[key], strict=False)] for key in keys}


@dataclass
class Report:
    """A run: the machine, the model, what was asked, and the rows."""

    machine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]

    def line(self) -> str:
        """One JSON line."""
        pairs = [{"ours": a.entry.name, "rival": b.entry.name, "ratios": ratios(a, b),
                  "median": {key: median(values) for key, values in ratios(a, b).items()}} for a, b in rivals(self.rows)]  # fmt: skip
        found = {"schema": SCHEMA, "machine": self.machine, "model": self.model, "settings": self.settings, "versions": self.versions,
                 "rows": [row.to_dict() for row in self.rows], "pairs": pairs}  # fmt: skip
        return json.dumps(found)

    def absorb(self, path: Path) -> None:
        """Put the rounds of earlier runs of the same model and settings, from a file of JSON lines, before these."""
        earlier: list[Row] = []
        for text in path.read_text().splitlines() if path.exists() else []:
            found = json.loads(text)
            if found.get("schema") == SCHEMA and all(found[k] == getattr(self, k) for k in ("model", "settings")):
                earlier += [Row.from_dict(row) for row in found["rows"]]
        self.rows = merge([*earlier, *self.rows])

    def table(self) -> str:
        """Lines for people."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row.rates))
        head = f"{'tokens/s, bound, share of it':28}" + "".join(f"{key:>27}" for key in keys)
        lines = [*self._head(), "", head + f"{'resident':>11}{'peak MiB':>10}{'load s':>8}"]
        lines += [_line(row, keys) for row in self.rows]
        pairs = rivals(self.rows)
        if pairs:
            lines += ["", f"{'ratio (least to most)':38}" + "".join(f"{key:>27}" for key in keys)]
            lines += [_ratio_line(a, b, keys) for a, b in pairs]
        guesses = [(row, key, d) for row in self.rows for key, d in row.details.items() if "p1" in d]
        for row, key, d in guesses:
            p2 = f", p2 {d['p2']:.2f}" if "p2" in d else ""
            lines.append(f"{row.entry.name} {key}: p1 {d['p1']:.2f}{p2}, {d['passes']:.0f} passes")
        return "\n".join(lines)

    def _head(self) -> list[str]:
        m, rounds = self.machine, max((len(rates) for row in self.rows for rates in row.rates.values()), default=0)
        units = ", ".join(f"{name} {u['rate'] / 1e9:.0f} ({u['instruction']})" for name, u in m["peak"].items())
        return [
            f"machine  {m['processor']}, {m['threads']} threads; plain read {m['read'] / 1e9:.1f} GB/s; peak in Gop/s: {units}",
            f"model    {self.model['name']}: {self.model['n_layers']} layers x {self.model['n_steps']} steps, d_model "
            f"{self.model['d_model']}, {self.model['n_params']:,} parameters",
            f"medians of {rounds} rounds in turns; " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 1000 else f"{rate:.1f}" if rate >= 100 else f"{rate:.2f}"


def _line(row: Row, keys: Sequence[str]) -> str:
    text = f"{row.entry.name:28}"
    for key in keys:
        if key in row.rates:
            text += f"{_short(median(row.rates[key])):>12} {_short(median(row.bounds(key))):>7}{row.share(key):7.2f}"
        else:
            text += " " * 27
    memory = [row.entry.memory.get(name) for name in ("resident", "peak")]
    text += "".join(f"{'' if b is None else f'{b / 2**20:.0f}':>{width}}" for b, width in zip(memory, (11, 10), strict=True))
    return text + (f"{row.entry.load_seconds:8.1f}" if row.entry.load_seconds is not None else "")


def _ratio_line(ours: Row, rival: Row, keys: Sequence[str]) -> str:
    found = ratios(ours, rival)
    text = f"{ours.entry.name + ' / ' + rival.entry.name:38}"
    for key in keys:
        values = found.get(key)
        text += f"{f'{median(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else '':>27}"
    return text
