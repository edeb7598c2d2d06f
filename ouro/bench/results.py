"""Samples of interleaved rounds, and what follows from them: medians, bounds, shares, ratios; a table and a JSON line.

Machines are shared: a rate means little by itself. A share compares a sample with a limit measured in the same turn, a ratio
compares two candidates of one round; both are taken per round first, then their median.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from ouro.bench.bounds import Cost
from ouro.bench.candidates import RIVALS, Entry
from ouro.files import read_text

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
        into = found.setdefault(row.entry.name, Row(row.entry))
        for key, rates in row.rates.items():
            into.rates.setdefault(key, []).extend(rates)
            into.limits.setdefault(key, []).extend(row.limits[key])
            into.details[key] = row.details.get(key, {})
        memory = {key: max(value, into.entry.memory.get(key, 0)) for key, value in row.entry.memory.items()}
        into.entry = replace(row.entry, memory={**into.entry.memory, **memory})
    return list(found.values())


Pairs = dict[tuple[str, str], dict[str, list[float]]]


def pairs_of(rows: Sequence[Row]) -> Pairs:
    """Ours over its rival's, by (our name, rival's name), then by task key, one per round; the rows of one run."""
    by_name = {row.entry.name: row for row in rows}
    found: Pairs = {}
    for ours in rows:
        for runtime, kind in RIVALS[ours.entry.compute].items() if ours.entry.runtime == "ouro" else ():
            rival = by_name.get(f"{runtime} {kind}")
            if rival is not None:
                both = [key for key in ours.rates if key in rival.rates]
                found[ours.entry.name, rival.entry.name] = {
                    key: [a / b for a, b in zip(ours.rates[key], rival.rates[key], strict=False)] for key in both
                }
    return found


def merge_pairs(runs: Iterable[Pairs]) -> Pairs:
    """Ratios of several runs, one after another."""
    found: Pairs = {}
    for pairs in runs:
        for names, by_key in pairs.items():
            for key, values in by_key.items():
                found.setdefault(names, {}).setdefault(key, []).extend(values)
    return found


def highest(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """One machine measured twice: the higher rates, since what disturbs a measurement only lowers it."""
    peak = {name: max(unit, b["peak"].get(name, unit), key=lambda u: u["rate"]) for name, unit in a["peak"].items()}
    return {**a, "read": max(a["read"], b["read"]), "peak": peak}


@dataclass
class Report:
    """A run, or several that were asked for the same: the machine, the model, what was asked, the rows, the ratios."""

    machine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]
    pairs: Pairs = field(default_factory=dict)

    def line(self) -> str:
        """One JSON line."""
        pairs = [{"ours": ours, "rival": rival, "ratios": by_key, "median": {key: median(values) for key, values in by_key.items()}}
                 for (ours, rival), by_key in self.pairs.items()]  # fmt: skip
        found = {"schema": SCHEMA, "machine": self.machine, "model": self.model, "settings": self.settings, "versions": self.versions,
                 "rows": [row.to_dict() for row in self.rows], "pairs": pairs}  # fmt: skip
        return json.dumps(found)

    def absorb(self, path: Path) -> None:
        """Take the rounds of all runs with the same model and threads from a file of JSON lines, whatever tasks each had.

        The limits of the machine are then the highest that any of them measured.
        """
        rows: list[Row] = []
        pairs: list[Pairs] = []
        for text in read_text(path).splitlines():
            try:
                found = json.loads(text)
            except ValueError:
                raise ValueError(f"{path} is no log of ouro bench: it has a line {text[:40]!r}") from None
            same = found.get("schema") == SCHEMA and found["model"] == self.model
            if same and found["machine"]["threads"] == self.machine["threads"]:
                rows += [Row.from_dict(row) for row in found["rows"]]
                self.machine = highest(self.machine, found["machine"])
                pairs.append({(pair["ours"], pair["rival"]): pair["ratios"] for pair in found["pairs"]})
        self.rows, self.pairs = merge(rows), merge_pairs(pairs)

    def table(self) -> str:
        """Lines for people."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row.rates))
        head = f"{'tokens/s, bound, share of it':28}" + "".join(f"{key:>27}" for key in keys)
        lines = [*self._head(), "", head + f"{'resident':>11}{'peak MiB':>10}{'load s':>8}"]
        lines += [_line(row, keys) for row in self.rows]
        if self.pairs:
            lines += ["", f"{'ratio (least to most)':38}" + "".join(f"{key:>27}" for key in keys)]
            lines += [_ratio_line(f"{ours} / {rival}", by_key, keys) for (ours, rival), by_key in self.pairs.items()]
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


def _ratio_line(names: str, by_key: dict[str, list[float]], keys: Sequence[str]) -> str:
    text = f"{names:38}"
    for key in keys:
        values = by_key.get(key)
        text += f"{f'{median(values):.2f} ({min(values):.2f} to {max(values):.2f})' if values else '':>27}"
    return text
