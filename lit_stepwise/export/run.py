"""What a run's own files say of a checkpoint: its configuration, and the metrics of before it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lit_stepwise.errors import ConfigError

CONFIG, METRICS = "config.yaml", "metrics.csv"

Measured = Mapping[str, tuple[float, int]]
"""A metric's value, and the step that it was logged at."""


def folder_of(checkpoint: Path) -> Path | None:
    """``version_N`` of the checkpoint ``version_N/checkpoints/last.ckpt``, or the checkpoint's own folder."""
    parents = list(checkpoint.absolute().parents)[:2]
    return next((each for each in parents if (each / CONFIG).is_file()), None)


def config_in(folder: Path) -> Mapping[str, Any]:
    """What the run was configured with; nothing where it was not run by ``lit-stepwise fit``."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {section: config[section] for section in config}
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no configuration of a run: {str(error).splitlines()[0]}; mend it") from error


def metrics_in(folder: Path, names: tuple[str, ...], step: int) -> Measured:
    """The last value of each metric of play by weights of at most ``step`` optimizer steps, and how many they had.

    Nothing of those that are not in the run's ``metrics.csv``.
    """
    path = folder / METRICS
    found: dict[str, tuple[float, int]] = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                with suppress(ValueError, KeyError, TypeError):  # a line that was being written when the run was killed
                    if (at := int(row["step"])) <= step:
                        found |= {name: (float(row[name]), at) for name in names if row.get(name)}
    return {name: found[name] for name in names if name in found}
