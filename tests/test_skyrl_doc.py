"""The page on SkyRL's recipes says of our settings what is so."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_stepwise import cli

ROOT = Path(__file__).parent.parent
RECIPES = ("qwen3", "qwen2_5_coder")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/skyrl.md").read_text().splitlines()
    if line.startswith("| ") and line.count(" | ") == 3 and not line.startswith("| SkyRL")
]
OURS = r"`((?:model|data|rollout|trainer)\.[\w.]+)`"
NAMED = [(key[1], row[3].rstrip(" |")) for row in ROWS if (key := re.match(OURS, row[2]))]


@cache
def settings(recipe: str) -> dict[str, Any]:
    """All that ``fit`` makes of a page, defaults included."""
    words = ["fit", "--config", str(ROOT / f"configs/{recipe}.yaml"), "--print_config"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse
        patch.setattr("sys.argv", ["lit-stepwise", *words])
        with pytest.raises(SystemExit):
            cli.main()
    found: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return found


def setting(recipe: str, key: str) -> Any:
    """Its value; of a class its last name."""
    found: Any = settings(recipe)
    for name in key.split("."):
        found = found[0] if isinstance(found, list) else found
        found = found["init_args"] if name not in found and "init_args" in found else found
        found = found[name]
    return found["class_path"].rpartition(".")[2] if isinstance(found, dict) and "class_path" in found else found


def test_every_key_of_the_scripts_has_a_row() -> None:
    theirs = [row[0] for row in ROWS if re.fullmatch(r"`(trainer|generator|environment|data)\.[\w.]+`", row[0])]
    assert len(theirs) == len(set(theirs)) == 52 + 6  # and of defaults


@pytest.mark.parametrize(("key", "values"), NAMED, ids=[f"{key}-{values}" for key, values in NAMED])
def test_a_setting_is_there_and_has_in_each_recipe_the_value_that_the_page_says(key: str, values: str) -> None:
    said = values.split(" / ") if " / " in values else [values] * 2
    for recipe, value in zip(RECIPES, said, strict=True):
        found = setting(recipe, key)
        assert value == "" or found == yaml.safe_load(value), (recipe, key)


def test_most_of_the_page_is_held_against_the_recipes() -> None:
    assert sum(values != "" for _, values in NAMED) >= 45
