"""Every page in configs/ can be read by the command it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs/overlays").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_parses_and_prints_what_it_says(path: Path, run_in: Any) -> None:
    done = run_in(ROOT, "fit", None, "--config", str(path), "--print_config")
    assert is_part(yaml.safe_load(path.read_text()), yaml.safe_load(done.stdout))


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_changes_what_it_says_in_a_recipe_and_its_head_has_the_command(path: Path, run_in: Any) -> None:
    assert f"lit-stepwise fit --config configs/qwen3.yaml --config configs/overlays/{path.name}" in path.read_text()
    words = ["--config", "configs/qwen3.yaml", "--config", str(path), "--print_config"]
    done = run_in(ROOT, "fit", None, *words)
    printed = yaml.safe_load(done.stdout)
    assert is_part(yaml.safe_load(path.read_text()), printed)
    assert printed["rollout"]["environment"]["init_args"]["style"] == "skyrl"  # which is the recipe's


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_head_of_a_config_says_the_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"lit-stepwise fit --config configs/{path.name}" in line for line in head)


def is_part(given: object, printed: object) -> bool:
    """Whether everything ``given`` stands in ``printed``, which has the defaults besides."""
    if isinstance(given, dict):
        return isinstance(printed, dict) and all(is_part(given[key], printed.get(key)) for key in given)
    if isinstance(given, list):
        return isinstance(printed, list) and all(is_part(a, b) for a, b in zip(given, printed, strict=True))
    return given == printed
