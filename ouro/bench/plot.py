"""The roofline picture: what each candidate reached, under what the machine allows."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from ouro.bench.results import Report, Row, split_key

COLOURS = {"ouro": "C0", "llama.cpp": "C1", "torch": "C2"}
MARKERS = {"float32": "D", "bfloat16": "o", "BF16": "o", "int8": "s", "Q8_0": "s", "int4": "^", "Q4_0": "^"}


def _reads(report: Report) -> tuple[float, float]:
    """Least and most bytes per second of a plain read, of those measured beside each sample."""
    reads = [read for row in report.rows for limits in row.limits.values() for read, _ in limits]
    return min(reads, default=report.machine["read"]), max(reads, default=report.machine["read"])


def _limits(axes: Any, report: Report, left: float, right: float) -> None:
    """The read rates as a sloping band, the peak of each unit as a ceiling."""
    slow, fast = _reads(report)
    top = max(unit["rate"] for unit in report.machine["peak"].values())
    for read in (slow, fast):
        axes.plot([left, top / read], [left * read / 1e9, top / 1e9], color="0.35", lw=1.2)
    axes.fill_between([left, top / fast, top / slow], [left * slow / 1e9, top / fast * slow / 1e9, top / 1e9],
                      [left * fast / 1e9, top / 1e9, top / 1e9], color="0.35", alpha=0.12, lw=0)  # fmt: skip
    for name, unit in report.machine["peak"].items():
        rate = unit["rate"]
        axes.plot([rate / fast, right], [rate / 1e9, rate / 1e9], color="0.35", lw=1.2, ls="--")
        axes.annotate(f"{name} peak, {rate / 1e9:.0f}", (1.4 * top / slow, rate / 1e9), xytext=(0, 3), textcoords="offset points",
                      fontsize=8, color="0.35")  # fmt: skip


def _name_slope(axes: Any, reads: tuple[float, float], left: float) -> None:
    """Write the read rates along their lines, once the axes have their final scales."""
    slow, fast = reads
    ends = axes.transData.transform([(left, left * fast / 1e9), (10 * left, 10 * left * fast / 1e9)])
    angle = math.degrees(math.atan2(*(ends[1] - ends[0])[::-1]))
    name = f"plain read, {slow / 1e9:.0f} to {fast / 1e9:.0f} GB/s"
    axes.annotate(name, (1.3 * left, 1.3 * left * fast / 1e9), xytext=(-4, 7),
                  textcoords="offset points", rotation=angle, rotation_mode="anchor", fontsize=8, color="0.35")  # fmt: skip


def _points(axes: Any, row: Row, named: set[str]) -> None:
    entry = row.entry
    for key, rates in row.rates.items():
        kind, n = split_key(key)
        if "speculate" in key:
            continue
        x, y = entry.cost.intensity(kind, n), median(rates) * entry.cost.operations(kind, n) / 1e9
        label = entry.name if entry.name not in named else None
        named.add(entry.name)
        axes.plot(x, y, MARKERS.get(entry.compute, "o"), color=COLOURS.get(entry.runtime, "C3"), ms=7, label=label,
                  mfc=COLOURS.get(entry.runtime, "C3") if entry.runtime == "ouro" else "none")  # fmt: skip


def plot_roofline(report: Report, path: Path) -> None:
    """Draw a report: operations per byte against operations per second, both logarithmic.

    Raises
    ------
    ImportError
        Without matplotlib (the `notebook` extra).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 4.2))
    shown = [key for row in report.rows for key in row.rates if "speculate" not in key]
    xs = [row.entry.cost.intensity(*split_key(key)) for row in report.rows for key in row.rates if key in shown]
    left, right = min([*xs, 1.0]) / 1.8, max([*xs, 100.0]) * 2.5
    _limits(axes, report, left, right)
    named: set[str] = set()
    for row in report.rows:
        _points(axes, row, named)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    _name_slope(axes, _reads(report), left)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("operations per byte of weights and cache that must be read")
    axes.set_ylabel("Gop/s")
    m = report.machine
    tasks = " and ".join(dict.fromkeys(key.replace("@", " ") for key in shown))
    axes.set_title(f"{report.model['name']}, {tasks}, {m['processor']}, threads: {m['threads']}", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(which="major", alpha=0.25)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
