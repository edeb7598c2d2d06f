"""The Python surface: what calls give, what they refuse, and that nothing breaks a model."""

import inspect
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import load, reference
from paths import FIXTURES

import ouro
from ouro import _core
from ouro.generation import settings

STORY = "One day Ann took"

PLAIN = {
    "n_steps": 4,
    "exit_at_step": -1,
    "weighted_exit": False,
    "exit_kind": "never",
    "exit_threshold": 0.0,
    "exit_min_steps": 0,
    "exit_delay": 0,
    "exit_rule": None,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stream": 0,
    "stop_ids": [],
    "n_top": 0,
    "speculate": 0,
}
"""Engine arguments of plain greedy decoding."""


def test_trace_shapes(tiny):
    t = tiny.trace(STORY)
    n, c = len(tiny.to_tokens(STORY)), tiny.config
    assert t.states.shape == (c.n_steps, 1, n, c.d_model) and t.states.dtype == np.float32
    for a in (t.gate_logit, t.exit_lambda, t.exit_pdf, t.exit_cdf, t.entropy):
        assert a.shape == (c.n_steps, 1, n) and a.dtype == np.float32
    assert t.exit_entropy.shape == t.expected_steps.shape == t.exit_step(0.5).shape == (1, n)
    assert t.logits.shape == (1, 1, n, c.d_vocab) and t.weighted_logits().shape == (1, n, c.d_vocab)
    assert tiny.trace(STORY, logits="all").logits.shape == (c.n_steps, 1, n, c.d_vocab)
    assert tiny.trace(STORY, logits="none").logits is None
    np.testing.assert_allclose(t.exit_pdf.sum(0), 1, rtol=1e-6)
    assert (t.exit_cdf[-1] == 1).all() and (t.exit_step(1.0) == c.n_steps - 1).all() and (t.exit_step(0.0) == 0).all()


def test_readouts_against_numpy(tiny):
    t = tiny.trace(STORY, logits="all")
    z = t.logits.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(t.entropy, -(p * np.log(p)).sum(-1), rtol=2e-4, atol=1e-5)
    ids, probabilities = t.top_tokens(3)
    np.testing.assert_array_equal(ids[..., 0], z.argmax(-1))
    np.testing.assert_allclose(probabilities, np.sort(p, -1)[..., ::-1][..., :3], rtol=1e-4)
    np.testing.assert_allclose(t.weighted_logits(), (t.exit_pdf[..., None] * t.logits).sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t.exit_entropy, -(t.exit_pdf * np.log(t.exit_pdf)).sum(0), rtol=1e-5)


def test_kinds_of_input(tiny):
    ids = tiny.to_tokens(STORY)
    whole = tiny.trace(ids).states
    for same in (STORY, np.array(ids), np.array([ids]), [ids], [STORY], tuple(ids)):
        np.testing.assert_array_equal(tiny.trace(same).states, whole)
    assert tiny.to_string(ids) == STORY and "".join(tiny.to_str_tokens(STORY)) == STORY
    for bad in ([], "", [[]], [99999], [-1], np.zeros((1, 1, 1), int), np.array([0.5]), 7, [1, "a"], [True, False]):
        with pytest.raises((ValueError, TypeError)):
            tiny.trace(bad)


def test_generation_result(tiny):
    g = tiny.generate(STORY, max_new_tokens=12, logprobs=2, eos_token_id=[])
    assert len(g.token_ids) == len(g.logprobs) == len(g.top_logprobs) == len(g.exit_steps) == 12
    assert g.finish_reason == "length" and g.prompt_token_ids == tiny.to_tokens(STORY)
    assert all(
        max(top, key=top.get) == token and math.isclose(top[token], lp)
        for top, token, lp in zip(g.top_logprobs, g.token_ids, g.logprobs, strict=True)
    )
    assert g.text == tiny.to_string(g.token_ids)
    assert g.stats.tokens == 12 and g.stats.passes > 0 and g.stats.prefill_seconds > 0 and g.stats.cache_bytes > 0
    assert all(math.isclose(sum(pdf), 1, rel_tol=1e-5) for pdf in g.exit_pdf)


def test_lists_and_samples(tiny):
    many = tiny.generate([STORY, "Bob"], max_new_tokens=6, n=3, temperature=1.0, seed=5)
    assert [len(x) for x in many] == [3, 3] and many[0][0].token_ids != many[0][1].token_ids
    assert many[0][0].token_ids == tiny.generate(STORY, max_new_tokens=6, temperature=1.0, seed=5).token_ids
    assert many[1][2].token_ids == tiny.generate("Bob", max_new_tokens=6, temperature=1.0, seed=5, n=3)[2].token_ids


def test_stop_strings_and_stream(tiny):
    full = tiny.generate(STORY, max_new_tokens=40, eos_token_id=[])
    cut = tiny.generate(STORY, max_new_tokens=40, eos_token_id=[], stop=["worked. At", "zzz"])
    assert cut.finish_reason == "stop" and cut.text == full.text.split("worked. At")[0] and cut.stats.tokens < 40
    assert "".join(tiny.stream(STORY, max_new_tokens=40, eos_token_id=[])) == full.text
    assert "".join(tiny.stream(STORY, max_new_tokens=40, eos_token_id=[], stop="worked. At")) == cut.text
    stream = tiny.stream(STORY, max_new_tokens=40)
    next(stream)
    stream.close()
    assert tiny.generate(STORY, max_new_tokens=40, eos_token_id=[]).token_ids == full.token_ids


def test_chat_stops_at_the_end_of_the_turn(tiny):
    g = tiny.chat([{"role": "user", "content": "Sort: 3 1 2"}])
    assert g.finish_reason == "stop" and g.token_ids[-1] in tiny.tokenizer.stop_ids(chat=True)
    assert "<|im_end|>" not in g.text and g.text == "".join(tiny.chat_stream([{"role": "user", "content": "Sort: 3 1 2"}]))


CONTRADICTIONS = [
    {"exit_at_step": 1, "exit_threshold": 0.5}, {"weighted_exit": True, "exit_at_step": 0}, {"exit_at_step": 4}, {"exit_at_step": -1},
    {"exit_threshold": 1.5}, {"exit_threshold": -0.1}, {"n_steps": 0}, {"n_steps": 1000}, {"n_steps": 2,
    "exit_at_step": 2}, {"max_new_tokens": 0},
    {"temperature": -1}, {"top_p": 0}, {"stop": ""}, {"stop": [3]}, {"seed": -1}, {"logprobs": 1000}, {"speculate": "maybe"}, {"n": 0},
]  # fmt: skip


@pytest.mark.parametrize("arguments", CONTRADICTIONS, ids=str)
def test_refused_arguments(tiny, arguments):
    with pytest.raises(ValueError):
        tiny.generate(STORY, **{"max_new_tokens": 4, **arguments})


def test_arguments_are_in_the_signature_and_misspelt_ones_refused(tiny):
    """The names users rely on, with their defaults; the typed dictionary names the same ones."""
    shared = {"n_steps": None, "exit_at_step": None, "exit_threshold": None, "weighted_exit": False, "temperature": 0, "top_k": 0,
              "top_p": 1, "min_p": 0, "repetition_penalty": 1, "stop": None, "eos_token_id": None, "seed": None,
              "logprobs": None}  # fmt: skip
    for call in (tiny.generate, tiny.stream, tiny.chat, tiny.chat_stream):
        found = inspect.signature(call).parameters
        assert {name: found[name].default for name in shared} == shared and "max_new_tokens" in found
    assert inspect.signature(tiny.generate).parameters["n"].default == 1
    made = settings(trained_steps=4, default_stop_ids=[7], max_new_tokens=1)  # what the defaults come to
    assert (made.n_steps, made.exit_at_step, made.stop_ids, made.speculate, made.kv_policy) == (4, -1, (7,), 2, 0)
    with pytest.raises(ValueError, match="exit_at_step and exit_threshold contradict each other"):
        tiny.generate(STORY, exit_at_step=0, exit_threshold=0.0)  # 0 is something, not nothing
    for call in (tiny.generate, tiny.stream):
        with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
            call(STORY, temprature=1.0)


def test_context_and_memory_are_refused_with_numbers(tiny):
    with pytest.raises(ouro.ContextLengthError, match="1024"):
        tiny.generate(STORY, max_new_tokens=1024)
    with pytest.raises(ouro.ContextLengthError, match=r"1025.*1024"):
        tiny.trace([1] * 1025)
    engine = _core.Engine(tiny._core, 8, 1 << 20)
    with pytest.raises(ouro.MemoryLimitError, match=r"needs \d+ bytes, 1048576"):
        engine.submit(np.arange(5, dtype=np.int32), max_new_tokens=900, **PLAIN)


def test_requests_wait_for_memory(tiny):
    """Two requests that fit only one after the other: the second waits, both finish."""
    engine = _core.Engine(tiny._core, 64, 600 << 10)
    ids = [engine.submit(np.arange(3, 8, dtype=np.int32), max_new_tokens=10, **PLAIN) for _ in range(3)]
    out = {i: [] for i in ids}
    while engine.pending():
        for event in engine.step():
            out[event[0]].append(event[1])
    assert out[ids[0]] == out[ids[1]] == out[ids[2]] and len(out[ids[0]]) == 10 and engine.stats()["cache_bytes"] == 0


def test_model_without_tokenizer():
    model = load("tiny-mha")
    assert model.tokenizer is None and model.generate([1, 2, 3], max_new_tokens=2).text == ""
    for call in (
        lambda: model.trace("text"),
        lambda: model.generate([1], stop="x"),
        lambda: model.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("arguments", [{"compute": "float16"}, {"threads": 0}, {"threads": 5000}, {"kv_dtype": "float32"}, {"isa": "sse"},
                                       {"exact": False}, {"compute": "float32", "kv_dtype": "int8"}], ids=str)  # fmt: skip
def test_refused_loads(arguments):
    with pytest.raises((ValueError, RuntimeError)):
        ouro.load("ouro-tiny", **arguments)


@pytest.mark.core
def test_two_threads_use_one_model(tiny):
    ids = reference("trained")["input_ids"]
    expected = [tiny.generate(row[:20], max_new_tokens=20, eos_token_id=[]).token_ids for row in ids]
    found = [None] * len(ids)

    def work(i):
        for _ in range(5):
            found[i] = tiny.generate(ids[i][:20], max_new_tokens=20, eos_token_id=[]).token_ids

    crew = [threading.Thread(target=work, args=(i,)) for i in range(len(ids))]
    for t in crew:
        t.start()
    for t in crew:
        t.join()
    assert found == expected


def test_model_survives_fork(tiny):
    expected = tiny.generate(STORY, max_new_tokens=8).token_ids
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, repr(tiny.generate(STORY, max_new_tokens=8).token_ids == expected).encode())
        os._exit(0)
    assert os.read(read, 10) == b"True" and os.waitpid(child, 0)[1] == 0
    assert tiny.generate(STORY, max_new_tokens=8).token_ids == expected


CTRL_C = """
import ouro, os, signal, threading, time
from ouro.checkpoint import Checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
quick = Checkpoint.read_into
def slow(*a):
    time.sleep(0.05)
    quick(*a)
m = ouro.load("ouro-tiny", isa="scalar")
def load_slowly():
    Checkpoint.read_into = slow
    ouro.load("ouro-tiny")
expected = m.generate("One day", max_new_tokens=4).token_ids
for work in (load_slowly, lambda: m.trace([5] * 1000), lambda: m.generate([5] * 600, max_new_tokens=400, eos_token_id=[])):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.perf_counter()
    try:
        work()
        print("not interrupted")
    except KeyboardInterrupt:
        print("ok" if time.perf_counter() - begin < 20 else "late")
    Checkpoint.read_into = quick
print(*(x.generate("One day", max_new_tokens=4).token_ids == expected for x in (m, ouro.load("ouro-tiny"))))
"""


def test_ctrl_c_returns_and_leaves_the_model_usable():
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=300, cwd=FIXTURES)
    assert done.stdout.split() == ["ok", "ok", "ok", "True", "True"], done.stderr


def test_memory_comes_back(tiny):
    tiny.generate([3] * 200, max_new_tokens=10)
    before = _core.resident_memory()
    for _ in range(30):
        tiny.generate([3] * 200, max_new_tokens=10, eos_token_id=[])
        tiny.trace([3] * 200, logits="none")
    assert _core.resident_memory() - before < 16 << 20


def test_core_refuses_wrong_calls():
    model = load("tiny-mha")._core
    with pytest.raises(RuntimeError):
        model.put(2, 0, 2, 0, bytes(4 * 64))
    with pytest.raises(ValueError, match="d_model"):
        model.readout(np.zeros((2, 3), np.float32), False)
    with pytest.raises(ValueError):
        model.trace([np.zeros(0, np.int32)], 1, 0, 1)
    fresh = _core.Model(1, 1, 2, 1, 48, 24, 40, 97, 64, 1e-6, 1e4, False, "float32", "float32", "float32", "float32", "float32", "float32")
    with pytest.raises(RuntimeError, match="not ready"):
        fresh.trace([np.zeros(1, np.int32)], 1, 0, 1)
    with pytest.raises(ValueError, match="whole rows"):
        fresh.put(0, 0, 2, 0, b"123")
    with pytest.raises(RuntimeError, match="0 of 97 rows"):
        fresh.finish(1, "float32")


def test_command_line(tmp_path):
    def run(*arguments, **more):
        return subprocess.run([sys.executable, "-m", "ouro", *arguments], capture_output=True, text=True, timeout=120, cwd=FIXTURES, **more)

    made = run("generate", STORY, "-n", "8")
    assert made.returncode == 0 and made.stdout.startswith(STORY) and len(made.stdout) > len(STORY) + 8
    assert "p(exit)" in run("inspect", "Ann is the boss of Bob.").stdout
    assert "avx" in run("info").stdout or "neon" in run("info").stdout or "scalar" in run("info").stdout
    assert (
        run("chat", input="Sort: 3 1 2\n\n").stdout.strip("> \n")
        == load("trained", "bfloat16").chat([{"role": "user", "content": "Sort: 3 1 2"}]).text
    )
    misspelt = {("genrate", "x"): "did you mean 'generate'", ("generate", "x", "--temprature", "1"): "did you mean '--temperature'",
                ("info", "-m", "ouro-tyni"): "did you mean 'ouro-tiny'", ("info", "-m", "x"): "ouro-tiny"}  # fmt: skip
    for words, hint in misspelt.items():
        made = run(*words)
        assert made.returncode in (1, 2) and hint in made.stderr and "Traceback" not in made.stderr
    refused = run("generate", STORY, "--exit-at-step", "9")
    assert refused.returncode == 1 and refused.stdout == "" and "0 to 3" in refused.stderr
    unknown = run("info", env={**os.environ, "OURO_ISA": "sse"})
    assert unknown.returncode == 1 and "scalar" in unknown.stderr and "Traceback" not in unknown.stderr
    wrong = run("generate", "x", "-m", str(tmp_path / "none"))
    assert wrong.returncode == 1 and wrong.stderr.startswith("ouro: ") and "Traceback" not in wrong.stderr


def test_import_is_light():
    code = "import sys, time; t = time.process_time(); import ouro; print(time.process_time() - t, *sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FIXTURES).stdout.split()
        for _ in range(5)
    ]
    assert min(float(r[0]) for r in runs) < 0.25
    heavy = {"tqdm", "matplotlib", "pandas", "xarray", "sklearn", "tokenizers", "huggingface_hub", "jinja2", "torch"}
    assert not heavy & set(runs[0])


def test_stub_agrees_with_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "ouro._core", "--ignore-disjoint-bases"],
        capture_output=True,
        text=True,
        cwd=FIXTURES,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_line_when_nobody_reads_on():
    command = [sys.executable, "-m", "ouro", "inspect", "Ann is the boss of Bob."]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=FIXTURES)
    run.stdout.close()
    assert run.wait(60) == 141 and run.stderr.read() == b""
    run.stderr.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_steps": True}, "n_steps is True, expected a whole number"), ({"n_steps": 2.5}, "n_steps is 2.5"), ({"seed": 1.5}, "seed is"),
        ({"exit_at_step": True}, "exit_at_step is True"), ({"top_k": 2.5}, "top_k is 2.5"), ({"logprobs": True}, "logprobs is True"),
        ({"max_new_tokens": None}, "max_new_tokens is None"), ({"eos_token_id": "a"}, "eos_token_id is 'a', expected token ids"),
        ({"eos_token_id": [2.5]}, "eos_token_id is 2.5"), ({"follow": "ab"}, "follow is 'ab'"), ({"stop": 5}, "stop is 5, expected text"),
    ],
    ids=str,
)  # fmt: skip
def test_generation_arguments_of_a_wrong_type_are_named(tiny, wrong, message):
    with pytest.raises(TypeError, match=message):
        tiny.generate("One day", **wrong)


def test_generation_takes_numbers_of_numpy(tiny):
    plain = tiny.generate("One day", max_new_tokens=3, n_steps=3, seed=7, temperature=1.0)
    given = tiny.generate("One day", max_new_tokens=np.int32(3), n_steps=np.int64(3), seed=np.uint64(7), temperature=np.float32(1.0))
    assert given.token_ids == plain.token_ids
    followed = tiny.generate("One day", max_new_tokens=3, follow=np.array(plain.token_ids), eos_token_id=np.int64(0))
    assert followed.token_ids == plain.token_ids
