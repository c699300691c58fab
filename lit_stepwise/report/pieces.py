"""The text of single tokens, from the tokenizer's file alone: no torch, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "tokenizer.json"


class Pieces:
    """A table of distinct texts, and of every token which of them is its own."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.num_bytes = 0
        """Of the texts as JSON."""
        self._index: dict[str, int] = {}

    def add(self, text: str) -> int:
        """The text's index in the table."""
        found = self._index.setdefault(text, len(self.texts))
        if found == len(self.texts):
            self.texts.append(text)
            self.num_bytes += len(json.dumps(text)) + 1
        return found

    def of(self, tokenizer: Any, token_ids: Sequence[int]) -> list[int]:
        """[R] Index of each token's text. Of a character that several tokens make, the last has the text."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return [self.add(stream.step(tokenizer, token) or "") for token in token_ids]


def load_tokenizer(model_path: str | None) -> tuple[Any, str]:
    """The tokenizer of a run's model, or None and why there is none."""
    if not model_path:
        return None, "the run has no config.yaml that names its model"
    there = Path(model_path) / FILE
    file = there if there.is_file() else _cached(model_path)
    if file is None:
        return None, f"{model_path} has no {FILE} here; make the report where the run's model is"
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)), ""
    except Exception as error:  # the library raises bare ones
        return None, f"{file} cannot be read ({str(error).splitlines()[0]})"


def _cached(model_path: str) -> Path | None:
    """Where an earlier download of the model left the file; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_path, FILE)
    except HFValidationError:  # a path that does not exist
        return None
    return Path(found) if isinstance(found, str) else None
