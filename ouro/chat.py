"""Chat templates: a list of messages to the prompt text a checkpoint was trained on (ChatML).

Templates come with a checkpoint and are programs, so they run in jinja2's sandbox, where `*`, `**` and `%` may not make
values of any size. The sandbox does not bound time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

from ouro.errors import CheckpointError
from ouro.files import read_json, read_text

Message = Mapping[str, Any]
MAX_PRODUCT = 1 << 20  # length of a repeated sequence; bits of a number


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, file: Path | None = None, variables: Mapping[str, Any] | None = None) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> NoReturn:
            raise TemplateError(message)

        def tojson(value: Any, indent: int | None = None) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent)

        class Environment(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset(("*", "**", "%"))

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                _check_size(operator, left, right)
                return super().call_binop(context, operator, left, right)

        environment = Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        self._file = file
        self._variables = dict(variables or {})
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, ValueError, SyntaxError, MemoryError) as error:
            # beyond its own errors, what Python's compiler says to a template nested too deeply
            raise CheckpointError(f"chat template does not compile: {str(error)[:200]}", file=file) from None

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """The template of a checkpoint directory: `chat_template.jinja` before `tokenizer_config.json`; or None."""
        path, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
        found = read_json(settings) if os.path.lexists(settings) else {}
        variables = _special_tokens(found)
        if os.path.lexists(path):
            return cls(read_text(path), path, variables)
        source = found.get("chat_template")
        if isinstance(source, list):  # several templates by name
            source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError("chat_template is not a string", file=settings, found=type(source).__name__)
        return cls(source, settings, variables)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, enable_thinking: bool | None = None
    ) -> str:
        """The prompt text of a conversation.

        Parameters
        ----------
        messages
            Mappings with `role` (such as system, user, assistant) and `content` (text).
        add_generation_prompt
            Open the assistant's turn at the end.
        enable_thinking
            Passed to the template unless None; the Thinking models then open `<think>`.
        """
        if not messages:
            raise ValueError("a chat needs at least one message")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"message {i} is {message!r}, expected a mapping with 'role' and 'content' text")
        extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return self._template.render(messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt,
                                         **self._variables, **extra)  # fmt: skip
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(f"the chat template refused these messages: {str(error)[:300] or type(error).__name__}") from None


def _check_size(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be a very large text, list or number."""
    if operator == "%":
        wide = isinstance(left, str) and re.search(r"\d{5}|\*", left)  # a width such as %100000000d, or one from a value
        size = MAX_PRODUCT + 1 if wide else 0
    elif isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
    else:
        lengths = [len(x) if isinstance(x, Sized) else x if isinstance(x, int) else 0 for x in (left, right)]
        size = lengths[0] * lengths[1]
    if size > MAX_PRODUCT:
        raise ValueError(f"a result of '{operator}' is too large")


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens a template may name, which tokenizer_config.json gives as text or as an object with `content`."""
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found
