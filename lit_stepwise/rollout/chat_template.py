"""What a tokenizer's chat template writes, as text and as token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from threading import Lock
from typing import Any

from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Message

_ANSWER, _OBSERVATION = "ANSWER-0451", "OBSERVATION-0451"
_ENCODING = Lock()
"""Whether special tokens are text is a switch of the tokenizer, which threads would turn while another one encodes."""
_WINDOW = 3
"""Tokens shown on each side of a difference."""


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The conversation up to where the assistant speaks."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return text


@lru_cache(maxsize=256)  # attempts at one task write the same text turn by turn
def tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of what a template writes: special tokens that it spells are special."""
    return _encode(tokenizer, text, plain=False)


def plain_tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of what somebody says: special tokens that it spells stay text."""
    return _encode(tokenizer, text, plain=True)


def _encode(tokenizer: Any, text: str, plain: bool) -> tuple[int, ...]:
    with _ENCODING:
        return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"])


def frame(tokenizer: Any, messages: Sequence[Message], num_exchanges: int) -> list[str]:
    """The text around so many exchanges, an answer and an observation each, that follow ``messages``.

    ::

        <before the answer> ANSWER <between> OBSERVATION <between> ANSWER <between> OBSERVATION <after>
    """
    exchange = [Message("assistant", _ANSWER), Message("user", _OBSERVATION)]
    pieces = re.split(f"{_ANSWER}|{_OBSERVATION}", render(tokenizer, [*messages, *exchange * num_exchanges]))
    if len(pieces) != 2 * num_exchanges + 1:
        raise ConfigError(
            f"model.model_path: the chat template of {tokenizer.name_or_path} does not show an assistant's and a "
            "user's message exactly once each, so that turns cannot be appended; use another template"
        )
    return pieces


def opening(tokenizer: Any, messages: Sequence[Message]) -> str:
    """What the generation prompt adds to the header of an old answer: a thought it opens, or an empty one."""
    asked, shown = render(tokenizer, messages), frame(tokenizer, messages, 1)[0]
    return asked[_num_equal(asked, shown) :]


def first_difference(tokenizer: Any, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Where two renderings of a conversation part, with the tokens around it; empty where they are equal."""
    if [*ours] == [*theirs]:
        return ""
    at = _num_equal(ours, theirs)
    sides = (_shown(tokenizer, ids, at) for ids in (ours, theirs))
    return "first difference at token {}: {} here, {} in the template".format(at, *sides)


def _num_equal(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """How far two sequences are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))


def _shown(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    window = ids[max(at - _WINDOW, 0) : at + _WINDOW + 1]
    return "[" + ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in window) + "]"
