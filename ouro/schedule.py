"""The schedule of an engine, written down pass by pass, and run again.

A log is a list of entries, or a file of JSON lines. The first says what it is about:

    {"version": 2, "model": {...}, "options": {...}}

then, in any order as far as it is clear,

    {"submit": 3, "sample": 0, "tokens": [...], "settings": {...}}
    {"pass": 17, "arrive": [3], "cancel": [1], "start": [3],
     "lanes": [[request, kind, pos, step, token, state], ...],
     "events": [[request, token, logprob, exit_step, finish], ...]}

`arrive`, `cancel` and `start` (of a request that had to wait or not) happened before the pass. A lane's kind is "prompt",
"lead" (the newest decided position), "late" (a deeper step of a token that left early) or "guess" (a branch); `state` is a checksum
of the state that the pass gave it, so that a replay compares all bits that were computed. An event with
token -1 only ends a request; finish is null, "stop", "length", "cancelled" or "failed".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ouro import exits
from ouro.edits import Edit
from ouro.errors import ReplayError
from ouro.generation import Generation, Settings

if TYPE_CHECKING:
    from ouro.model import Model

VERSION = 2
TAKEN = ("arrive", "cancel", "start")  # ouro_line_kind (csrc/engine/engine.h), and the kinds of lanes behind them
LANES = ("prompt", "lead", "late", "guess")
FINISH = (None, "stop", "length", "cancelled", "failed")
Entry = dict[str, Any]


def describe(model: Model) -> Entry:
    """What of a model decides its results."""
    return {"name": model.path.name, "compute": model.compute, "kv_dtype": model.kv_dtype, "n_layers": model.config.n_layers,
            "n_steps": model.config.n_steps, "d_model": model.config.d_model, "d_vocab": model.config.d_vocab}  # fmt: skip


class ScheduleLog:
    """Where an engine writes; calls are made one at a time."""

    def __init__(self, to: list[Entry] | str | Path, model: Entry, options: Entry) -> None:
        self._list = to if isinstance(to, list) else None
        self._file: TextIO | None = None if isinstance(to, list) else Path(to).open("w", encoding="utf-8")  # noqa: SIM115
        self._passes = 0
        self._add({"version": VERSION, "model": model, "options": options})

    def _add(self, entry: Entry) -> None:
        if self._list is not None:
            self._list.append(entry)
        elif self._file is not None:
            self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")

    def add_submit(self, number: int, prompt: Sequence[int], s: Settings, sample: int) -> None:
        """A request that was queued, with all that its result depends on."""
        settings = asdict(replace(s, edits=()))
        settings["edits"] = [type(edit).__name__ for edit in s.edits]
        rule = s.exit_rule
        name = rule.kind if isinstance(rule, exits.NamedExit) else type(rule).__name__
        settings["exit_rule"] = [name, rule.threshold, rule.min_steps, rule.delay]
        settings["stop"], settings["stop_ids"], settings["follow"] = list(s.stop), list(s.stop_ids), list(s.follow)
        self._add({"submit": number, "sample": sample, "tokens": list(prompt), "settings": settings})

    def add_pass(self, record: Sequence[tuple[int, int, int, int, int, int]], events: Sequence[tuple[Any, ...]]) -> None:
        """One pass: what was taken in, its lanes, and the tokens that came of it."""
        entry: Entry = {"pass": self._passes, **{name: [] for name in TAKEN}, "lanes": [], "events": []}
        for request, kind, pos, step, token, state in record:
            if kind < len(TAKEN):
                entry[TAKEN[kind]].append(request)
            else:
                entry["lanes"].append([request, LANES[kind - len(TAKEN)], pos, step, token, state])
        for request, token, logprob, exit_step, finish, *_ in events:
            entry["events"].append([request, token, logprob, exit_step, FINISH[finish]])
        self._passes += 1
        self._add(entry)

    def close(self) -> None:
        """Close the file, when there is one."""
        if self._file is not None:
            self._file.close()


def read(log: Sequence[Entry] | str | Path) -> list[Entry]:
    """The entries of a log, checked for its version."""
    if isinstance(log, (str, Path)):
        entries = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    else:
        entries = list(log)
    version = entries[0].get("version") if entries and isinstance(entries[0], dict) else None
    if version != VERSION:
        raise ReplayError(f"not a schedule log of version {VERSION}: the first entry has version {version}")
    return entries


def _settings(entry: Entry, rule: Any, edits: Sequence[Edit]) -> Settings:
    s = dict(entry["settings"])
    if s["edits"] != [type(edit).__name__ for edit in edits]:
        raise ReplayError(f"request {entry['submit']} had the edits {s['edits']}: give them, and no others, in edits")
    name, threshold, min_steps, delay = s["exit_rule"]
    if name == "CustomExit":
        if rule is None:
            raise ReplayError(f"request {entry['submit']} had a rule of the caller's own: give it in exit_rules")
        s["exit_rule"] = exits.CustomExit(threshold, min_steps, delay, rule=rule)
    else:
        known = getattr(exits, name, None)
        s["exit_rule"] = known(threshold, min_steps, delay) if known else exits.NamedExit(threshold, min_steps, delay, rule=name)
    s |= {name: tuple(s[name]) for name in ("stop", "stop_ids", "follow")}
    return Settings(**{**s, "edits": tuple(edits)})


def replay(model: Model, log: Sequence[Entry] | str | Path, *, exit_rules: Mapping[int, Any] | None = None,
           edits: Mapping[int, Sequence[Edit]] | None = None) -> dict[int, Generation]:  # fmt: skip
    """Run a recorded schedule again: the same arrivals and cancels before the same passes.

    Parameters
    ----------
    model
        The model that the log is about.
    log
        The list or the path that was given to `Engine(log=...)`.
    exit_rules
        The callables of `CustomExit`, by request: they can not be written down.
    edits
        Likewise the edits of requests that had some; the log has their names only.

    Returns
    -------
    dict
        The generations by request, as far as the log goes.

    Raises
    ------
    ReplayError
        Where the lanes, states, tokens, log probabilities or exits of a pass are not those of the log.
    """
    from ouro.engine import Engine

    entries = read(log)
    if entries[0]["model"] != describe(model):
        raise ReplayError(f"the log is about {entries[0]['model']}, the model is {describe(model)}")
    submits = {e["submit"]: e for e in entries if "submit" in e}
    again: list[Entry] = []
    with Engine(model, background=False, log=again, **entries[0]["options"]) as engine:
        handles = {}
        for entry in (e for e in entries if "pass" in e):
            for number in entry["arrive"]:
                s = submits[number]
                asked = _settings(s, (exit_rules or {}).get(number), (edits or {}).get(number, ()))
                handle = engine._submit(s["tokens"], asked, s["sample"])
                handles[handle.number] = handle
            for number in entry["cancel"]:
                engine._cancel(number)
            engine._shared.step()
            if again[-1] != entry:
                what = [name for name in entry if entry[name] != again[-1].get(name)]
                raise ReplayError(f"pass {entry['pass']}: {', '.join(what)} were {[entry[n] for n in what]}, "
                                  f"are {[again[-1].get(n) for n in what]}")  # fmt: skip
    return {number: handle.generation for number, handle in handles.items()}
