"""Configurations of models, from which they can be made without their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_stepwise.errors import ConfigError

_QWEN3: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "Qwen/Qwen3-4B": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "Qwen/Qwen2.5-Coder-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}  # fmt: skip
"""What the config.json of the recipes' models says, for machines that have not downloaded them."""


@contextmanager
def folder_of_config(model_path: str, config_file: str | None, setting: str) -> Iterator[tuple[str, str]]:
    """A folder with the configuration of a model and nothing else, and where that is from. Downloads nothing.

    Args:
        model_path: folder or name of a Hugging Face model.
        config_file: its ``config.json``, if somebody gave one.
        setting: that ``model_path`` is the value of, for messages.

    Raises ``ConfigError`` where the configuration is not to be had.
    """
    config, source = _config(model_path, config_file, setting)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield folder, source


def _config(model_path: str, config_file: str | None, setting: str) -> tuple[Any, str]:
    from transformers import AutoConfig  # seconds of import that a wrong option need not cost

    if config_file is not None:
        path = Path(config_file)
        if not path.is_file():
            raise ConfigError(f"--model_config {config_file} is no file; give the config.json of {model_path}")
        return AutoConfig.from_pretrained(path), f"--model_config {config_file}"
    try:
        return AutoConfig.from_pretrained(model_path, local_files_only=True), "its config.json"
    except (OSError, ValueError) as error:
        if model_path not in KNOWN:
            raise ConfigError(
                f"{setting}={model_path!r} has no configuration on this machine, and is none of those that plan knows "
                f"({', '.join(KNOWN)}); give its config.json: --model_config FILE.json"
            ) from error
    return AutoConfig.for_model(**KNOWN[model_path]), "the table of known models, since it is not on this machine"


def local_tokenizer(model_path: str) -> Any:
    """That of a model, if it is on this machine; else None."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError):
        return None
