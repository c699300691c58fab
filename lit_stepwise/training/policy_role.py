"""What the LightningModule is to the ``RolloutCallback``: a ``Policy``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_stepwise.algo.logprobs import likeliest
from lit_stepwise.algo.microbatches import plan_micro_batches
from lit_stepwise.algo.packing import Packing, collate
from lit_stepwise.training.lora import WithoutAdapter, adapter_of, weights_of
from lit_stepwise.training.metrics import UpdateMetrics
from lit_stepwise.training.objective import Objective
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.scoring import Reference, as_sample, from_all_ranks, logprobs_of, price_of_turns
from lit_stepwise.training.sharding import reshard
from lit_stepwise.types import Adapter, StepSample, Turn


class PolicyRole(pl.LightningModule):
    """The methods of ``interfaces.Policy``. What it is made of comes from the ``StepwiseModule``."""

    model_path: str
    adapter_rank: int
    """Of the adapter that is trained; 0: the weights themselves are."""
    policy: PolicyModel | None
    reference: Reference | WithoutAdapter | None
    objective: Objective
    update_metrics: UpdateMetrics
    packing: Packing
    max_tokens_per_micro_batch: int
    step_plan: list[list[int]]
    """Of the last optimizer step: which samples each micro-batch of this rank holds."""
    step_logprobs: list[Tensor]
    """[N] Of each of these micro-batches, without gradient."""
    ranks_per_layer: int = 1
    """Ranks that compute each layer of the policy together, and so forward the same."""
    staleness: int = 0
    """Iterations that play may run ahead of training; set by the RolloutCallback in its ``setup``."""

    def weights(self, merged: bool = True) -> Iterable[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor), lazily and in the same order on every rank.

        ``merged``: with the adapter in them, where there is one; else those it stands on.
        """
        assert self.policy is not None
        return weights_of(self.policy, merged)

    def adapter(self) -> Adapter:
        """The adapter, as PEFT saves one; only where ``adapter_rank`` is not 0. Every rank calls it together."""
        assert self.policy is not None
        return adapter_of(self.policy)

    @torch.no_grad()
    def score(self, said: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        """Of each (prompt, response): [R] its log-probabilities at temperature 1, [R] those of the likeliest tokens.

        Without gradient, in one forward pass. Every rank calls it together.
        """
        assert self.policy is not None
        asked, first = list(said), 0
        if self.ranks_per_layer > 1:  # they answer for all of them together
            position = self.global_rank % self.ranks_per_layer
            start = self.global_rank - position
            each = from_all_ranks(asked)[start : start + self.ranks_per_layer]
            asked, first = [one for of_rank in each for one in of_rank], sum(map(len, each[:position]))
        samples = [as_sample(prompt_ids, response_ids, temperature=1.0) for prompt_ids, response_ids in asked]
        batch = collate(samples, [0.0] * len(samples), self.packing).to(self.device)
        with self.as_in_training():
            logprobs, best = self.policy(batch, summary=likeliest)
        sizes = [len(response_ids) for _, response_ids in asked]
        answers = list(zip(logprobs.split(sizes), best.split(sizes), strict=True))
        return answers[first : first + len(said)]

    def logprob_gap(self) -> float:
        """Mean absolute difference of engine and trainer, in nats, on the tokens of the optimizer step that is due.

        Every rank calls it together, between the backward passes and the step.
        """
        return self.update_metrics.logprob_gap()

    def learnt_logprobs(self, samples: Sequence[StepSample]) -> dict[int, list[float]]:
        """Of the last optimizer step: what the policy gave the sampled tokens of its samples before it was updated.

        Args:
            samples: of its mini-batch.

        Returns:
            A number for each sampled token, by index into ``samples``, of those that this rank forwarded.
        """
        if not self.step_plan:
            return {}
        values = iter(torch.cat(self.step_logprobs).tolist())
        members = [i for part in self.step_plan for i in part]
        return {i: list(islice(values, samples[i].num_response_tokens)) for i in members}

    def reference_penalties(self, turns: Sequence[Turn], temperature: float) -> list[float] | None:
        """What leaving the reference costs each of this rank's turns, to be taken from its reward; None: nothing does.

        Every rank calls it together, be it without a turn.
        """
        kl = self.objective.kl
        if self.reference is None or kl.place != "reward":
            return None
        samples = [as_sample(turn.prompt_ids, turn.response_ids, temperature) for turn in turns]
        plan = self.plan(samples)[0]
        rounds = max(from_all_ranks(len(plan)))  # a sharded reference answers all ranks together
        plan += [[] for _ in range(rounds - len(plan))]
        with self.as_in_training():
            found = logprobs_of(self.reference, samples, plan, self.packing, self.device)
        penalties, estimates = price_of_turns(kl, turns, [found[i] for i in range(len(turns))])
        self.update_metrics.observe({"kl": estimates.to(self.device)})
        return penalties

    def plan(self, samples: Sequence[StepSample], world_size: int = 1) -> list[list[list[int]]]:
        """Which samples each rank forwards together, see ``plan_micro_batches``; every rank plans the same."""
        assert self.policy is not None
        return plan_micro_batches(samples, self.max_tokens_per_micro_batch, self.policy.flops, self.packing, world_size)

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """The precision of ``training_step``, without dropout, for what is computed outside of it."""
        assert self.policy is not None
        precision = self._trainer.precision_plugin.train_step_context() if self._trainer else nullcontext()
        with precision, self.policy.without_dropout():
            yield
        reshard(self.policy)
