"""What all views share: the `View` object, the style sheet, colours, and text that is safe in HTML.

A view never holds a script and never loads anything. Shades are one colour with an opacity, so that they read on a light
page and on a dark one; step selectors are radio buttons and style rules. What has a tip is a stop of the Tab key and shows the
tip then, in a corner. Text has the colour of what is around it: a page of its own follows the reader's setting, a notebook its
theme (JupyterLab and VS Code say which by an attribute or a class of body).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ouro.files import replace_file

STEP_COLOURS = ("#4477aa", "#ccbb44", "#ee6677", "#228833", "#66ccee", "#aa3377", "#bbbbbb", "#997700")
"""One colour a step (Paul Tol's bright scheme: distinct also with colour-blind eyes); repeats after eight."""

STYLE = """
.ouro{font:13px/1.35 system-ui,sans-serif;overflow-x:auto;--mark:#4477aa}
.ouro .cap{margin:.2em 0 .6em}
.ouro .flow{display:flex;flex-wrap:wrap;gap:3px}
.ouro .tok{border:1px solid rgba(128,128,128,.35);border-radius:4px;padding:2px 5px;text-align:center;white-space:pre}
.ouro .tok b{display:block;font-weight:600}
.ouro .tok i{display:block;font-style:normal;font-size:11px;opacity:.8}
.ouro table{border-collapse:collapse;font-size:12px}
.ouro td,.ouro th{padding:1px 5px;white-space:pre;text-align:center;border:1px solid rgba(128,128,128,.25)}
.ouro th{font-weight:600}
.ouro th:first-child{position:sticky;left:0;background:var(--jp-layout-color0,var(--vscode-editor-background,Canvas))}
.ouro .key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .8em;vertical-align:-1px}
.ouro input{position:absolute;opacity:0}
.ouro label{display:inline-block;padding:1px 9px;margin:0 3px 6px 0;border:1px solid rgba(128,128,128,.5);border-radius:9px;cursor:pointer}
.ouro input:focus-visible+label{outline:2px solid Highlight}
.ouro [tabindex]:focus-visible{outline:2px solid Highlight}
.ouro [tabindex]:focus::after{content:attr(title);position:fixed;left:1em;bottom:1em;z-index:9;padding:.5em .8em;border:1px solid;
border-radius:4px;background:var(--jp-layout-color0,var(--vscode-editor-background,Canvas));font-weight:400;text-align:left;white-space:pre}
.ouro .pane{display:none}
.ouro tr.end>*{border-top:2px solid rgba(128,128,128,.8)}
.ouro tr.own td{font-weight:600}
.ouro .bar{display:flex;height:1.1em;min-width:12em}
.ouro svg{stroke:var(--mark)}
[data-jp-theme-light=false] .ouro,.vscode-dark .ouro{--mark:#8cc4ff}
@media (prefers-color-scheme:dark){.ouro-page .ouro{--mark:#8cc4ff}}
""".strip()


class View:
    """A fragment of HTML with its style.

    Parameters
    ----------
    body : str
        Markup without `html` and `body` elements.
    title : str
        Of the page that `save` writes.
    """

    def __init__(self, body: str, title: str) -> None:
        self.title = title
        self._body = f'<div class="ouro"><style>{STYLE}</style>{body}</div>'

    def _repr_html_(self) -> str:
        return self._body

    def __str__(self) -> str:
        return self._body

    def __repr__(self) -> str:
        return f"View({self.title!r}, {len(self._body):,} characters)"

    def __add__(self, other: View) -> View:
        """One view below the other."""
        if not isinstance(other, View):
            return NotImplemented
        view = View("", self.title)
        view._body = self._body + other._body
        return view

    def page(self) -> str:
        """A whole HTML document."""
        return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
                '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"></head>'
                f'<body class="ouro-page" style="margin:1.2em">{self._body}</body></html>')  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write a whole HTML document; what stood there is replaced only when all of it is written.

        Raises
        ------
        OSError
            Of the kind that the system gave, naming `path`.
        """
        path = Path(path)
        try:
            replace_file(path, [self.page().encode("utf-8")])
        except OSError as error:
            raise type(error)(error.errno, f"cannot write the page, {(error.strerror or str(error)).lower()}", str(path)) from None


def shade(value: float, colour: str = "#4477aa") -> str:
    """Style of a background of strength 0 to 1; values outside are clipped, NaN is none."""
    alpha = 0.0 if math.isnan(value) else min(max(float(value), 0.0), 1.0)
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"background:rgba({r},{g},{b},{0.75 * alpha:.3f})"


def shown(token: str, longest: int = 16) -> str:
    """A token as safe text on one line: spaces and controls made visible, long ones cut."""
    text = "".join("·" if c == " " else "↵" if c == "\n" else "⇥" if c == "\t" else c if c.isprintable() else "\ufffd" for c in token)
    return escape(text if len(text) <= longest else text[: longest - 1] + "…") or "∅"


def tip(text: str) -> str:
    """Attributes of an element that tells more: to a pointer above it, and to the keyboard or a finger when it has the focus. `text`
    is markup already; its first words should say what the element is, for those who hear it."""
    return f'tabindex="0" title="{text}"'


def step_panes(names: Sequence[str], panes: Sequence[str], chosen: int) -> str:
    """Panes of which one is seen, chosen by a row of radio buttons (arrow keys too). Names and panes are markup already."""
    group = "o" + hashlib.sha256("\0".join(panes).encode()).hexdigest()[:12]
    rules = ",".join(f"#{group}-{i}:checked~.{group}-{i}" for i in range(len(panes)))
    marks = ",".join(f"#{group}-{i}:checked+label" for i in range(len(panes)))
    out = [f"<style>{rules}{{display:block}}{marks}{{background:rgba(68,119,170,.45)}}</style>"]
    for i, name in enumerate(names):
        checked = " checked" if i == chosen else ""
        out.append(f'<input type="radio" name="{group}" id="{group}-{i}"{checked}><label for="{group}-{i}">{name}</label>')
    out += [f'<div class="pane {group}-{i}">{pane}</div>' for i, pane in enumerate(panes)]
    return '<div role="radiogroup" aria-label="step">' + "".join(out) + "</div>"


def step_key(n_steps: int) -> str:
    """Colour key of the steps."""
    return "".join(f'<span class="key" style="background:{STEP_COLOURS[t % len(STEP_COLOURS)]}"></span>step {t}' for t in range(n_steps))
