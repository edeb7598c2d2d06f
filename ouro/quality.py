"""What a compute or a weight format costs: a model beside its float32 reference on the same texts, step by step.

Looped models apply the same weights several times, so an error of the weights can grow with depth. The report shows it for
the states, for the readout of every step, and for where Q-exit would leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ouro.files import read_text
from ouro.measures.depth import token_loss
from ouro.measures.drift import divergence
from ouro.measures.source import SLAB, log_softmax
from ouro.model import Model
from ouro.trace import Trace

QS = (0.3, 0.5, 0.7, 0.9)
TEXTS = Path(__file__).parent / "texts"
COLUMNS = {
    "cosine": ("cosine", "{:.5f}"), "worst_cosine": ("worst", "{:.5f}"), "relative_error": ("rel. error", "{:.4f}"),
    "kl": ("KL, nats", "{:.5f}"), "top1": ("top-1", "{:.2%}"), "loss": ("loss", "{:.4f}"), "loss_change": ("change", "{:+.4f}"),
}  # fmt: skip


@dataclass(frozen=True)
class StepQuality:
    """One recurrent step, all positions of all texts.

    Attributes
    ----------
    cosine, worst_cosine
        Of the state with the reference's, mean and least over positions.
    relative_error
        `sqrt(sum |h - h'|^2 / sum |h'|^2)` of the states.
    kl
        Mean `KL(reference || model)` of the readouts, nats.
    top1
        Share of positions where both readouts have the same top token.
    loss, loss_change
        Mean next-token loss of the texts, nats, and by how much it is above the reference's.
    """

    cosine: float
    worst_cosine: float
    relative_error: float
    kl: float
    top1: float
    loss: float
    loss_change: float


@dataclass(frozen=True)
class ExitQuality:
    """Q-exit with one q: share of positions that leave at another step, and mean steps run (1-based) of both."""

    q: float
    changed: float
    steps: float
    reference_steps: float


@dataclass(frozen=True)
class QualityReport:
    """A model beside its reference. `print` shows the table; `to_dict` is JSON; `to_markdown` goes into a document."""

    model: str
    compute: str
    formats: dict[str, str]
    weight_bytes: int
    reference_compute: str
    reference_weight_bytes: int
    n_texts: int
    n_tokens: int
    steps: list[StepQuality]
    exits: list[ExitQuality]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return asdict(self)

    def _rows(self) -> tuple[list[list[str]], list[list[str]]]:
        steps = [["step", *(title for title, _ in COLUMNS.values())]]
        for t, s in enumerate(self.steps):
            steps.append([str(t), *(form.format(getattr(s, name)) for name, (_, form) in COLUMNS.items())])
        exits = [["q", "changed", "mean steps", "reference"]]
        exits += [[f"{e.q:g}", f"{e.changed:.2%}", f"{e.steps:.3f}", f"{e.reference_steps:.3f}"] for e in self.exits]
        return steps, exits

    @property
    def title(self) -> str:
        """One line: what beside what, on how much."""
        sizes = f"{self.weight_bytes / 2**20:,.1f} MiB beside {self.reference_weight_bytes / 2**20:,.1f}"
        return (f"{self.model}, {self.compute} beside {self.reference_compute}: weights {sizes}; {self.n_texts} texts, "
                f"{self.n_tokens:,} tokens")  # fmt: skip

    def __str__(self) -> str:
        parts = [self.title]
        for rows in self._rows():
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            parts.append("\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows))
        return "\n\n".join(parts)

    def to_markdown(self) -> str:
        """Title and two tables."""
        tables = [[rows[0], ["---"] * len(rows[0]), *rows[1:]] for rows in self._rows()]
        return "\n\n".join([self.title, *("\n".join(f"| {' | '.join(row)} |" for row in rows) for rows in tables)])


def read_texts(path: str | Path) -> list[str]:
    """Texts of a UTF-8 file, an empty line between two.

    Raises
    ------
    CheckpointError, ValueError
        When the file can not be read, or holds none.
    """
    texts = [t.strip("\n") for t in read_text(Path(path)).split("\n\n")]
    if not (texts := [t for t in texts if t.strip()]):
        raise ValueError(f"{path} holds no texts")
    return texts


def shipped_texts(name: str = "report") -> list[str]:
    """Texts of the packaged model's language: "report", or "calibration" (other prompts and seeds; benchmarks/make_texts.py)."""
    return read_texts(TEXTS / f"{name}.txt")


def default_inputs(model: Model, name: str = "report") -> list[list[int]]:
    """The shipped texts as ids; seeded random ids for a model without a tokenizer."""
    if model.tokenizer is not None:
        return [model.to_tokens(t) for t in shipped_texts(name)]
    rng = np.random.default_rng(len(name))
    return [[int(i) for i in rng.integers(0, model.config.d_vocab, 64)] for _ in range(8)]


class _Sums:
    """Sums over positions, by step."""

    def __init__(self, n_steps: int, qs: Sequence[float]) -> None:
        self.n = self.n_next = 0
        self.worst = np.full(n_steps, np.inf)
        self.by_step = {name: np.zeros(n_steps) for name in ("cosine", "error", "size", "kl", "top1", "loss", "reference_loss")}
        self.exits = {q: np.zeros(3) for q in qs}

    def add_states(self, h: NDArray[np.float64], r: NDArray[np.float64]) -> None:
        cosine = (h * r).sum(-1) / (np.linalg.norm(h, axis=-1) * np.linalg.norm(r, axis=-1))
        self.worst = np.minimum(self.worst, cosine.min(1))
        self.by_step["cosine"] += cosine.sum(1)
        self.by_step["error"] += ((h - r) ** 2).sum((1, 2))
        self.by_step["size"] += (r**2).sum((1, 2))
        self.n += h.shape[1]

    def add_readouts(self, log_p: NDArray[np.float64], log_r: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        self.by_step["kl"] += divergence(log_r, log_p).sum(1)
        self.by_step["top1"] += (log_p.argmax(-1) == log_r.argmax(-1)).sum(1)
        for name, values in (("loss", log_p), ("reference_loss", log_r)):
            self.by_step[name] += np.nansum(token_loss(values, targets)[0], axis=1)
        self.n_next += int((targets >= 0).sum())

    def add_exits(self, trace: Trace, reference: Trace) -> None:
        for q, sums in self.exits.items():
            a, b = trace.exit_step(q), reference.exit_step(q)
            sums += [(a != b).sum(), (a + 1).sum(), (b + 1).sum()]

    def steps(self) -> list[StepQuality]:
        s, n, m = self.by_step, self.n, max(self.n_next, 1)
        columns = zip(s["cosine"] / n, self.worst, np.sqrt(s["error"] / s["size"]), s["kl"] / n, s["top1"] / n, s["loss"] / m,
                      (s["loss"] - s["reference_loss"]) / m, strict=True)  # fmt: skip
        return [StepQuality(*map(float, row)) for row in columns]


def _one_text(model: Model, reference: Model, ids: list[int], n_steps: int | None, sums: _Sums) -> None:
    a, b = (m.trace(ids, n_steps=n_steps, logits="none") for m in (model, reference))
    sums.add_exits(a, b)
    steps, _, pos, d = a.states.shape
    targets = np.array([*ids[1:], -1], np.int64)
    slab = max(1, SLAB // (steps * model.config.d_vocab))
    for at in range(0, pos, slab):
        h, r = (t.states[:, 0, at : at + slab] for t in (a, b))
        sums.add_states(h.astype(np.float64), r.astype(np.float64))
        log_p, log_r = (
            log_softmax(m._core.readout(np.ascontiguousarray(x.reshape(-1, d)), True)[0]).reshape(steps, x.shape[1], -1)
            for m, x in ((model, h), (reference, r))
        )
        sums.add_readouts(log_p, log_r, targets[at : at + slab])


def quality_report(
    model: Model,
    reference: Model,
    texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    *,
    n_steps: int | None = None,
    qs: Sequence[float] = QS,
) -> QualityReport:
    """Compare a model with its reference.

    Parameters
    ----------
    model, reference
        The same checkpoint, loaded in the compute in question and (usually) in "float32".
    texts
        Texts or id lists; the shipped ones (`shipped_texts`) unless given, or random ids without a tokenizer.
    n_steps
        Recurrent steps; the trained number unless given.
    qs
        Of Q-exit.

    Raises
    ------
    ValueError
        When the two are not models of one shape, or there are no texts.

    Examples
    --------
    >>> import ouro
    >>> from ouro.quality import quality_report
    >>> float32, int8 = (ouro.load("ouro-tiny", compute=c) for c in ("float32", "int8"))
    >>> report = quality_report(int8, float32, ["One day Ann took a small lamp to the forest."])
    >>> report.steps[3].top1 > 0.9
    True
    """
    if model.config != reference.config:
        raise ValueError(f"not models of one shape: {model!r} and {reference!r}")
    from tqdm.auto import tqdm

    sequences = default_inputs(model) if texts is None else model._many(list(texts))[0]  # type: ignore[arg-type]
    sums = _Sums(model.config.n_steps if n_steps is None else n_steps, qs)
    for ids in tqdm(sequences, desc="report", unit="text", delay=2.0, leave=False):
        _one_text(model, reference, ids, n_steps, sums)
    info, reference_info = model.info(), reference.info()
    exits = [ExitQuality(q, *(float(x) for x in found / sums.n)) for q, found in sums.exits.items()]
    return QualityReport(model.path.name, model.compute, info["formats"], info["weight_bytes"], reference.compute,
                         reference_info["weight_bytes"], len(sequences), sums.n, sums.steps(), exits)  # fmt: skip
