"""The quality report: its numbers are what they say, nothing changes beside itself, int8 keeps the top token."""

import json

import numpy as np
import pytest
from conftest import load

import ouro
from ouro import cli
from ouro.errors import CheckpointError
from ouro.quality import quality_report, read_texts, shipped_texts


@pytest.fixture(scope="module")
def reports():
    return {c: quality_report(load("trained", c), load("trained")) for c in ("float32", "bfloat16", "int8", "int4")}


def test_nothing_beside_itself(reports):
    for s in reports["float32"].steps:
        assert s.relative_error == s.kl == s.loss_change == 0 and s.top1 == 1 and abs(s.cosine - 1) < 1e-12
    assert all(e.changed == 0 and e.steps == e.reference_steps for e in reports["float32"].exits)


def test_int8_keeps_the_top_token(reports):
    """At least 99 % of the positions at every step, on the shipped texts."""
    assert min(s.top1 for s in reports["int8"].steps) >= 0.99 and reports["int8"].n_tokens > 2000
    assert max(abs(s.loss_change) for s in reports["int8"].steps) < 0.002
    assert max(s.kl for s in reports["int8"].steps) < 2e-4
    assert max(e.changed for e in reports["int8"].exits) < 0.01


def test_order_of_computes(reports):
    """More bits, less error, at every step."""
    for better, worse in (("bfloat16", "int8"), ("int8", "int4")):
        for a, b in zip(reports[better].steps, reports[worse].steps, strict=True):
            assert a.relative_error < b.relative_error and a.kl < b.kl and a.cosine > b.cosine and a.worst_cosine > b.worst_cosine
    sizes = [reports[c].weight_bytes for c in ("int4", "int8", "bfloat16")]
    assert sizes == sorted(sizes)


def test_parts_at_8_bits_help_int4(reports):
    mixed = quality_report(ouro.load("ouro-tiny", compute="int4", formats={"o": "int8", "down": "int8"}), load("trained"))
    assert all(a.relative_error < 0.8 * b.relative_error for a, b in zip(mixed.steps, reports["int4"].steps, strict=True))


def test_numbers_by_hand():
    """Against plain NumPy on whole traces."""
    model, reference = load("tiny-gqa-tied", "int4"), load("tiny-gqa-tied")
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]
    report = quality_report(model, reference, texts, qs=(0.5,))
    a, b = (m.trace(texts, logits="all") for m in (model, reference))
    real = ~np.isnan(a.gate_logit[0])
    for t, step in enumerate(report.steps):
        h, r = a.states[t][real].astype(float), b.states[t][real].astype(float)
        cosine = (h * r).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(r, axis=-1)
        z, y = (x.logits[t][real].astype(float) for x in (a, b))
        log_p, log_r = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (z, y))
        following = np.array([*texts[0][1:], -1, *texts[1][1:], -1])
        has = following >= 0
        loss, loss_r = (-x[has, following[has]].mean() for x in (log_p, log_r))
        want = (cosine.mean(), cosine.min(), np.linalg.norm(h - r) / np.linalg.norm(r), (np.exp(log_r) * (log_r - log_p)).sum(-1).mean(),
                (z.argmax(-1) == y.argmax(-1)).mean(), loss, loss - loss_r)  # fmt: skip
        got = (step.cosine, step.worst_cosine, step.relative_error, step.kl, step.top1, step.loss, step.loss_change)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    ea, eb = (x.exit_step(0.5)[real] for x in (a, b))
    exits = report.exits[0]
    assert (exits.changed, exits.steps, exits.reference_steps) == ((ea != eb).mean(), (ea + 1).mean(), (eb + 1).mean())
    assert report.n_texts == 2 and report.n_tokens == 11


def test_other_depths_and_no_tokenizer():
    report = quality_report(load("tiny-one-step", "int8"), load("tiny-one-step"), n_steps=3)
    assert len(report.steps) == 3 and report.n_texts == 8
    assert quality_report(load("tiny-one-step", "int8"), load("tiny-one-step"), [[1]]).steps[0].loss == 0  # nothing follows


def test_what_makes_no_sense(tmp_path):
    with pytest.raises(ValueError, match="one shape"):
        quality_report(load("tiny-mha", "int8"), load("trained"))
    with pytest.raises(ValueError, match="empty"):
        quality_report(load("trained", "int8"), load("trained"), [])
    (tmp_path / "t").write_text("\n\n\n")
    with pytest.raises(ValueError, match="no texts"):
        read_texts(tmp_path / "t")
    with pytest.raises(CheckpointError):
        read_texts(tmp_path / "none")


def test_texts(tmp_path):
    (tmp_path / "t").write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(tmp_path / "t") == ["one\ntwo", "three"]
    a, b = shipped_texts("report"), shipped_texts("calibration")
    assert len(a) == len(b) == 21 and not set(a) & set(b)


def test_command(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.write_text("One day Ann took a small lamp to the forest.\n\nIt was raining.\n")
    arguments = ["report", "--compute", "int4", "--formats", "down=int8", "--texts", str(texts)]
    assert cli.main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["compute"] == "int4 (down int8)" and len(found["steps"]) == 4 and found["compute"] in shown and "top-1" in shown
    assert cli.main([*arguments, "--markdown"]) == 0
    assert capsys.readouterr().out.count("| --- | --- |\n") == 2
    assert cli.main(["quantize", "ouro-tiny", str(tmp_path / "q"), "--report", "--texts", str(texts)]) == 0
    assert "int8 beside float32" in capsys.readouterr().out
    assert cli.main(["report", "-m", str(tmp_path / "q")]) == 1
    assert "--reference" in capsys.readouterr().err
    assert cli.main(["report", "-m", str(tmp_path / "q"), "--reference", "ouro-tiny", "--texts", str(texts)]) == 0
    assert "int8 beside float32" in capsys.readouterr().out
