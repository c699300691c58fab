"""Log-probabilities that nothing is learnt from: of the policy before its update, and of a frozen reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_stepwise.algo.kl import KLPenalty
from lit_stepwise.algo.packing import Packing, collate
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import MicroBatch, StepSample, Turn

T = TypeVar("T")


class Reference:
    """A frozen model. No ``nn.Module`` itself, so that a module that has one neither trains, saves nor counts it.

    Args:
        model: in its place already, if it is sharded.
        is_sharded: it is; else it follows its batches.
    """

    def __init__(self, model: PolicyModel, is_sharded: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.is_sharded = is_sharded

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """[N] Its log-probabilities, on the device of the batch."""
        model = self.model if self.is_sharded else self.model.to(batch.labels.device)
        logprobs: Tensor = model(batch)[0]
        return logprobs


@torch.no_grad()
def logprobs_of(
    score: Callable[[MicroBatch], Tensor],
    samples: Sequence[StepSample],
    plan: Iterable[Sequence[int]],
    packing: Packing,
    device: torch.device,
) -> dict[int, list[float]]:
    """What a model says of the micro-batches of ``plan``; ``score`` gives its [N] log-probabilities of one.

    Returns:
        [R] log-probabilities, 0 on tokens that were not sampled, by index into ``samples``.
    """
    found = {}
    for members in plan:
        batch = collate([samples[i] for i in members], [0.0] * len(members), packing).to(device)
        values = iter(score(batch).tolist())
        for i in members:
            found[i] = [next(values) if sampled else 0.0 for sampled in samples[i].response_mask]
    return found


def as_sample(prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float) -> StepSample:
    """A response to be scored; there is nothing to learn from it."""
    size = len(response_ids)
    return StepSample(
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        response_mask=[True] * size,
        rollout_logprobs=[0.0] * size,
        advantages=[0.0] * size,
        reward=0.0,
        group=0,
        sample=0,
        turn=0,
        policy_version=0,
        temperature=temperature,
    )


def price_of_turns(
    kl: KLPenalty, turns: Sequence[Turn], ref_logprobs: Sequence[Sequence[float]]
) -> tuple[list[float], Tensor]:
    """The penalty of every turn, summed over its tokens, and the estimate in nats of each token that has one."""
    logprobs = torch.tensor([x for turn in turns for x in turn.rollout_logprobs], dtype=torch.float64)
    reference = torch.tensor([x for row in ref_logprobs for x in row], dtype=torch.float64)
    finite = (logprobs + reference).isfinite()
    remaining = iter(kl.penalty(logprobs, reference, finite).tolist())
    penalties = [math.fsum(islice(remaining, len(turn.response_ids))) for turn in turns]
    return penalties, kl.estimate(logprobs, reference)[finite].float()


def from_all_ranks(value: T) -> list[T]:
    """What each rank gave, equal on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
