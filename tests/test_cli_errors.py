"""What is wrong on the command line is said in one line, before any long work: status 2 for how it was asked, 1 for what was found."""

import shutil

import pytest
from paths import TINY

from ouro import cli

BENCH = ["bench", "--compute", "int8", "--threads", "1", "--prompt", "0", "--new", "1", "--rounds", "1"]


@pytest.fixture
def damaged(tmp_path):
    """The packaged model with half of its weights."""
    shutil.copytree(TINY, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])
    return str(tmp_path / "damaged")


def said(capfd, arguments):
    """Status and the lines on standard error; nothing may have been printed."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    return status, err.strip().splitlines()


def test_a_damaged_file_is_one_line(capfd, damaged):
    for command in (["generate", "x"], ["inspect", "x"], ["info"], ["report"], ["chat"], BENCH):
        status, lines = said(capfd, [*command, "-m", damaged])
        assert status == 1 and len(lines) == 1 and "beyond the file" in lines[0], lines
    status, lines = said(capfd, ["quantize", damaged, damaged + ".int8"])
    assert status == 1 and len(lines) == 1 and "beyond the file" in lines[0]


def test_outputs_that_can_not_be_written_are_refused_before_the_work(capfd, tmp_path):
    folder, nowhere = str(tmp_path), str(tmp_path / "no" / "file.png")
    for command, message in (
        (["inspect", "x", "--html", folder], "is a directory"),
        (["inspect", "x", "--html", nowhere], "no such directory"),
        (["inspect", "x", "--plot", nowhere], "no such directory"),
        (["report", "--json", folder], "is a directory"),
        (["report", "--json", nowhere], "no such directory"),
        (["quantize", "ouro-tiny", str(tmp_path / "q"), "--report", "--json", nowhere], "no such directory"),
        ([*BENCH, "--plot", nowhere], "no such directory"),
        ([*BENCH, "--log", folder], "is a directory"),
    ):
        status, lines = said(capfd, command)
        assert status == 1 and len(lines) == 1 and message in lines[0], lines
    assert list(tmp_path.iterdir()) == []


def test_options_out_of_range(capfd, tmp_path):
    (tmp_path / "log").write_text("no json\n")
    for command, message in (
        ([*BENCH, "--context", "99999"], "exceed the context of 1024"),
        ([*BENCH, "--threads", "0"], "1 to 1024 threads"),
        ([*BENCH, "--seconds", "nan"], "seconds above 0"),
        ([*BENCH[:-1], "0", "--log", str(tmp_path / "log")], "is no log of ouro bench"),
        (["generate", "x", "-n", "0"], "max_new_tokens is 0, expected 1 or more"),
        (["generate", "x", "--exit-rule", "entropie:1"], "there is no exit rule 'entropie'"),
        (["generate", "x", "--exit-rule", "x" + "é" * 300], "é�', expected one of never, q, state_delta"),
    ):
        status, lines = said(capfd, command)
        assert status == 1 and message in lines[-1], lines
    for command, message in (
        (["inspect", "x", "--plot", str(tmp_path / "picture")], "must end in one of .png"),
        (["generate", "x", "--threads", "two"], "invalid int value"),
        (["genrate"], "did you mean 'generate'"),
    ):
        status, lines = said(capfd, command)
        assert status == 2 and message in lines[-1], lines
