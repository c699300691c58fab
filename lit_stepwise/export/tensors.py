"""The weights of a policy as Hugging Face publishes them, one after the other, and the files that they go into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_stepwise.checkpoints.policy import Checkpoint
from lit_stepwise.errors import ConfigError
from lit_stepwise.export.base import Base
from lit_stepwise.training.lora import Lora, adapter_of, weights_of


def model_of(checkpoint: Checkpoint, base: Base, lora: Lora | None) -> Any:
    """The language model that was trained, made of the very tensors of the checkpoint.

    Raises ``ConfigError`` when they are not the weights of ``base``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds of import that other commands need not pay

    try:
        config = AutoConfig.from_pretrained(base.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model_path={base.name!r} cannot be loaded: {reason}") from error
    if lora is not None:
        lora.check()
        lora.inject(model)
    _check_architecture(model, checkpoint, base)
    model.load_state_dict(checkpoint.weights, assign=True)
    model.tie_weights()
    return model


def _check_architecture(model: Any, checkpoint: Checkpoint, base: Base) -> None:
    theirs = {name: tuple(value.shape) for name, value in checkpoint.weights.items()}
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        raise ConfigError(
            f"the checkpoint {checkpoint.path} holds another architecture than model_path={base.name!r}: "
            f"{len(differing)} tensors differ, the first {name} with shape {theirs.get(name)} there and "
            f"{ours.get(name)} here; give the model that was trained"
        )


def adapter_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those of ``adapter_model.safetensors``, in ``dtype`` on the CPU. Every rank asks for all of them together."""
    return ((name, value.to("cpu", dtype)) for name, value in adapter_of(model).weights)


def model_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those of ``model.safetensors``, tied ones once, in ``dtype`` on the CPU. Every rank asks for all together.

    An adapter is merged into them before they are rounded.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    tensors = _in_names_of_the_model(model, dtype)
    if not get_model_conversion_mapping(model, add_legacy=False):
        return tensors
    # experts are one tensor in transformers and many in files; what belongs together is not known beforehand
    return iter(revert_weight_conversion(model, dict(tensors)).items())


def _in_names_of_the_model(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights_of(model, merged=True):
        yield name, value.to("cpu", dtype)
    saved = model.state_dict()
    for name, value in model.named_buffers():
        if name in saved:  # in the precision that it has: it was not trained
            yield name, value.to("cpu")


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str, max_shard_bytes: float) -> None:
    """Write ``stem.safetensors`` or, where that would be too large, several such files and their index.

    Only the tensors of one file are held in memory.
    """
    from safetensors.torch import save_file

    files: list[Path] = []
    names: dict[str, int] = {}
    num_bytes = 0
    for shard in _shards(tensors, max_shard_bytes):
        files.append(folder / f"{stem}-{len(files)}.safetensors")
        save_file(shard, files[-1], metadata={"format": "pt"})
        names |= dict.fromkeys(shard, len(files))
        num_bytes += sum(value.nbytes for value in shard.values())
        del shard  # before the next one is put together
    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    called = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for file, name in zip(files, called, strict=True):
        file.rename(folder / name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": {name: called[i - 1] for name, i in names.items()}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: float) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = value.contiguous()
        size += value.nbytes
    yield shard
