"""`ouro.Engine`: handles, isolation, limits, threads, and the log that can be replayed."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from conftest import load
from paths import FIXTURES

import ouro
from ouro import schedule

pytestmark = pytest.mark.core
STORY = "One day Ann took"
LONG = {"max_new_tokens": 900, "eos_token_id": []}


def outcome(g):
    return g.token_ids, g.logprobs, g.exit_steps, np.nan_to_num(g.exit_pdf, nan=-1).tolist(), g.text, g.finish_reason


def threads_named(name):
    return [t for t in threading.enumerate() if t.name == name]


@pytest.mark.parametrize("background", [True, False])
def test_each_result_is_what_it_is_alone(tiny, background):
    asked = [
        (STORY, {"max_new_tokens": 20}),
        ("Bob", {"max_new_tokens": 9, "temperature": 1.0, "seed": 3, "logprobs": 2}),
        ([5] * 200, {"max_new_tokens": 12, "exit_threshold": 0.6, "eos_token_id": []}),
        (STORY, {"max_new_tokens": 20, "stop": "worked", "repetition_penalty": 1.1}),
        ([7] * 70, {"max_new_tokens": 5, "exit_at_step": 1, "eos_token_id": []}),
    ]
    alone = [outcome(tiny.generate(p, **{**a, "speculate": False})) for p, a in asked]
    with ouro.Engine(tiny, max_lanes=16, background=background) as engine:
        handles = [engine.submit(p, **a) for p, a in asked]
        assert [outcome(h.result()) for h in handles] == alone
        assert all(h.done for h in handles) and "".join(handles[0]) == "".join(handles[0]) == handles[0].result().text
        s = engine.stats
        assert s.running == s.waiting == 0 and s.tokens >= sum(len(a[0]) for a in alone) and s.passes > 0
        assert s.cache_bytes == s.prefix_bytes > 0


def test_pieces_come_while_it_runs(tiny):
    with ouro.Engine(tiny) as engine:
        handle = engine.submit(STORY, **LONG)
        pieces = iter(handle)
        first = next(pieces) + next(pieces)
        assert not handle.done and handle.generation.text.startswith(first)
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            handle.result(timeout=0.01)
        handle.cancel()
        g = handle.result()
        assert g.finish_reason == "cancelled" and g.text.startswith(first) and first + "".join(pieces) == g.text
        assert 0 < len(g.token_ids) < 900 and g.stats.passes > 0


def test_coroutines(tiny):
    async def main():
        with ouro.Engine(tiny) as engine:
            one, two = engine.submit(STORY, max_new_tokens=10, eos_token_id=[]), engine.submit(STORY, max_new_tokens=10)
            pieces, whole = [p async for p in one], await two
            assert "".join(pieces) == one.generation.text and whole.text == two.result().text
            with pytest.raises(KeyError, match="mine"):
                await engine.submit("Bob", exit_rule=ouro.exits.CustomExit(rule=broken))
        with ouro.Engine(tiny, background=False) as engine, pytest.raises(RuntimeError, match="background"):
            await engine.submit("Bob")

    asyncio.run(main())


def broken(signal):
    raise KeyError("mine")


@pytest.mark.parametrize("background", [True, False])
def test_a_failing_request_harms_no_other(tiny, background):
    alone = outcome(tiny.generate(STORY, max_new_tokens=30, eos_token_id=[]))
    with ouro.Engine(tiny, background=background, max_cache_bytes=4 << 20) as engine:
        good = engine.submit(STORY, max_new_tokens=30, eos_token_id=[])
        bad = engine.submit("Bob", max_new_tokens=30, exit_rule=ouro.exits.CustomExit(rule=broken))
        for wrong in (
            {"max_new_tokens": 0}, {"top_p": 0}, {"exit_threshold": 2.0}, {"max_new_tokens": 10_000}, {"stop": ""}, {"unknown": 1},
            {"max_new_tokens": 900, "n_steps": 8},
        ):  # fmt: skip
            with pytest.raises((ValueError, TypeError, ouro.MemoryLimitError)):
                engine.submit(STORY, **wrong)
        after = engine.submit(STORY, max_new_tokens=30, eos_token_id=[])
        with pytest.raises(KeyError, match="mine"):
            bad.result()
        with pytest.raises(KeyError, match="mine"):
            list(bad)
        assert bad.done and outcome(good.result()) == outcome(after.result()) == alone


def test_what_does_not_fit_waits_or_is_refused(tiny):
    """Room for one request at a time, a queue of two: the fourth is refused, then all go in order of arrival."""
    page = ouro.Engine(tiny, max_cache_bytes=1, background=False)
    with pytest.raises(ouro.MemoryLimitError, match=r"needs \d+ bytes, 1 are allowed"):
        page.submit(STORY)
    with ouro.Engine(tiny, max_cache_bytes=600 << 10, max_queue=2, background=False) as engine:
        one = engine.submit([5] * 10, max_new_tokens=20, eos_token_id=[])
        engine.step()
        waiting = [engine.submit([5] * 10, max_new_tokens=20, eos_token_id=[]) for _ in range(2)]
        with pytest.raises(ouro.QueueFullError, match="2 requests are waiting"):
            engine.submit(STORY, max_new_tokens=20)
        assert (engine.stats.running, engine.stats.waiting) == (1, 2)
        waiting[0].cancel()
        engine.step()
        assert waiting[0].done and waiting[0].result().finish_reason == "cancelled" and not one.done
        assert waiting[1].result().token_ids == one.result().token_ids
        assert engine.stats.cache_peak <= 600 << 10


def test_cancel_in_every_phase(tiny):
    with ouro.Engine(tiny, max_lanes=8, prefill_lanes=4, background=False) as engine:
        reading = engine.submit([5] * 500, max_new_tokens=4)
        decoding = engine.submit([5], **LONG)
        for _ in range(20):
            engine.step()
        assert decoding.generation.token_ids and not reading.generation.token_ids
        late = engine.submit([6] * 300, max_new_tokens=4)
        for handle in (reading, decoding, late, late):
            handle.cancel()
        assert not engine.step()
        assert [h.result().finish_reason for h in (reading, decoding, late)] == ["cancelled"] * 3
        assert engine.stats.cache_bytes == engine.stats.prefix_bytes
        assert engine.submit(STORY, max_new_tokens=3).result().token_ids == tiny.generate(STORY, max_new_tokens=3).token_ids


@pytest.mark.parametrize("n, sweeps", [(8, 1), (9, 1), (10, 2), (16, 2), (17, 2), (18, 3)])
def test_a_prompt_of_whole_chunks_needs_no_sweep_of_its_own_for_its_last_token(tiny, n, sweeps):
    with ouro.Engine(tiny, max_lanes=8, prefix_cache_bytes=0, background=False) as engine:
        engine.submit([5] * n, max_new_tokens=1, eos_token_id=[], speculate=False).result()
        assert engine.stats.passes == sweeps * tiny.config.n_steps


def test_prompts_take_turns_and_leave_room_for_decoding(tiny):
    """While something decodes, chunks take at most prefill_lanes rows; a short prompt does not wait for a long one."""
    log = []
    with ouro.Engine(tiny, prefill_lanes=16, prefix_cache_bytes=0, background=False, log=log) as engine:
        first = engine.submit([5], **LONG)
        for _ in range(8):
            engine.step()
        long, short = (engine.submit(p, max_new_tokens=2, eos_token_id=[]) for p in ([6] * 900, [7] * 20))
        short.result()
        assert not long.done
        long.result()
        first.cancel()
    passes = [[lane[1] for lane in e["lanes"]] for e in log if "pass" in e]
    busy = [p for p in passes[8:] if "lead" in p or "late" in p]
    assert busy and all(p.count("prompt") <= 16 for p in busy) and max(p.count("prompt") for p in busy) == 16


def test_many_decoding_requests_never_starve_a_prompt(tiny):
    with ouro.Engine(tiny, max_lanes=4, background=False) as engine:
        busy = [engine.submit([5 + i], speculate=False, exit_threshold=0.3, **LONG) for i in range(3)]
        for _ in range(10):
            engine.step()
        assert engine.submit([9] * 40, max_new_tokens=2, eos_token_id=[]).result() and not any(h.done for h in busy)


def test_beginnings_are_reused(tiny):
    talk = [{"role": "user", "content": "Ann is the boss of Bob. " * 12}]
    with ouro.Engine(tiny) as engine:
        first = engine.chat(talk, max_new_tokens=80, eos_token_id=[]).result()
        talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Sort: 3 1 2"}]
        second = engine.chat(talk, max_new_tokens=20).result()
        alone = tiny.chat(talk, max_new_tokens=20)
        assert first.stats.prefix_tokens == 0 and outcome(second) == outcome(alone)
        assert 0 < second.stats.prefix_tokens < second.stats.prompt_tokens and second.stats.prefix_tokens % 64 == 0
    samples = tiny.generate([5] * 200, n=4, max_new_tokens=6, temperature=1.0, seed=2, eos_token_id=[])
    assert [g.stats.prefix_tokens for g in samples] == [0, 192, 192, 192]
    page = tiny.info()["kv_page_bytes"]  # 205 positions are four blocks at four steps, of which three were taken over
    assert [g.stats.cache_bytes for g in samples] == [16 * page, 4 * page, 4 * page, 4 * page]
    assert outcome(samples[0]) == outcome(tiny.generate([5] * 200, max_new_tokens=6, temperature=1.0, seed=2, eos_token_id=[]))


def test_shallower_depth_uses_deeper_blocks_only(tiny):
    with ouro.Engine(tiny, background=False) as engine:
        found = []
        for steps in (4, 2, 4, 6, 6):
            g = engine.submit([5] * 100, n_steps=steps, max_new_tokens=5, eos_token_id=[]).result()
            assert outcome(g) == outcome(tiny.generate([5] * 100, n_steps=steps, max_new_tokens=5, eos_token_id=[]))
            found.append(g.stats.prefix_tokens)
        assert found == [0, 64, 64, 0, 64]


def test_kept_blocks_stay_within_their_limit(tiny):
    with ouro.Engine(tiny, prefix_cache_bytes=2 << 20, background=False) as engine:
        for i in range(12):
            engine.submit([5 + i] * 300, max_new_tokens=2, eos_token_id=[]).result()
            s = engine.stats
            assert s.cache_bytes == s.prefix_bytes <= s.prefix_limit == 2 << 20
        again = engine.submit([16] * 300, max_new_tokens=2, eos_token_id=[]).result()
        gone = engine.submit([5] * 300, max_new_tokens=2, eos_token_id=[]).result()
        assert again.stats.prefix_tokens > 0 and gone.stats.prefix_tokens == 0


def test_closing(tiny):
    engine = ouro.Engine(tiny)
    running, waiting = engine.submit(STORY, **LONG), ouro.Engine(tiny, max_lanes=1)
    queued = [waiting.submit(STORY, **LONG) for _ in range(3)]
    next(iter(running))
    for e in (engine, waiting, engine):
        e.close()
    assert running.done and running.result().finish_reason == "cancelled" and running.result().token_ids
    assert all(h.result().finish_reason == "cancelled" for h in queued)
    assert repr(engine) == "Engine(closed)" and engine.stats.running == 0
    running.cancel()
    for call in (lambda: engine.submit(STORY), lambda: engine.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="background=False"), ouro.Engine(tiny) as e:
        e.step()


def test_an_engine_that_nobody_holds_ends(tiny):
    gc.collect()
    before = len(threads_named("ouro-engine"))
    handle = ouro.Engine(tiny).submit(STORY, **LONG)
    next(iter(handle))
    assert len(threads_named("ouro-engine")) == before + 1
    del handle
    gc.collect()
    assert len(threads_named("ouro-engine")) == before


def test_submits_and_cancels_from_many_threads(tiny):
    expected = tiny.generate([5] * 70, max_new_tokens=12, eos_token_id=[]).token_ids
    wrong = []

    def work(engine, i):
        for k in range(6):
            h = engine.submit([5] * 70, max_new_tokens=12, eos_token_id=[])
            if (i + k) % 3 == 0:
                h.cancel()
            got = h.result().token_ids
            wrong.extend([got] if got != expected[: len(got)] or (h.result().finish_reason == "length" and got != expected) else [])

    with ouro.Engine(tiny, max_lanes=8) as engine:
        crew = [threading.Thread(target=work, args=(engine, i)) for i in range(4)]
        for t in crew:
            t.start()
        tiny.trace([5] * 50)
        for t in crew:
            t.join()
        assert not wrong and engine.stats.running == engine.stats.waiting == 0


def test_fork_is_refused_clearly(tiny):
    with ouro.Engine(tiny) as engine:
        handle = engine.submit(STORY, max_new_tokens=4)
        handle.result()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                engine.submit(STORY)
            except RuntimeError as e:
                os.write(write, str(e).encode())
            engine.close()
            os.write(write, b" closed")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert b"before fork()" in os.read(read, 500)
        assert engine.submit(STORY, max_new_tokens=4).result().token_ids == handle.result().token_ids


SCRIPTS = {
    "exit without closing": """
import ouro
h = ouro.Engine(ouro.load("ouro-tiny")).submit("One day", max_new_tokens=900, eos_token_id=[])
next(iter(h))
print("end")
""",
    "ctrl-c while waiting": """
import os, signal, threading, time, ouro
m = ouro.load("ouro-tiny", isa="scalar")
with ouro.Engine(m) as engine:
    h = engine.submit([5] * 500, max_new_tokens=500, eos_token_id=[])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.perf_counter()
    try:
        h.result()
    except KeyboardInterrupt:
        print("late" if h.done or time.perf_counter() - begin > 20 else "end")
""",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_interpreter_ends_in_order(script):
    done = subprocess.run([sys.executable, "-c", SCRIPTS[script]], capture_output=True, text=True, timeout=120, cwd=FIXTURES)
    assert done.stdout == "end\n" and done.stderr == "" and done.returncode == 0


def test_ctrl_c_in_an_engine_of_the_callers_own_thread(tiny):
    """It ends the requests, not the engine; waiting on does not hang."""

    def interrupt(signal):
        if signal["step"] == 2:
            os.kill(os.getpid(), signal_number)
        return False

    import signal as signals

    signal_number = signals.SIGINT
    with ouro.Engine(tiny, background=False) as engine:
        other = engine.submit(STORY, max_new_tokens=20)
        handle = engine.submit(STORY, max_new_tokens=20, exit_rule=ouro.exits.CustomExit(rule=interrupt))
        with pytest.raises(KeyboardInterrupt):
            handle.result()
            other.result()
        for h in (handle, other):
            with suppress(KeyboardInterrupt):
                h.result()
        assert handle.done and other.done
        assert engine.submit(STORY, max_new_tokens=3).result().token_ids == tiny.generate(STORY, max_new_tokens=3).token_ids


def rule(signal):
    return signal["step"] >= 1


def test_replay(tiny, tmp_path):
    path, handles = tmp_path / "log.jsonl", []
    with ouro.Engine(tiny, max_lanes=12, prefill_lanes=5, log=path) as engine:
        for i in range(6):
            arguments = ({"temperature": 0.9, "seed": 5}, {"exit_threshold": 0.5}, {"exit_rule": ouro.exits.CustomExit(rule=rule)})[i % 3]
            handles.append(engine.submit([5 + i % 2] * (60 + 20 * i), max_new_tokens=15, eos_token_id=[], **arguments))
            if i == 3:
                handles[1].cancel()
                handles[0].result()
        results = {h.number: h.result() for h in handles}
    entries = schedule.read(path)
    assert entries[0]["version"] == 2 and {k for e in entries for k in e} >= {"submit", "pass", "lanes"}
    with pytest.raises(ouro.ReplayError, match="exit_rules"):
        schedule.replay(tiny, path)
    rules = {h.number: rule for h in handles}
    for log in (path, entries):
        again = schedule.replay(tiny, log, exit_rules=rules)
        assert {n: outcome(g) for n, g in again.items()} == {n: outcome(g) for n, g in results.items()}
    wrong = next(lane for e in entries for lane in e.get("lanes", ()) if lane[1] == "late")
    wrong[5] ^= 1
    with pytest.raises(ouro.ReplayError, match="lanes were"):
        schedule.replay(tiny, entries, exit_rules=rules)
    wrong[5] ^= 1
    with pytest.raises(ouro.ReplayError, match="the model is"):
        schedule.replay(load("trained", "float32"), path)
    with pytest.raises(ouro.ReplayError, match="version"):
        schedule.replay(tiny, [{"version": 99}])
    passes = [e for e in entries if e.get("events")]
    passes[3]["events"][0][1] += 1
    with pytest.raises(ouro.ReplayError, match=f"pass {passes[3]['pass']}: events"):
        schedule.replay(tiny, json.loads(json.dumps(entries)), exit_rules=rules)


def test_replay_takes_edits_again_and_hooks_are_refused(tiny):
    log, edits = [], [ouro.edits.Scale("steps.1.blocks.2.hook_mlp_out", 0.0)]
    with ouro.Engine(tiny, background=False, log=log) as engine:
        g = engine.submit(STORY, max_new_tokens=6, edits=edits, exit_threshold=0.5).result()
        with pytest.raises(ValueError, match="can not hold hooks"):
            engine._submit([5], tiny._settings(chat=False, arguments={"max_new_tokens": 1}), 0, [("hook_embed", lambda x, hook: x)])
    with pytest.raises(ouro.ReplayError, match="had the edits"):
        schedule.replay(tiny, log)
    assert outcome(schedule.replay(tiny, log, edits={1: edits})[1]) == outcome(g)


def test_times_of_tokens(tiny):
    with ouro.Engine(tiny, background=False, max_lanes=1) as engine:
        first, second = (engine.submit(STORY, max_new_tokens=n, eos_token_id=[], speculate=False) for n in (5, 3))
        g, later = first.result(), second.result()
    assert len(g.token_times) == 5 and sorted(g.token_times) == g.token_times and 0 < g.stats.prefill_seconds <= g.token_times[0]
    assert later.token_times[0] >= g.token_times[-1]  # it had to wait


def test_waiting_with_a_timeout_leaves_the_request_running(tiny):
    with ouro.Engine(tiny) as engine:
        handle = engine.submit(STORY, max_new_tokens=50, eos_token_id=[])
        while not handle.done:
            try:
                handle.result(timeout=0.001)
            except TimeoutError:
                time.sleep(0)
        assert len(handle.result().token_ids) == 50


@pytest.mark.parametrize("name", ["max_lanes", "max_cache_bytes", "prefix_cache_bytes", "max_queue", "prefill_lanes"])
def test_refused_options(tiny, name):
    with pytest.raises(ValueError, match=name):
        ouro.Engine(tiny, **{name: -1})
