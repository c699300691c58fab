"""Decision problems so small that every attempt, and every group of attempts, can be enumerated.

The policy is a softmax over the actions of each state; its parameters are the logits. All of it in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch

from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan


@dataclass(frozen=True)
class Effect:
    """What an action may lead to."""

    reward: float
    state: str | None = None
    """None: the attempt ends."""
    probability: float = 1.0


@dataclass(frozen=True)
class ToyMDP:
    """States, what each action does in them, and how much the policy likes it. The first state is the task."""

    name: str
    effects: Mapping[str, Mapping[str, Sequence[Effect]]]
    logits: Sequence[float]
    """One for each (state, action), in the order of ``effects``."""
    max_turns: int

    @property
    def choices(self) -> list[tuple[str, str]]:
        """The parameters, as (state, action)."""
        return [(state, action) for state, actions in self.effects.items() for action in actions]

    @property
    def start(self) -> str:
        """The task."""
        return next(iter(self.effects))


@dataclass(frozen=True)
class Attempt:
    """One way to go through it."""

    probability: float
    trajectory: Trajectory
    scores: np.ndarray
    """[turns, parameters] Gradient of the log-probability of each turn's action."""


def stopping() -> ToyMDP:
    """The policy decides after each turn whether to stop; every stop pays differently."""
    return ToyMDP(
        "stopping",
        {
            "first": {"stop": [Effect(0.3)], "go": [Effect(-0.05, "second")]},
            "second": {"stop": [Effect(0.9)], "go": [Effect(-0.15, "third")]},
            "third": {"stop": [Effect(0.4)], "go": [Effect(2.0)]},
        },
        [0.4, -0.3, 0.2, 0.7, 0.6, -0.5],
        max_turns=3,
    )


def guessing() -> ToyMDP:
    """The same with rewards of 0 and 1: each further look makes the answer more likely to be right."""

    def answer(right: float) -> list[Effect]:
        return [Effect(1.0, probability=right), Effect(0.0, probability=1 - right)]

    return ToyMDP(
        "guessing",
        {
            "blind": {"answer": answer(0.125), "look": [Effect(0.0, "half")]},
            "half": {"answer": answer(0.45), "look": [Effect(0.0, "full")]},
            "full": {"answer": answer(0.95), "look": [Effect(0.0)]},
        },
        [0.5, -0.2, 0.3, 0.1, -0.1, 0.4],
        max_turns=3,
    )


def looking_up() -> ToyMDP:
    """Two things to look up, in either order, before the answer; the first may mislead, looking twice wastes a turn.

    Equal knowledge is one state whatever the way and the turn: ``a+b`` is reached by either order.
    """
    a = [Effect(-0.03, "a", 0.7), Effect(-0.04, "misled", 0.3)]
    a_after_b = [Effect(-0.03, "a+b", 0.7), Effect(-0.04, "misled+b", 0.3)]
    return ToyMDP(
        "looking up",
        {
            "task": {"answer": [Effect(0.12)], "a": a, "b": [Effect(-0.02, "b")]},
            "a": {"answer": [Effect(0.35)], "a": [Effect(-0.06, "a")], "b": [Effect(-0.02, "a+b")]},
            "misled": {"answer": [Effect(0.01)], "a": [Effect(-0.05, "a")], "b": [Effect(-0.02, "misled+b")]},
            "b": {"answer": [Effect(0.45)], "a": a_after_b, "b": [Effect(-0.07, "b")]},
            "a+b": {"answer": [Effect(1.0)], "a": [Effect(-0.08, "a+b")], "b": [Effect(-0.09, "a+b")]},
            "misled+b": {"answer": [Effect(0.2)], "a": [Effect(-0.05, "a+b")], "b": [Effect(-0.1, "misled+b")]},
        },
        [0.5, 0.2, 0.3, 0.4, -0.6, 0.1, 0.7, -0.1, 0.2, 0.3, 0.25, -0.5, 0.9, -0.4, -0.7, 0.6, 0.05, -0.2],
        max_turns=3,
    )


def attempts_at(mdp: ToyMDP, key: Callable[[str, int], str] = lambda state, turn: state) -> list[Attempt]:
    """Every attempt with its probability; ``key`` of (state, turn) is what the environment says as ``state_key``."""
    positions = {choice: i for i, choice in enumerate(mdp.choices)}
    policy = {state: dict(zip(actions, _softmax(mdp, state), strict=True)) for state, actions in mdp.effects.items()}

    def score(state: str, action: str) -> np.ndarray:
        gradient = np.zeros(len(positions))
        for other, probability in policy[state].items():
            gradient[positions[state, other]] = float(other == action) - probability
        return gradient

    def continued(state: str, turns: list[Turn], scores: list[np.ndarray], probability: float) -> Iterator[Attempt]:
        for action, effects in mdp.effects[state].items():
            for effect in effects:
                over = effect.state is None or len(turns) + 1 == mdp.max_turns
                left_behind = None if effect.state is None else key(effect.state, len(turns) + 1)
                feedback = Feedback("", {"reward": effect.reward}, done=over, state_key=left_behind)
                so_far = [*turns, Turn([1], [2], [-0.5], [VersionSpan(0, 1)], action, feedback)]
                gradients = [*scores, score(state, action)]
                chance = probability * policy[state][action] * effect.probability
                if over:
                    trajectory = Trajectory(mdp.name, 0, 0, so_far, StopReason.DONE)
                    yield Attempt(chance, trajectory, np.array(gradients))
                else:
                    assert effect.state is not None
                    yield from continued(effect.state, so_far, gradients, chance)

    return list(continued(mdp.start, [], [], 1.0))


def _softmax(mdp: ToyMDP, state: str) -> list[float]:
    logits = [logit for (where, _), logit in zip(mdp.choices, mdp.logits, strict=True) if where == state]
    total = sum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def policy_gradient(mdp: ToyMDP) -> np.ndarray:
    """[parameters] Of the expected reward, by differentiating the recursion over states: no sampling, no scores."""
    logits = torch.tensor(mdp.logits, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)

    def value(state: str | None, turns_left: int) -> torch.Tensor:
        if state is None or turns_left == 0:
            return zero
        mine = [i for i, (where, _) in enumerate(mdp.choices) if where == state]
        expected = [
            sum((e.probability * (e.reward + value(e.state, turns_left - 1)) for e in effects), zero)
            for effects in mdp.effects[state].values()
        ]
        return (logits[mine].softmax(0) * torch.stack(expected)).sum()

    value(mdp.start, mdp.max_turns).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


@dataclass(frozen=True)
class Moments:
    """Of the gradient that an estimator gives, mean over the attempts of a group."""

    mean: np.ndarray
    """[parameters]"""
    variance: float
    """Trace of its covariance."""


def moments(attempts: Sequence[Attempt], advantage: Advantage, n: int) -> Moments:
    """By enumeration of all groups of ``n`` attempts, order left aside."""
    mean, square = np.zeros(attempts[0].scores.shape[1]), 0.0
    for group in combinations_with_replacement(range(len(attempts)), n):
        orders = math.factorial(n) // math.prod(math.factorial(count) for count in Counter(group).values())
        weight = orders * math.prod(attempts[i].probability for i in group)
        gradient = group_gradient([attempts[i] for i in group], advantage)
        mean += weight * gradient
        square += weight * float(gradient @ gradient)
    return Moments(mean, square - float(mean @ mean))


def group_gradient(group: Sequence[Attempt], advantage: Advantage) -> np.ndarray:
    """[parameters] Mean over the group of sum_t A_t grad log pi(a_t | s_t)."""
    values = advantage([attempt.trajectory for attempt in group])
    return sum(np.array(row) @ attempt.scores for row, attempt in zip(values, group, strict=True)) / len(group)
