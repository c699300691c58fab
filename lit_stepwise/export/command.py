"""The command ``lit-stepwise export``: a Hugging Face folder of a checkpoint, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_stepwise.checkpoints.policy import Checkpoint, read_checkpoint
from lit_stepwise.errors import ConfigError
from lit_stepwise.export.card import METRICS, Provenance
from lit_stepwise.export.folder import AdapterFormat, Dtype, Export
from lit_stepwise.export.run import config_in, folder_of, metrics_in
from lit_stepwise.export.tensors import model_of
from lit_stepwise.training import Lora


def export(
    ckpt_path: str,
    output: str,
    adapter: AdapterFormat = "merged",
    dtype: Dtype | None = None,
    model_path: str | None = None,
) -> None:
    """Make a Hugging Face folder of a checkpoint: weights, configuration, tokenizer, model card.

    transformers and vLLM load it, and so does ``model.model_path``. It needs no GPU, and memory for one copy of the
    weights at most. Give it checkpoints that you trust: a folder of shards can run code when it is read.

    Args:
        ckpt_path: file that ``fit`` wrote, or folder of shards, e.g. runs/tiny/version_0/checkpoints/last.ckpt.
        output: folder to make; it must not exist, unless empty.
        adapter: of a run with model.lora. merged: weights with the adapter in them. separate: the adapter alone, as
            PEFT saves one.
        dtype: of the weights; by default that of the base model, as its config.json says. They were trained in float32.
        model_path: the base model; by default what the run's config.yaml says, in the checkpoint's folder or above it.
    """
    path = Path(ckpt_path)
    checkpoint = read_checkpoint(path)
    folder = folder_of(path)
    config = config_in(folder) if folder is not None else {}
    model_path = model_path or _model_path(config, path)
    lora = _lora(config, checkpoint)
    planned = Export.plan(output, model_path, lora is not None, adapter, dtype)
    model = model_of(checkpoint, planned.base, lora)
    metrics = metrics_in(folder, tuple(METRICS), checkpoint.step) if folder is not None else {}
    provenance = Provenance(checkpoint.step, metrics, config)
    planned.write(planned.tensors(model), model, provenance)
    print(f"wrote {output}: {model_path} after {provenance.steps}, in {planned.dtype}")


def _model_path(config: Mapping[str, Any], path: Path) -> str:
    found = config.get("model", {}).get("model_path")
    if found is None:
        raise ConfigError(
            f"no config.yaml with a model.model_path is beside {path} or in the folder above, so the base model is not "
            "known; give --model_path"
        )
    return str(found)


def _lora(config: Mapping[str, Any], checkpoint: Checkpoint) -> Lora | None:
    """The settings of its adapter, some of which its weights do not show."""
    if not any(".lora_A." in name for name in checkpoint.weights):
        return None
    settings = config.get("model", {}).get("lora")
    if settings is None:
        raise ConfigError(
            f"the checkpoint {checkpoint.path} holds an adapter, and no config.yaml with its model.lora is beside it "
            "or in the folder above; put the run's there"
        )
    return Lora(**settings)
