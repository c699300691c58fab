"""The LightningModule that learns from step samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_stepwise.algo.correction import RolloutCorrection
from lit_stepwise.algo.kl import KLPenalty
from lit_stepwise.algo.losses import DualClip
from lit_stepwise.algo.packing import Packing, collate
from lit_stepwise.algo.reductions import Reduction, token_weights
from lit_stepwise.algo.tree_attention import AttentionName
from lit_stepwise.checkpoints.shards import different_architecture
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import PolicyLoss
from lit_stepwise.training.loading import give_memory, load_sharded
from lit_stepwise.training.logs import Logs
from lit_stepwise.training.lora import Lora, WithoutAdapter
from lit_stepwise.training.objective import Objective, OldLogprobs, chosen
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.policy_role import PolicyRole
from lit_stepwise.training.scoring import Reference, from_all_ranks, logprobs_of
from lit_stepwise.training.sharding import clip_gradients
from lit_stepwise.training.strategies import Sharding, check_strategy, sharding_of
from lit_stepwise.types import MicroBatch, MiniBatch, StepSample


def _adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.01)


def _constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class StepwiseModule(PolicyRole, Logs):
    """One ``training_step`` is one optimizer step over a mini-batch of step samples, in micro-batches.

    Args:
        model_path: folder or name of a Hugging Face causal language model.
        loss: the policy objective.
        reduction: what the loss of a mini-batch is a mean over: its tokens all alike, or the means of its steps (turns,
            or the rows that they share), trajectories or prompts; constant divides by no length (Dr. GRPO).
        kl: a price on leaving a frozen reference.
        entropy_bonus: times the entropy of every sampled token is added to the objective.
        old_logprobs: what the ratios of the loss are against. rollout: the engine's logprobs. trainer: the trainer's
            own of before the first update of an iteration, at the price of another forward pass unless an iteration is
            a single optimizer step. null: trainer where play runs ahead or there is a correction, else rollout.
        correction: weights and masks for tokens of which engine and trainer differ; needs old_logprobs trainer. null:
            token_cap 2 where play runs ahead (rollout.staleness), else none.
        reference_path: model of kl; when not given that of model_path, or with lora the policy without its adapter.
        lora: trains a low-rank adapter and none of the weights; null trains them all.
        max_response_tokens: token budget of a turn, which reduction constant divides by; on the command line it follows
            rollout.limits.max_new_tokens.
        optimizer: class_path of a torch optimizer with its init_args.
        lr_scheduler: class_path of a torch scheduler, stepped once per optimizer step.
        max_grad_norm: the gradient is clipped to this norm; 0 leaves it alone.
        packing: tree computes what step samples have in common once, with the logprobs and gradients of samples apart;
            trajectory shares within each trajectory alone; none makes padded rows, with the model's own attention.
        attention: over a tree. auto: segments on a CPU, and on a GPU varlen (half precision) or flex; dense is slow and
            certain.
        max_tokens_per_micro_batch: tokens that are computed together; the one knob for memory.
        logits_chunk_tokens: response tokens whose logits exist at a time.
        activation_checkpointing: of each layer keep only what goes in, and compute the rest again for the backward
            pass: a third more time for most of the memory.
        offload_reference: where the strategy shards, the reference of kl is in the memory of the CPU between two uses.
    """

    reads_weights: bool = True
    """False: ``configure_model`` makes the models without weights, as ``lit-stepwise plan`` does on fake tensors."""

    def __init__(
        self,
        model_path: str,
        loss: PolicyLoss = DualClip(),  # noqa: B008  (frozen; jsonargparse shows it as the default)
        reduction: Reduction = "token",
        kl: KLPenalty = KLPenalty(),  # noqa: B008
        entropy_bonus: float = 0.0,
        old_logprobs: OldLogprobs | None = None,
        correction: RolloutCorrection | None = None,
        reference_path: str | None = None,
        lora: Lora | None = None,
        max_response_tokens: int = 1024,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable = _constant,
        max_grad_norm: float = 1.0,
        packing: Packing = "tree",
        attention: AttentionName = "auto",
        max_tokens_per_micro_batch: int = 16384,
        logits_chunk_tokens: int = 1024,
        activation_checkpointing: bool = False,
        offload_reference: bool = False,
    ) -> None:
        super().__init__()
        for name, number in {
            "max_response_tokens": max_response_tokens,
            "max_tokens_per_micro_batch": max_tokens_per_micro_batch,
            "logits_chunk_tokens": logits_chunk_tokens,
        }.items():
            if number < 1:
                raise ConfigError(f"model.{name}={number}; use 1 or more")
        for name, value, known in (
            ("reduction", reduction, Reduction),
            ("packing", packing, Packing),
            ("attention", attention, AttentionName),
        ):
            if value not in get_args(known):
                raise ConfigError(f"model.{name}={value!r} is unknown; use one of {', '.join(get_args(known))}")
        if reference_path is not None and not kl.needs_reference:
            raise ConfigError(
                f"model.reference_path={reference_path!r} has no effect while model.kl.coefficient is 0; raise the "
                "coefficient, or leave out the path"
            )
        if offload_reference and (not kl.needs_reference or (lora is not None and reference_path is None)):
            raise ConfigError(
                "model.offload_reference=true has no effect where no second model is the reference (kl.coefficient is "
                "0, or it is the policy without its adapter); leave it out"
            )
        if not max_grad_norm >= 0:
            raise ConfigError(
                f"model.max_grad_norm={max_grad_norm} would turn every gradient around; use e.g. 1.0, or 0 to clip none"
            )
        if lora is not None:
            lora.check()
            if lora.dropout and packing != "none":
                raise ConfigError(
                    f"model.lora.dropout={lora.dropout} with model.packing={packing!r} would draw once for all samples "
                    "that share a token; use a dropout of 0, or model.packing=none"
                )
        self.automatic_optimization = False
        self.model_path = model_path
        self.lora = lora
        self.adapter_rank = lora.rank if lora is not None else 0
        self.old_logprobs = old_logprobs
        self.correction = correction
        self.objective = Objective(loss, kl, entropy_bonus, *chosen(old_logprobs, correction, staleness=0))
        self.reduction = reduction
        self.reference_path = reference_path
        self.max_response_tokens = max_response_tokens
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.packing = packing
        self.attention = attention
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.logits_chunk_tokens = logits_chunk_tokens
        self.activation_checkpointing = activation_checkpointing
        self.offload_reference = offload_reference
        self.policy = None
        self.reference = None
        self.step_plan = []
        self.step_logprobs = []

    # ---- set-up

    def setup(self, stage: str) -> None:
        """Choose what was left open; the RolloutCallback has said by now how play runs."""
        if self._trainer is not None:
            check_strategy(self._trainer)
            self._check_sharding(sharding_of(self._trainer))
        old_logprobs, correction = chosen(self.old_logprobs, self.correction, self.staleness)
        self.objective = replace(self.objective, old_logprobs=old_logprobs, correction=correction)

    def _check_sharding(self, sharding: Sharding | None) -> None:
        if self.offload_reference and sharding is None:
            raise ConfigError(
                "model.offload_reference=true has no effect where every rank holds the whole reference; use it with "
                "trainer.strategy=fsdp2 or fsdp"
            )
        self.ranks_per_layer = sharding.tensor_parallel_size if sharding is not None else 1
        self.update_metrics.copies = self.ranks_per_layer
        if self.lora is not None and self.ranks_per_layer > 1:
            raise ConfigError(
                f"model.lora with trainer.strategy.init_args.tensor_parallel_size={self.ranks_per_layer}: adapters are "
                "not split over ranks; use a size of 1, or train all weights"
            )

    def configure_model(self) -> None:
        """Load the weights; Lightning may call this more than once."""
        if self.policy is None:
            began = time.perf_counter()
            self.policy = self._load(self.model_path, "model.model_path", self._prepare)
            rank_zero_info(f"read {self.model_path} in {time.perf_counter() - began:.1f} s")
        if self.reference is None and self.objective.kl.needs_reference:
            self.reference = self._load_reference(self.policy)

    def _prepare(self, policy: PolicyModel) -> None:
        if self.lora is not None:
            self.lora.attach(policy)
        if self.activation_checkpointing:
            policy.checkpoint_activations()

    def _load_reference(self, policy: PolicyModel) -> Reference | WithoutAdapter:
        path, setting = self.reference_path or self.model_path, "model.model_path"
        if self.reference_path is None and self.lora is not None:
            return WithoutAdapter(policy)
        setting = "model.model_path" if self.reference_path is None else "model.reference_path"

        def freeze(model: PolicyModel) -> None:
            if model.num_tokens != policy.num_tokens:
                raise ConfigError(
                    f"{setting}={path!r} knows {model.num_tokens} tokens and the policy {policy.num_tokens}; give a "
                    "model with the policy's tokenizer"
                )
            model.eval().requires_grad_(False)

        is_sharded = sharding_of(self._trainer) is not None
        return Reference(self._load(path, setting, freeze, frozen=True), is_sharded)

    def _load(
        self, path: str, setting: str, prepare: Callable[[PolicyModel], None], frozen: bool = False
    ) -> PolicyModel:
        def load(empty_on: str | None) -> PolicyModel:
            return PolicyModel.load(path, self.logits_chunk_tokens, self.packing, self.attention, setting, empty_on)

        sharding = sharding_of(self._trainer)
        if sharding is not None:
            offload = frozen and self.offload_reference
            return load_sharded(path, load, prepare, sharding, frozen, offload, self.reads_weights)
        model = load(None if self.reads_weights else "meta")
        prepare(model)
        if not self.reads_weights:
            give_memory(model, self.device)
        return model

    def on_fit_start(self) -> None:
        """Find out, on this very machine, whether attention over a tree is what it has to be."""
        assert self.policy is not None
        sharding = sharding_of(self._trainer)
        self.policy.check_positions()
        with self.as_in_training():
            self.policy.test_attention(self.device, sharding.compute_dtype if sharding else None)

    def configure_optimizers(self) -> Any:
        """What the YAML names."""
        try:
            optimizer = self.optimizer([each for each in self.parameters() if each.requires_grad])
        except ValueError as error:
            raise ConfigError(f"model.optimizer: {error}; see the settings of that class") from error
        together = [name for name in ("foreach", "fused") if optimizer.defaults.get(name)]
        if together and self.ranks_per_layer > 1:
            raise ConfigError(
                f"model.optimizer.init_args.{together[0]}=true steps all weights at a time, which are not split alike "
                f"with trainer.strategy.init_args.tensor_parallel_size={self.ranks_per_layer}; leave it out"
            )
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another model before any of them is copied."""
        theirs = {name: tuple(value.shape) for name, value in checkpoint.get("state_dict", {}).items()}
        if not theirs:  # a strategy that shards has read them already, and ours are not whole
            return
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if difference := different_architecture(theirs, ours, self.model_path):
            raise ConfigError(difference)

    # ---- learning

    @property
    def wants_old_logprobs(self) -> bool:
        """Whether the samples of an iteration are to go through ``with_old_logprobs`` before its first update.

        Not when an iteration is one optimizer step: the logprobs of that very step are those of before it.
        """
        return self.objective.old_logprobs == "trainer" and self.trainer.num_training_batches > 1

    def on_train_start(self) -> None:
        """Say what was chosen, and what will not be done."""
        choices: dict[str, object] = {}
        if self.old_logprobs is None:
            choices["old_logprobs"] = self.objective.old_logprobs
        if self.correction is None and self.objective.correction.token_cap is not None:
            choices["correction.token_cap"] = self.objective.correction.token_cap
        if choices and self.objective.old_logprobs == "trainer":
            said = ", ".join(f"model.{name}={value}" for name, value in choices.items())
            rank_zero_info(f"left open, and chosen at rollout.staleness={self.staleness}: {said}")
        if self.objective.old_logprobs == "trainer" and not self.wants_old_logprobs:
            rank_zero_info(
                "model.old_logprobs=trainer: an iteration is a single optimizer step, whose own logprobs serve; there "
                "is no other forward pass"
            )

    def with_old_logprobs(self, samples: Sequence[StepSample]) -> list[StepSample]:
        """The samples of a mini-batch with the policy's logprobs of now, by the micro-batches of its update.

        Every rank calls it together, does its share and gets all.
        """
        assert self.policy is not None
        with self.as_in_training():
            own = logprobs_of(self._logprobs, samples, self._plan(samples), self.packing, self.device)
        found = {i: logprobs for each in from_all_ranks(own) for i, logprobs in each.items()}
        return [replace(sample, old_logprobs=found[i]) for i, sample in enumerate(samples)]

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        assert self.policy is not None
        logprobs: Tensor = self.policy(batch)[0]
        return logprobs

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        """One optimizer step on the mini-batch of all ranks."""
        began = time.perf_counter()
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        optimizer.zero_grad()
        self.step_logprobs.clear()
        # the ranks' gradients are summed once, or where that would take the memory of a whole one, every time
        without_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        for micro_batch, is_last in _with_last(self._micro_batches(batch)):
            with nullcontext() if is_last else without_sync():
                self.manual_backward(self._loss(micro_batch.to(self.device)))
        if sharding := sharding_of(self.trainer):
            sharding.finish_gradients()
        grad_norm = self._clip_gradients()
        optimizer.step()
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        scheduler.step()
        self.log_update(
            {
                "train/grad_norm": float(grad_norm),
                "train/lr": optimizer.param_groups[0]["lr"],
                "seconds/train": time.perf_counter() - began,
            }
        )

    def _micro_batches(self, batch: MiniBatch) -> Iterable[MicroBatch]:
        """This rank's share."""
        samples = batch.samples
        weights = token_weights(samples, self.reduction, self.max_response_tokens)
        self.step_plan = self._plan(samples)
        return (
            collate([samples[i] for i in part], [weights[i] for i in part], self.packing) for part in self.step_plan
        )

    def _plan(self, samples: Sequence[StepSample]) -> list[list[int]]:
        """This rank's micro-batches of a mini-batch; every rank plans the same and runs the same number."""
        return self.plan(samples, self._num_shares)[self.global_rank // self.ranks_per_layer]

    @property
    def _num_shares(self) -> int:
        """Of a mini-batch: the ranks, where those that compute layers together count as one."""
        num_ranks: int = self.trainer.world_size
        return num_ranks // self.ranks_per_layer

    def _loss(self, batch: MicroBatch) -> Tensor:
        """This micro-batch's part of the loss of the mini-batch on all ranks."""
        assert self.policy is not None
        objective = self.objective
        ref_logprobs = self.reference(batch) if self.reference and objective.asks_reference else None
        logprobs, entropies = self.policy(batch, entropy_gradient=objective.entropy_bonus > 0)
        self.step_logprobs.append(logprobs.detach())
        if objective.old_logprobs == "trainer" and not self.wants_old_logprobs:
            batch = replace(batch, old_logprobs=logprobs.detach())
        said = objective(batch, logprobs, entropies, ref_logprobs)
        loss = (batch.weights * said.losses).sum()
        self.update_metrics.update(loss, said.logged, said.differences)
        self.update_metrics.count(batch, self.policy.num_forwarded(batch.tree), self.policy.flops)
        # ddp and fsdp average the gradients of the ranks, while theirs is a sum over tokens
        return loss * self._num_shares

    def _clip_gradients(self) -> Tensor:
        """Norm before clipping."""
        assert self.policy is not None
        return clip_gradients(self.policy, self.max_grad_norm or float("inf"))


def _with_last(micro_batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Each of them, and whether none comes after it."""
    remaining = iter(micro_batches)
    present = next(remaining)
    for following in remaining:
        yield present, False
        present = following
    yield present, True
