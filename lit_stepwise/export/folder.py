"""A Hugging Face folder that transformers, vLLM and ``model.model_path`` load, or one of PEFT with an adapter alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from lit_stepwise.errors import ConfigError
from lit_stepwise.export.base import Base
from lit_stepwise.export.card import Provenance, model_card
from lit_stepwise.export.tensors import adapter_tensors, model_tensors, write_tensors
from lit_stepwise.training.lora import adapter_of

AdapterFormat = Literal["merged", "separate"]
Dtype = Literal["float32", "bfloat16", "float16"]
MAX_SHARD_BYTES = 5_000_000_000
"""Weights beyond these go into several files, which are read and fetched side by side."""


@dataclass(frozen=True)
class Export:
    """What is to be written, and where."""

    output: Path
    base: Base
    separate: bool
    """The adapter alone, for PEFT; else the weights, with the adapter in them where there is one."""
    dtype: str
    """Of what is written."""

    @classmethod
    def plan(
        cls, output: str, model_path: str, has_adapter: bool, adapter: AdapterFormat, dtype: Dtype | None
    ) -> Export:
        """Raises ``ConfigError`` for what can never work, before a weight is touched."""
        base = Base.find(model_path)
        if adapter == "separate" and not has_adapter:
            raise ConfigError("adapter=separate, but all weights were trained and there is no adapter; use merged")
        export = cls(Path(os.path.abspath(output)), base, adapter == "separate", dtype or base.dtype)
        export.check_output()
        return export

    def check_output(self) -> None:
        """Raises ``ConfigError`` where something would be written over."""
        if self.output.exists() and not (self.output.is_dir() and not any(self.output.iterdir())):
            raise ConfigError(f"{self.output} exists and is not empty; name another folder, or remove it")

    def tensors(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """What is to be written of a language model. Where it is sharded, every rank asks for all of it together."""
        dtype = getattr(torch, self.dtype)
        return adapter_tensors(model, dtype) if self.separate else model_tensors(model, dtype)

    def write(self, tensors: Iterable[tuple[str, Tensor]], model: Any, provenance: Provenance) -> None:
        """Write ``tensors`` of ``model`` and all that belongs to them. Raises ``ConfigError`` and leaves nothing."""
        adapter = self._adapter_config(model) if self.separate else {}
        with _appearing(self.output) as folder:
            self.base.copy_tokenizer(folder)
            card = model_card(self.output.name, self.base, adapter.get("r", 0), self.dtype, provenance)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if self.separate:
                (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
                write_tensors(tensors, folder, "adapter_model", max_shard_bytes=float("inf"))
            else:
                self.base.copy_config(folder, self.dtype)
                write_tensors(tensors, folder, "model", MAX_SHARD_BYTES)
            for file in folder.glob("*.safetensors"):
                shutil.copymode(folder / "README.md", file)  # safetensors makes files for their owner alone

    def _adapter_config(self, model: Any) -> dict[str, Any]:
        # a folder is to be found from any working directory
        base = os.path.abspath(self.base.name) if self.base.is_local else self.base.name
        return {**adapter_of(model).config, "base_model_name_or_path": base}


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that gets its name in the end; of one that fails nothing is left."""
    folder = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.rename(output)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise ConfigError(f"{output} cannot be written: {error}; name a folder with room for it") from error
        raise
