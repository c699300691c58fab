"""Filters between play and credit: which groups and trajectories are trained at all, and what length costs.

::

    play --kept_groups--> with_penalties --Advantage--> selection --> step samples
      ^       |
      +-- missing_groups: as many further tasks, until enough groups are kept

No answer depends on the order of the trajectories. Failed ones (a fault of ours) are never trained and never counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from lit_stepwise.algo.grouping import EPSILON, groups_of
from lit_stepwise.errors import ConfigError, StepwiseError
from lit_stepwise.types import StopReason, Trajectory, Turn

OVERLONG = "overlong"
"""The reward component that ``Filters.with_penalties`` adds."""

LeftOut = Literal["", "failed", "uniform", "flat", "masked"]
"""Not at all; for a fault of ours; with its group by dynamic sampling; with its group by ``drop_flat_groups``; cut."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is trained and, each thing counted once, what the filters left out."""

    left_out: Sequence[LeftOut]
    """Of every trajectory, in the order given: why it makes no training rows; empty: it makes some."""
    rounds: int
    """Rounds of play it took."""
    groups_in: int
    """Groups played, in all rounds."""
    groups_uniform: int
    """Groups that dynamic sampling left out."""
    groups_flat: int
    """Groups whose advantages are all 0, of those that it kept; counted whether they are trained or not."""
    groups_kept: int
    """Groups of which at least one trajectory is trained."""
    trajectories_masked: int
    """Trajectories of the other groups that are left out of the loss for having been cut."""
    tokens_dropped: int
    """Sampled tokens of all trajectories that are not trained, but for those that failed."""

    @property
    def trained(self) -> list[bool]:
        """Of every trajectory whether it makes training rows."""
        return [not reason for reason in self.left_out]

    @property
    def metrics(self) -> dict[str, float]:
        """By name, always the same names."""
        return {f"rollout/{each.name}": float(getattr(self, each.name)) for each in fields(self)[1:]}


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Filters:
    """What is left out between play and training, each by a unit of its own; the default leaves everything as it is.

    ::

        dynamic sampling    group         0 < solved attempts < attempts         arXiv:2503.14476 (DAPO), eq. 11
        drop_flat_groups    group         an advantage that is not 0
        mask_overlong       trajectory    not cut by a token budget              DAPO, section 3.4
        mask_max_turns      trajectory    not cut by the number of turns         together.ai/blog/deepswe
        overlong penalty    turn          -penalty max(L - (M - C), 0) / C       DAPO, eq. 13

        L = response tokens of the turn     M = rollout.limits.max_new_tokens     C = overlong_margin_tokens

    What is left out makes no training rows, so no reduction counts it: ``token`` is a mean over the tokens that are
    left, ``step``, ``trajectory``, ``prompt`` and ``constant`` divide by the units that are left. A masked trajectory
    still acts through the baseline: what it earned, its own penalty included, is what the others are compared with.
    """

    dynamic_sampling: Literal["success", "reward"] | None = None
    """Keep a group only if its attempts differ, in whether they solved the task or in the reward summed over their
    turns. Decided by the group, never by a turn. None keeps all."""
    max_rounds: int = 10
    """With dynamic_sampling: rounds of play in an iteration at most, the first included; each further one plays as many
    new tasks as groups are missing. 1 plays no further tasks."""
    at_bound: Literal["train", "error"] = "train"
    """After max_rounds with groups still missing: train on those there are, were it none, or end the run."""
    drop_flat_groups: bool = False
    """Leave out groups all of whose advantages are 0, which saves their forward and backward passes. They have no
    gradient of the policy objective, but tasks and tokens in its mean: without them the gradient of a mini-batch of the
    same groups grows by the ratio of the denominators, and KL and entropy terms of the loss no longer act on tasks that
    are always or never solved."""
    mask_overlong: bool = False
    """Leave trajectories out of the loss, but not out of their group's baseline, that ran out of context or whose last
    response ran out of tokens: what they would have come to is unknown."""
    mask_max_turns: bool = False
    """The same for trajectories that ran out of turns. Nothing then holds the policy back from dithering: for tasks
    whose number of turns is a limit of cost, not part of the task."""
    overlong_margin_tokens: int = 0
    """The last tokens of rollout.limits.max_new_tokens, in which a response begins to cost; 0: it costs nothing."""
    overlong_penalty: float = 1.0
    """What a response of max_new_tokens costs; within the margin the cost rises linearly from 0 to it."""

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ConfigError(f"rollout.filters.max_rounds={self.max_rounds} plays nothing; use 1 or more")
        if self.overlong_margin_tokens < 0:
            raise ConfigError(
                f"rollout.filters.overlong_margin_tokens={self.overlong_margin_tokens} is negative; use 0 for no "
                "penalty, or e.g. a fifth of rollout.limits.max_new_tokens"
            )
        if not 0 < self.overlong_penalty < math.inf:
            raise ConfigError(
                f"rollout.filters.overlong_penalty={self.overlong_penalty} is not a positive number; use e.g. 1, or "
                "overlong_margin_tokens=0 for no penalty"
            )

    def check(self, max_new_tokens: int) -> None:
        """Raise ``ConfigError`` if the margin is larger than the budget it is the end of."""
        if self.overlong_margin_tokens > max_new_tokens:
            raise ConfigError(
                f"rollout.filters.overlong_margin_tokens={self.overlong_margin_tokens} exceeds "
                f"rollout.limits.max_new_tokens={max_new_tokens}, so that an empty response would cost something; "
                f"use e.g. {max(max_new_tokens // 5, 1)}"
            )

    # ---- dynamic sampling: group

    def kept_groups(self, trajectories: Sequence[Trajectory]) -> set[int]:
        """Groups whose attempts differ in outcome. Ask before ``with_penalties``: lengths nearly always differ.

        A group with fewer than two attempts that did not fail is not kept. Groups are told apart by
        ``Trajectory.group`` alone, so tasks of different rounds need different numbers. Without ``dynamic_sampling``
        every group is kept.
        """
        if self.dynamic_sampling is None:
            return {trajectory.group for trajectory in trajectories}
        sound = [trajectory for trajectory in trajectories if not trajectory.failed]
        by_success = self.dynamic_sampling == "success"
        outcomes = [float(trajectory.success) if by_success else trajectory.reward for trajectory in sound]
        return {sound[members[0]].group for members in groups_of(sound) if _differ([outcomes[i] for i in members])}

    def missing_groups(self, num_wanted: int, num_kept: int, num_rounds: int) -> int:
        """How many further tasks to play after ``num_rounds`` rounds; 0: go on to train.

        Raises:
            StepwiseError: groups are missing after ``max_rounds`` and ``at_bound`` is ``error``.
        """
        num_missing = max(num_wanted - num_kept, 0)
        if self.dynamic_sampling is None or num_missing == 0:
            return 0
        if num_rounds < self.max_rounds:
            return num_missing
        if self.at_bound == "error":
            raise StepwiseError(
                f"{num_rounds} rounds of play (rollout.filters.max_rounds={self.max_rounds}) gave {num_kept} of "
                f"{num_wanted} groups whose attempts differ in {self.dynamic_sampling}; raise max_rounds or "
                "rollout.samples_per_task, choose tasks that are sometimes solved, or set at_bound=train"
            )
        return 0

    # ---- the price of length: turn

    def with_penalties(self, trajectories: Sequence[Trajectory], max_new_tokens: int) -> list[Trajectory]:
        """The same with a component ``overlong`` in the rewards of every turn, 0 where it costs nothing.

        For the advantages: the reward that was played stays what it was. A response that the context cut before its
        margin costs nothing. Failed trajectories are left as they are.

        Raises:
            ConfigError: a turn has a component of that name already.
        """
        if self.overlong_margin_tokens == 0:
            return list(trajectories)
        return [
            each
            if each.failed
            else replace(each, turns=tuple(self._priced(turn, max_new_tokens) for turn in each.turns))
            for each in trajectories
        ]

    def _priced(self, turn: Turn, max_new_tokens: int) -> Turn:
        rewards = turn.feedback.rewards
        if OVERLONG in rewards:
            raise ConfigError(
                f"rollout.filters.overlong_margin_tokens={self.overlong_margin_tokens} adds the reward component "
                f"{OVERLONG!r}, but the environment already has one; rename that one, or set 0"
            )
        inside = len(turn.response_ids) - (max_new_tokens - self.overlong_margin_tokens)
        share = min(max(inside, 0) / self.overlong_margin_tokens, 1.0)
        cost = -self.overlong_penalty * share if share else 0.0
        return replace(turn, feedback=replace(turn.feedback, rewards={**rewards, OVERLONG: cost}))

    # ---- what is trained: trajectory and group

    def masked(self, trajectories: Sequence[Trajectory]) -> list[bool]:
        """Of each trajectory whether it is left out of the loss, though not out of its group's baseline.

        The last turn decides: a response that was cut and answered by the environment is the model's to mend.
        """
        return [not each.failed and self._is_cut(each) for each in trajectories]

    def _is_cut(self, trajectory: Trajectory) -> bool:
        if self.mask_max_turns and trajectory.stop_reason is StopReason.MAX_TURNS:
            return True
        ran_out = bool(trajectory.turns) and trajectory.turns[-1].finish_reason == "length"
        return self.mask_overlong and (ran_out or trajectory.stop_reason is StopReason.CONTEXT)

    def flat_groups(self, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]]) -> set[int]:
        """Groups all of whose advantages are 0 (within 1e-6, for means are rounded), and that have no token rewards.

        Args:
            trajectories: failed ones are not looked at.
            advantages: of every trajectory those of its turns (or of its tokens).
        """
        rows = [
            (trajectory.group, _is_flat(trajectory, values))
            for trajectory, values in zip(trajectories, advantages, strict=True)
            if not trajectory.failed
        ]
        return {group for group, _ in rows} - {group for group, flat in rows if not flat}

    def selection(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[Sequence[float]],
        groups: set[int],
        num_rounds: int = 1,
    ) -> Selection:
        """All filters at once.

        Args:
            trajectories: all that were played, in all rounds.
            advantages: of every trajectory those of its turns (or of its tokens).
            groups: what ``kept_groups`` said of them.
            num_rounds: rounds of play it took.
        """
        flat = self.flat_groups(trajectories, advantages) & groups
        dropped = flat if self.drop_flat_groups else set()
        masked = self.masked(trajectories)
        left_out: list[LeftOut] = [
            "failed" if each.failed
            else "uniform" if each.group not in groups
            else "flat" if each.group in dropped
            else "masked" if cut
            else ""
            for each, cut in zip(trajectories, masked, strict=True)
        ]  # fmt: skip
        pairs = [(each, not reason) for each, reason in zip(trajectories, left_out, strict=True)]
        played = {each.group for each in trajectories}
        return Selection(
            left_out=left_out,
            rounds=num_rounds,
            groups_in=len(played),
            groups_uniform=len(played - groups),
            groups_flat=len(flat),
            groups_kept=len({each.group for each, on in pairs if on}),
            trajectories_masked=left_out.count("masked"),
            tokens_dropped=sum(_num_tokens(each) for each, on in pairs if not on and not each.failed),
        )


def _differ(outcomes: Sequence[float]) -> bool:
    """By more than sums of rewards are rounded by."""
    return max(outcomes) - min(outcomes) > EPSILON


def _is_flat(trajectory: Trajectory, advantages: Sequence[float]) -> bool:
    return all(abs(value) <= EPSILON for value in advantages) and not any(
        reward for turn in trajectory.turns for reward in turn.token_rewards
    )


def _num_tokens(trajectory: Trajectory) -> int:
    return sum(len(turn.response_ids) for turn in trajectory.turns)
