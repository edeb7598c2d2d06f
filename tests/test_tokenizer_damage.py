"""Damaged tokenizers and chat templates: a CheckpointError at the door, a ValueError for messages, and nothing silent."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIXTURES, TINY

import ouro
from ouro.chat import ChatTemplate
from ouro.tokenizer import StreamDecoder, Tokenizer

BLOB = (TINY / "tokenizer.json").read_bytes()
HELLO = [{"role": "user", "content": "Hi"}]


def directory_with(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_truncation_and_padding_of_a_training_run_are_undone(tmp_path):
    found = json.loads(BLOB)
    found["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                        "pad_token": "<|endoftext|>"}  # fmt: skip
    text = "One day Ann took the ball of Bob to the park."
    good = Tokenizer.from_directory(TINY).encode(text)
    assert Tokenizer.from_directory(directory_with(tmp_path, tokenizer__json=json.dumps(found))).encode(text) == good
    assert 3 < len(good) < 64


def test_other_kinds_of_tokenizers_refused(tmp_path):
    found = json.loads(BLOB)
    found["decoder"] = None
    with pytest.raises(ouro.CheckpointError, match="byte-level"):
        Tokenizer.from_directory(directory_with(tmp_path, tokenizer__json=json.dumps(found)))


def test_vocabulary_with_other_characters_refused(tmp_path):
    found = json.loads(BLOB)
    found["model"]["vocab"]["漢"] = max(found["model"]["vocab"].values()) + 1
    with pytest.raises(ouro.CheckpointError, match="not byte-level"):
        Tokenizer.from_directory(directory_with(tmp_path, tokenizer__json=json.dumps(found)))


def with_changes(tmp_path, model, **changes):
    found = json.loads(BLOB)
    found["model"] = found["model"] | model if "type" not in model else model
    return directory_with(tmp_path, tokenizer__json=json.dumps(found | changes))


def test_dropout_of_a_training_run_is_undone(tmp_path):
    text = "One day Ann took the ball of Bob to the park."
    assert Tokenizer.from_directory(with_changes(tmp_path, {"dropout": 1.0})).encode(text) == Tokenizer.from_directory(TINY).encode(text)


def test_other_model_than_bpe_refused(tmp_path):
    d = with_changes(tmp_path, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"})
    with pytest.raises(ouro.CheckpointError, match=r"unsupported tokenizer.*WordLevel"):
        Tokenizer.from_directory(d)


def test_panic_of_the_library_while_loading(tmp_path):
    """Its panics are no Exception; this prefix is longer than the merged pieces it is cut from."""
    with pytest.raises(ouro.CheckpointError, match="not a tokenizer"):
        Tokenizer.from_directory(with_changes(tmp_path, {"continuing_subword_prefix": "####"}))


def test_panic_of_the_library_while_encoding(tmp_path):
    empty = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    tokenizer = Tokenizer.from_directory(with_changes(tmp_path, {}, normalizer=empty))
    with pytest.raises(ouro.CheckpointError, match="fails on this text") as caught:
        tokenizer.encode("One day é")
    assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="surrogates"):
        Tokenizer.from_directory(TINY).encode("a\ud800b")


@settings(max_examples=120, deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.binary(min_size=1, max_size=6), st.booleans())
def test_mutated_tokenizer(tmp_path_factory, at, junk, cut):
    damaged = BLOB[:at] + junk + (b"" if cut else BLOB[at + len(junk) :])
    d = directory_with(tmp_path_factory.mktemp("fuzz"), tokenizer__json=damaged)
    try:
        tokenizer = Tokenizer.from_directory(d)
    except ouro.CheckpointError:
        return
    ids = tokenizer.encode("One day Ann took 7 + 2. <|im_end|>")
    assert len(tokenizer.token_strings(ids)) == len(ids)
    assert all(isinstance(i, int) for i in tokenizer.stop_ids(chat=True))


@pytest.mark.parametrize("ids", [[-1], [859], [1 << 40], [-(1 << 40), 5]])
def test_ids_outside_of_the_vocabulary_are_no_text(ids):
    tokenizer = Tokenizer.from_directory(TINY)
    inside = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    assert tokenizer.decode(ids) == tokenizer.decode(inside)


def test_special_tokens_in_a_stream():
    tokenizer = Tokenizer.from_directory(FIXTURES / "official")
    ids = tokenizer.encode("<|im_start|>user\né<|im_end|>")
    assert ids[0] == tokenizer.im_start_id and ids[-1] == tokenizer.im_end_id
    for skip, text in ((False, "<|im_start|>user\né<|im_end|>"), (True, "user\né")):
        stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_flushed():
    tokenizer = Tokenizer.from_directory(FIXTURES / "official")
    stream = StreamDecoder(tokenizer)
    assert [*map(stream.push, tokenizer.encode("🦜")[:-1])] == [""] * (len(tokenizer.encode("🦜")) - 1)
    assert stream.flush() == "\ufffd"


def test_jinja_file_wins_over_the_settings(tmp_path):
    d = directory_with(tmp_path, tokenizer_config__json=json.dumps({"chat_template": "settings", "eos_token": {"content": "<e>"}}))
    assert ChatTemplate.from_directory(d).render(HELLO) == "settings"
    directory_with(tmp_path, chat_template__jinja="file {{ eos_token }}")
    assert ChatTemplate.from_directory(d).render(HELLO) == "file <e>"


def test_template_by_name(tmp_path):
    several = [{"name": ["tools"], "template": "no"}, 7, {"name": "default", "template": "yes"}]
    d = directory_with(tmp_path, tokenizer_config__json=json.dumps({"chat_template": several}))
    assert ChatTemplate.from_directory(d).render(HELLO) == "yes"


@pytest.mark.parametrize("source", [b"\xff", b"{% for %}", b"{{ " + b"(" * 3000, b"{{ 1 " + b"+ 1 " * 20000 + b"}}"])
def test_damaged_template(tmp_path, source):
    with pytest.raises(ouro.CheckpointError) as caught:
        ChatTemplate.from_directory(directory_with(tmp_path, chat_template__jinja=source))
    assert caught.value.file.endswith("chat_template.jinja")


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ raise_exception('no system') }}", "{{ messages[7].content.x.y }}",
                                    "{{ messages.append(1) }}", "{{ range(10**9) | list }}", "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}",
                                    "{{ [1] * 10**9 }}", "{{ 2 ** (10**8) }}", "{{ '%1000000000d' % 1 }}",
                                    "{{ '%*d' % (10**9, 1) }}"])  # fmt: skip
def test_template_that_fails(source):
    with pytest.raises(ValueError, match="refused these messages"):
        ChatTemplate(source).render(HELLO)


def test_ordinary_arithmetic_of_templates():
    source = "{{ 2 * 3 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ 7 % 2 }} {{ '%s %05d' % ('a', 7) }} {{ 1.5 * 2 }} {{ 2 ** -1 }}"
    assert ChatTemplate(source).render(HELLO) == "6 1024 --- 1 a 00007 3.0 0.5"
