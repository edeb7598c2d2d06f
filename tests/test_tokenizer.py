"""Tokenizer, chat templates, and pieces of text that are whole characters."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from paths import FIXTURES, TINY

import ouro
from ouro.chat import ChatTemplate
from ouro.tokenizer import StreamDecoder, Tokenizer

OFFICIAL = Tokenizer.from_directory(FIXTURES / "official")


@pytest.mark.parametrize("case", json.loads((FIXTURES / "official" / "token_ids.json").read_text()), ids=lambda c: repr(c["text"])[:30])
def test_official_ids(case):
    assert OFFICIAL.encode(case["text"]) == case["ids"]
    assert OFFICIAL.decode(case["ids"]) == case["text"]


# the released vocabulary has no token for some control characters and unused bytes: such text loses them
BYTES = {data[0] for i in range(OFFICIAL.vocab_size) if len(data := OFFICIAL.bytes_of(i)) == 1}


@given(st.text(max_size=60))
def test_round_trip_and_stream(text):
    assume(set(text.encode()) <= BYTES)
    ids = OFFICIAL.encode(text)
    text = text.translate(dict.fromkeys((4, 6, 19, 20, 22, 29)))  # the released vocabulary has no tokens for these
    assert OFFICIAL.decode(ids) == text
    stream = StreamDecoder(OFFICIAL)
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 49151), max_size=30))
def test_any_ids_decode(ids):
    stream = StreamDecoder(OFFICIAL)
    assert "".join([*map(stream.push, ids), stream.flush()]) == OFFICIAL.decode(ids)


def test_emoji_waits_for_its_bytes():
    ids = OFFICIAL.encode("🦜")
    assert len(ids) > 1
    stream = StreamDecoder(OFFICIAL)
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_stop_ids_come_from_the_tokenizer():
    assert OFFICIAL.stop_ids(chat=True) == [2, 0]
    assert OFFICIAL.stop_ids(chat=False) == [0]


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ouro.CheckpointError, match="not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    assert Tokenizer.from_directory(FIXTURES / "tiny-mha") is None


def test_chat_template():
    template = ChatTemplate.from_directory(FIXTURES / "official")
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages, enable_thinking=True).endswith("assistant\n<think>\n")
    assert ChatTemplate.from_directory(TINY).render(messages) == template.render(messages)
    for bad in ([], [{"role": "user"}], ["hi"], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError):
            template.render(bad)


def test_template_is_sandboxed():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="refused"):
        template.render([{"role": "user", "content": "x"}])
    with pytest.raises(ouro.CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}")
