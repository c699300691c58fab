"""What the data refuses to be."""

from __future__ import annotations

from typing import Any

import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.testing import CountdownTasks
from lit_stepwise.types import Deal, Limits


def deal(**changes: Any) -> Deal:
    return Deal(**{"iteration": 7, "tasks": CountdownTasks().read("3"), "prompt_tokens": [11, 12, 13],
                   "weights": [0.0, 0.5, 1.0], "max_turns": 2, **changes})  # fmt: skip


def test_a_deal_that_can_be_played_passes() -> None:
    deal().check(Limits(max_turns=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0, 1.0]}, "left 2 weights for 3 tasks; give one each"),
        ({"weights": [1.0, 1.5, 1.0]}, r"left the weight 1\.5 in iteration 7; give each task 0 to 1"),
        ({"weights": [1.0, float("nan"), 1.0]}, "left the weight nan in iteration 7"),
        ({"weights": [0.0] * 3}, "left no weight above 0 in iteration 7; .* one of them more than 0"),
        ({"max_turns": 0}, r"set max_turns=0 in iteration 7; use 1 to rollout\.limits\.max_turns=4"),
        ({"max_turns": 5}, r"set max_turns=5 in iteration 7; use 1 to rollout\.limits\.max_turns=4, or raise that"),
    ],
)
def test_a_deal_that_cannot_be_played_names_the_hook_the_value_and_the_way_out(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        deal(**changes).check(Limits(max_turns=4))
