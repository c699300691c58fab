"""What a run was configured with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_stepwise.errors import StoreError

SHOWN = (
    "seed_everything", "model.model_path", "model.loss", "model.optimizer.init_args.lr", "model.lora.rank",
    "rollout.engine", "rollout.environment", "rollout.advantage", "rollout.samples_per_task", "rollout.staleness",
    "data.tasks_per_iteration", "data.mini_batches", "data.passes", "data.train_files",
)  # fmt: skip
"""In the overview of a run."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Every setting by its dotted name, a class by its short one; nothing where the run has no ``config.yaml``."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    import yaml

    try:
        config = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is no configuration of a run: {str(error).splitlines()[0]}; mend it") from error
    return dict(_flat("", config))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        if "class_path" in value:
            yield name, str(value["class_path"]).rpartition(".")[2]
        for key, each in value.items():
            if key != "class_path":
                yield from _flat(f"{name}.{key}" if name else str(key), each)
    else:
        yield name, value
