"""What a callback's hooks may ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.wiring import HOOKS, check_hooks

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


def with_hook(name: str, hook: Any) -> pl.Callback:
    return type("Mine", (pl.Callback,), {name: hook})()


@pytest.mark.parametrize(
    ("name", "hook", "asked"),
    [
        ("on_rollout_end", lambda self, rollouts: None, "rollouts"),
        ("on_selection", lambda self, trainer, pl_module: None, "trainer"),
        ("on_turn_end", lambda self, *given: None, r"\*given"),
        ("on_deal", lambda self, deal, *, iteration: None, "iteration"),
    ],
)
def test_a_hook_that_asks_for_what_it_is_not_given_is_refused_with_what_it_may_name(
    name: str, hook: Any, asked: str
) -> None:
    with pytest.raises(ConfigError, match=rf"Mine\.{name} asks for {asked}; it may name {HOOKS[name][0]}"):
        check_hooks([pl.Callback(), with_hook(name, hook)])


@pytest.mark.parametrize(
    "hook",
    [
        lambda self, selection: None,
        lambda self, *, trajectories, advantages=None: None,
        lambda self, mine=3: None,
        lambda self, **all_of_it: None,
        lambda self: None,
    ],
)
def test_what_is_not_needed_may_be_left_out(hook: Any) -> None:
    check_hooks([with_hook("on_selection", hook)])


def test_the_page_names_the_same_hooks() -> None:
    found = re.findall(r"^\| \*\*`(on_\w+)\(([^)]*)\)`\*\*", PAGE.read_text(), re.MULTILINE)
    assert {name: tuple(given.split(", ")) for name, given in found} == HOOKS
