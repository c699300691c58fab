"""Step samples as multi-turn text-to-SQL makes them, with random tokens: what packing and planning are measured on.

    samples = workload("A", "append", groups=32, seed=5)

Every task of a workload begins with the same system prompt and goes on with a schema and a question of its own; five
trajectories of several turns are played at each. A response is a thought and what is visible of it (the action), and
the environment answers with an observation:

    append      system schema think visible observation think visible observation think visible
    strip       system schema       visible observation       visible observation think visible      (the last turn)

A template that strips leaves older thoughts out of a prompt, so a turn is no continuation of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_stepwise.types import StepSample

Name = Literal["A", "B", "C", "D", "E"]
Template = Literal["append", "strip"]
Range = tuple[int, int]
"""Of a uniform distribution, both ends included."""

SAMPLES_PER_TASK = 5
SYSTEM_TOKENS = 400
VOCABULARY = 151_936
"""Of Qwen3."""


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens, and the number of turns."""

    schema: Range = (2000, 6000)
    think: Range = (60, 450)
    visible: Range = (40, 150)
    observation: Range = (50, 800)
    turns: Range = (1, 6)


SHAPES: dict[Name, Shape] = {
    "A": Shape(),
    "B": Shape(turns=(6, 6)),
    "C": Shape(think=(300, 2800)),
    "D": Shape(schema=(6000, 12000), think=(300, 2800), observation=(500, 3000), turns=(6, 6)),
    "E": Shape(turns=(1, 1)),
}
"""A: short thoughts; B: all six turns; C: long thoughts; D: prompts of up to 29 thousand tokens; E: a single turn."""


def workload(
    name: Name, template: Template, groups: int, seed: int, shrink: int = 1, vocabulary: int = VOCABULARY
) -> list[StepSample]:
    """The step samples of ``groups`` tasks, group by group, trajectory by trajectory, turn by turn.

    Args:
        name: which of ``SHAPES``.
        template: whether a prompt keeps the thoughts of earlier turns.
        groups: number of tasks.
        seed: equal arguments give equal samples.
        shrink: every length is divided by it.
        vocabulary: token ids are below.
    """
    return list(_Play(SHAPES[name], template, seed, shrink, vocabulary).samples(groups))


class _Play:
    def __init__(self, shape: Shape, template: Template, seed: int, shrink: int, vocabulary: int) -> None:
        self.shape = shape
        self.template = template
        self.shrink = shrink
        self.vocabulary = vocabulary
        self.random = np.random.default_rng(seed)

    def samples(self, groups: int) -> Iterator[StepSample]:
        system = self._tokens((SYSTEM_TOKENS, SYSTEM_TOKENS))
        for group in range(groups):
            prompt = system + self._tokens(self.shape.schema)
            for sample in range(SAMPLES_PER_TASK):
                yield from self._trajectory(prompt, group, sample)

    def _trajectory(self, prompt: list[int], group: int, sample: int) -> Iterator[StepSample]:
        reward = float(self.random.integers(2))
        advantage = float(self.random.normal())
        for turn in range(self._uniform(self.shape.turns)):
            think, visible = self._tokens(self.shape.think), self._tokens(self.shape.visible)
            yield self._sample(prompt, think + visible, reward, advantage, (group, sample, turn))
            kept = think if self.template == "append" else []
            prompt = prompt + kept + visible + self._tokens(self.shape.observation)

    def _sample(
        self, prompt: list[int], response: list[int], reward: float, advantage: float, place: tuple[int, int, int]
    ) -> StepSample:
        size = len(response)
        return StepSample(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=[True] * size,
            rollout_logprobs=(-self.random.exponential(0.4, size)).tolist(),
            advantages=[advantage] * size,
            reward=reward,
            group=place[0],
            sample=place[1],
            turn=place[2],
            policy_version=0,
        )

    def _tokens(self, lengths: Range) -> list[int]:
        size = max(1, self._uniform(lengths) // self.shrink)
        tokens: list[int] = self.random.integers(self.vocabulary, size=size).tolist()
        return tokens

    def _uniform(self, ends: Range) -> int:
        return int(self.random.integers(ends[0], ends[1], endpoint=True))
