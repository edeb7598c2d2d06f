"""Text to ids and back, and pieces of text that are whole characters.

The tokenizer is the byte-level BPE of the released models, run by the `tokenizers` library. Which ids stop a generation
comes from here, not from config.json, whose ids are those of another convention.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ouro.errors import CheckpointError
from ouro.files import read_text

MAX_TOKENIZER_BYTES = 64 << 20
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, reversed."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


@contextmanager
def _refusing(what: str, file: Path | None) -> Iterator[None]:
    """Turns what the library raises over a damaged file into a CheckpointError.

    That is a bare Exception, or a panic of its Rust code, which is no Exception at all and has no importable name.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {str(error)[:200]}", file=file) from None


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes
    ----------
    vocab_size : int
        Ids the tokenizer knows; the model's table may be padded beyond it.
    endoftext_id, im_start_id, im_end_id : int or None
        The special tokens that generation and chat need, when the vocabulary has them.
    """

    def __init__(self, backend: Any, file: Path | None = None) -> None:
        self._backend, self._file = backend, file
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.endoftext_id: int | None = backend.token_to_id(ENDOFTEXT)
        self.im_start_id: int | None = backend.token_to_id(IM_START)
        self.im_end_id: int | None = backend.token_to_id(IM_END)
        added = backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}
        self._special = {i for i, token in added.items() if token.special}

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint directory; None when it has no `tokenizer.json`.

        Raises
        ------
        CheckpointError
            When the file is damaged or not byte-level BPE.
        """
        path = directory / "tokenizer.json"
        if not os.path.lexists(path):
            return None
        text = read_text(path, MAX_TOKENIZER_BYTES)
        from tokenizers import Tokenizer as Backend

        with _refusing("not a tokenizer", path):
            backend = Backend.from_str(text)
        if type(backend.model).__name__ != "BPE":
            raise CheckpointError("unsupported tokenizer", file=path, found=type(backend.model).__name__, expected="BPE")
        if type(backend.decoder).__name__ != "ByteLevel":
            raise CheckpointError("unsupported tokenizer", file=path, found=type(backend.decoder).__name__,
                                  expected="a byte-level decoder")  # fmt: skip
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        strange = set("".join(t for t in backend.get_vocab() if t not in added)) - _BYTE_OF.keys()
        if strange:
            raise CheckpointError("vocabulary is not byte-level", file=path, found=sorted(strange)[:5],
                                  expected="the 256 characters that stand for bytes")  # fmt: skip
        backend.no_truncation()  # settings of somebody's training run, which would cut, fill or shake texts silently
        backend.no_padding()
        backend.model.dropout = None
        return cls(backend, path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added in front; special tokens written in the text are taken as such.

        The released vocabulary has no token for six control characters (4, 6, 19, 20, 22, 29): it drops them.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not Unicode that can be encoded: {error}") from None
        with _refusing("tokenizer fails on this text", self._file):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def bytes_of(self, token: int, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes one id stands for; empty for ids outside of the vocabulary."""
        if token in self._added:
            return b"" if skip_special_tokens and token in self._special else self._added[token].encode()
        piece = self._backend.id_to_token(token) if 0 <= token < 1 << 32 else None
        return b"" if piece is None else bytes(_BYTE_OF[c] for c in piece)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become the replacement character."""
        data = b"".join(self.bytes_of(int(i), skip_special_tokens=skip_special_tokens) for i in ids)
        return data.decode("utf-8", errors="replace")

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Each id as text of its own; a part of a character shows as the replacement character."""
        return [self.bytes_of(int(i)).decode("utf-8", errors="replace") for i in ids]

    def stop_ids(self, *, chat: bool) -> list[int]:
        """Where generation stops: `<|im_end|>` and `<|endoftext|>` in a chat, `<|endoftext|>` in plain completion."""
        wanted = [self.im_end_id, self.endoftext_id] if chat else [self.endoftext_id]
        return [i for i in wanted if i is not None]


class StreamDecoder:
    """Turns ids that come one by one into pieces of text that are whole characters.

    The pieces joined are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that is complete with this id; empty while a character waits for more bytes."""
        return self._utf8.decode(self._tokenizer.bytes_of(token, skip_special_tokens=self._skip))

    def flush(self) -> str:
        """What is left at the end: a replacement character when a character stayed incomplete."""
        return self._utf8.decode(b"", final=True)


def check_ids(ids: Sequence[int], d_vocab: int) -> None:
    """Refuse ids outside of the model's table."""
    for at, i in enumerate(ids):
        if not 0 <= i < d_vocab:
            raise ValueError(f"token id {i} at position {at} is outside of the vocabulary of {d_vocab}")
