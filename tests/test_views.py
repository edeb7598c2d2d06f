"""HTML views: what they show, that nothing in a token can break out of them, and that they need neither script nor network."""

import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from paths import FIXTURES

import ouro
from ouro.measures import TunedLens, logit_lens
from ouro.views import attention_grid, exit_strip, lens_table, token_view
from ouro.views.page import View, shade, shown

VOID = {"meta", "input", "path", "br", "img"}


class Balanced(HTMLParser):
    """Fails on tags that do not close in order; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def trace(tiny):
    return tiny.trace(["One day Ann took", "Bob"])


def every_view(trace):
    pattern = np.tril(np.full((4, 2, 3, 3), 0.5, np.float32))
    lens = logit_lens(trace._model, ["One day Ann took", "Bob"])
    return [token_view(trace), token_view(trace, row=1, colour="entropy"), exit_strip(trace, q=0.5), attention_grid(pattern, tokens="abc"),
            lens_table(lens), lens_table(lens, row=1, last_first=False)]  # fmt: skip


def test_views_are_static_and_well_formed(trace):
    for view in every_view(trace):
        page = Balanced(view.page())
        assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
        assert "url(" not in view.page() and "http" not in view.page() and len(str(view)) < 200_000


def test_tips_need_no_pointer(trace):
    """Whatever has a tip takes the focus, and the style sheet shows the tip of what has it; nothing else is a stop of the Tab key."""
    for view in every_view(trace):
        html = str(view)
        tags = re.findall(r"<[a-z]+ [^>]*>", html)
        tips = [tag for tag in tags if "title=" in tag]
        assert tips == [tag for tag in tags if 'tabindex="0"' in tag] and "tabindex" not in "".join(set(tags) - set(tips))
        assert all(re.search(r'title="(position|step|exit at position) ?\d', tag) for tag in tips)
        assert "[tabindex]:focus::after{content:attr(title)" in html and "[tabindex]:focus-visible{outline:" in html
        for tag in tags:  # what can not be read is named
            assert 'role="img"' not in tag or re.search(r'(title|aria-label)="[^"]+"', tag)
    bars = re.findall(r'(?s)class="bar" role="img" tabindex="0" title="([^"]+)"', str(exit_strip(trace)))
    shares = [f"step {t}: {p:.3f}" for t, p in enumerate(trace.exit_pdf[:, 0, 2])]
    assert len(bars) == trace.lengths[0] and bars[2].splitlines()[1:] == shares
    lens = str(lens_table(logit_lens(trace._model, "One day")))  # hundreds of stops: folded away, it has none
    assert lens.index("<details open><summary>") < lens.index("<table>") < lens.index("</details>")


def test_token_view_shows_the_top_token_of_each_step(trace, tiny):
    text = Balanced(str(token_view(trace))).text
    ids, _ = trace.top_tokens(1)
    panes = text.count(shown(" took"))
    assert panes >= trace.n_steps
    for t in range(trace.n_steps):
        assert f"after step {t}" in text
        assert shown(tiny.to_str_tokens([int(ids[t, 0, 3, 0])])[0]) in text


def test_exit_strip_is_the_distribution(trace):
    html = str(exit_strip(trace, row=1, q=0.5))
    widths = np.array([float(x) for x in re.findall(r"flex:([0-9.]+) 1 0", html)])
    np.testing.assert_allclose(widths, trace.exit_pdf[:, 1, : trace.lengths[1]].T.reshape(-1), atol=1e-4)
    found = re.findall(r"<td>(\d+)</td></tr>", html)
    assert [int(x) for x in found] == trace.exit_step(0.5)[1, : trace.lengths[1]].tolist()


def test_lens_table_shows_the_top_token_of_each_place(tiny, trace):
    lens = logit_lens(tiny, ["One day Ann took", "Bob"])
    rows = re.findall(r"(?s)<tr[^>]*><th>([^<]*)</th>(.*?)</tr>", str(lens_table(lens, last_first=False)))[1:]
    assert [name for name, _ in rows] == [f"{'~ ' if layer < 3 else ''}{t}.{layer}" for t in range(4) for layer in range(4)]
    ids, p = trace.top_tokens(1)
    for t in range(4):  # the last layer of a step says what the step says, bit for bit
        cells = re.findall(r'rgba\(68,119,170,([0-9.]+)\)" tabindex="0" title="[^"]*">([^<]*)</td>', rows[4 * t + 3][1])
        assert [word for _, word in cells] == [shown(tiny.to_str_tokens([int(i)])[0], 12) for i in ids[t, 0, :, 0]]
        np.testing.assert_allclose([float(a) for a, _ in cells], 0.75 * p[t, 0, :, 0], atol=2e-3)
    last_first = re.findall(r"<tr[^>]*><th>([^<]*)</th>", str(lens_table(lens)))[1:]
    assert last_first == [name for name, _ in rows][::-1]
    assert str(lens_table(lens, row=1)).count("<td") == 4 * 4 * trace.lengths[1]


def test_lens_table_of_a_tuned_lens_claims_nothing_exact(tiny):
    lens = logit_lens(tiny, "One day Ann took", tuned=TunedLens(alpha=1.0).fit(tiny, "One day Ann took the cup to the cave."))
    html = str(lens_table(lens))
    assert "exact" not in html and html.count("<th>~ ") == 16


def test_lens_table_of_something_else(tiny):
    with pytest.raises(ValueError, match=r"expected the result of ouro\.measures\.logit_lens"):
        lens_table(ouro.measures.loop_drift(tiny, "One day"))
    lens = logit_lens(tiny, "One day")
    with pytest.raises(IndexError, match="expected 0 to 0"):
        lens_table(lens, row=1)
    with pytest.raises(ValueError, match="has axes"):
        lens_table(lens.isel(batch=0))


def test_attention_grid_draws_what_is_attended():
    pattern = np.zeros((1, 2, 3, 3), np.float32)
    pattern[0, 1, 2, 0], pattern[0, 1, 1, :2] = 0.75, 0.5
    html = str(attention_grid(pattern, heads=[1]))
    assert 'viewBox="0 -.5 3 3"' in html
    marks = re.findall(r'<path stroke-opacity="([0-9.]+)" d="([^"]+)"/>', html)
    assert marks == [("0.50", "M0 1h1M1 1h1"), ("0.75", "M0 2h1")]  # x: attended to, y: attends


def test_text_of_tokens_is_escaped(trace):
    assert shown("<script>") == "&lt;script&gt;" and shown(" a\n") == "·a↵" and shown('"') == "&quot;" and shown("") == "∅"
    named = attention_grid(np.ones((1, 1, 1, 1)), tokens=["<b onclick=x>"])
    assert "<b onclick" not in str(named)


def test_shade_clips_and_forgives_nan():
    assert shade(2.0) == shade(1.0) and shade(-1.0) == shade(0.0) == shade(float("nan"))


def test_selectors_of_two_views_do_not_meet(trace):
    a, b = str(token_view(trace)), str(token_view(trace, row=1))
    groups = [set(re.findall(r'name="([^"]+)"', x)) for x in (a, b)]
    assert groups[0] and not groups[0] & groups[1]


def test_save_leaves_no_half_written_page(tmp_path, trace):
    path = tmp_path / "v.html"
    token_view(trace).save(path)
    assert path.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        View("", "x").save(tmp_path / "nowhere" / "v.html")


def test_save_replaces_files_only(tmp_path, trace):
    """A pipe (as a device) is written to and stays one; a link stays a link."""
    view, pipe, got = token_view(trace), tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    view.save(pipe)
    reader.join(timeout=30)
    assert got == [view.page()] and pipe.is_fifo()
    (tmp_path / "real.html").touch()
    (tmp_path / "link.html").symlink_to("real.html")
    view.save(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").read_text(encoding="utf-8") == view.page()
    with pytest.raises(IsADirectoryError, match="cannot write the page"):
        view.save(tmp_path)


@pytest.mark.parametrize("wrong", [{"row": 2}, {"step": 4}, {"colour": "red"}])
def test_wrong_arguments(trace, wrong):
    with pytest.raises((IndexError, ValueError), match="expected"):
        token_view(trace, **wrong)


def test_attention_of_a_wrong_shape():
    with pytest.raises(ValueError, match="expected \\[step, head"):
        attention_grid(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="at most 128"):
        attention_grid(np.zeros((1, 1, 129, 129)))


def test_inspect_writes_a_page(tmp_path):
    path = tmp_path / "out.html"
    command = [sys.executable, "-m", "ouro", "inspect", "One day", "--html", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=FIXTURES)
    assert run.returncode == 0, run.stderr
    assert "after step 3" in Balanced(path.read_text()).text and "step.layer" not in path.read_text()
    run = subprocess.run([*command, "--lens"], capture_output=True, text=True, cwd=FIXTURES)
    assert run.returncode == 0, run.stderr
    assert "step.layer" in Balanced(path.read_text()).text
    run = subprocess.run([*command[:5], "--lens"], capture_output=True, text=True, cwd=FIXTURES)
    assert run.returncode == 1 and "--html FILE" in run.stderr


def test_views_are_imported_on_demand():
    code = "import sys, ouro; assert 'ouro.views' not in sys.modules; ouro.views.View; assert 'ouro.views' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FIXTURES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ouro.nothing
