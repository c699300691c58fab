"""The model that training began with: of its folder everything but the weights goes into an exported one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_stepwise.errors import ConfigError

_TOKENIZER = (
    "*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*",
    "additional_chat_templates/*",
)  # fmt: skip
_MODEL = ("config.json", "generation_config.json")
_ABOUT = ("README.md", "LICENSE*")


@dataclass(frozen=True)
class Base:
    """Its small files. They are taken as they are: to load them and save them would make them ones of this day."""

    name: str
    """As the run calls it: a folder, or a name on the Hub."""
    folder: Path
    """On this machine."""

    @classmethod
    def find(cls, model_path: str) -> Base:
        """Raises ``ConfigError`` when it is no model, or one without a tokenizer."""
        base = cls(model_path, _folder(model_path))
        if not (base.folder / "config.json").is_file():
            raise ConfigError(f"model_path={model_path!r} holds no config.json; give the model that was trained")
        if not base._files(_TOKENIZER):
            raise ConfigError(f"model_path={model_path!r} holds no tokenizer; give the model that was trained")
        return base

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, whose path says nothing elsewhere."""
        return Path(self.name).is_dir()

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    @property
    def dtype(self) -> str:
        """What it is served in; float32 where it does not say, as in transformers."""
        config = self.config
        return config.get("dtype") or config.get("torch_dtype") or "float32"

    @property
    def licence(self) -> Mapping[str, str]:
        """What the head of its model card says of its licence, if anything."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        try:
            head = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        except yaml.YAMLError:
            return {}
        return {key: head[key] for key in ("license", "license_name", "license_link") if key in (head or {})}

    def copy_tokenizer(self, folder: Path) -> None:
        """With the chat template, and the text of the licence."""
        for file in self._files((*_TOKENIZER, "LICENSE*")):
            target = folder / file.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

    def copy_config(self, folder: Path, dtype: str) -> None:
        """With ``dtype`` under the name that it has there, and the defaults for sampling."""
        config = self.config
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (self.folder / "generation_config.json").is_file():
            shutil.copyfile(self.folder / "generation_config.json", folder / "generation_config.json")

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        return sorted({file for pattern in patterns for file in self.folder.glob(pattern) if file.is_file()})


def _folder(model_path: str) -> Path:
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_path, allow_patterns=[*_MODEL, *_TOKENIZER, *_ABOUT]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_path={model_path!r} is no folder here, and no known model has that name; give the model that was "
            "trained"
        ) from error
