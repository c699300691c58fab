"""What a rank holds and needs for an optimizer step: the real module on tensors that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_stepwise.algo.packing import collate
from lit_stepwise.planning.fakes import fake_batch, fake_ranks, fake_tensors, quiet
from lit_stepwise.planning.machine import Machine
from lit_stepwise.planning.tracking import GlooCopies, bytes_of, peak_of, tracker_of
from lit_stepwise.training.module import StepwiseModule
from lit_stepwise.training.scoring import Reference
from lit_stepwise.training.sharding import local
from lit_stepwise.training.strategies import FSDP2Strategy, FSDPStrategy, Sharding, check_strategy, sharding_of
from lit_stepwise.types import MicroBatch, StepSample

_HELD = {"Sharded Param", "Sharded Grad", "Parameter", "Gradient", "OptState", "Optstate", "Buffer"}
_PUT_TOGETHER = {"Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"}
"""Names that torch's trackers give to parts of a peak; the rest is activations and what is computed on the way."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on the device of one rank."""

    weights: int
    gradients: int
    """Between two optimizer steps they are still there."""
    optimizer: int
    reference: int
    buckets: int
    """What ``ddp`` copies gradients to, to sum them."""
    put_together: int
    """At the peak of a step: what all ranks gathered, and gradients before they are sharded."""
    gloo: int
    """At the peak: what gloo copies of what ranks on CPUs send each other."""
    activations: int
    """At the peak: everything that forward and backward passes compute."""
    head: int
    """Of the activations: the logits of one chunk, and the gradient of the head."""
    peak: int
    """Of an optimizer step, all of the above that are there at the time."""
    num_tokens: int
    """Of the micro-batch that was simulated."""

    @property
    def held(self) -> int:
        """While the engine plays, from the second iteration on."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.buckets


@dataclass(frozen=True, slots=True)
class Training:
    """What decides about memory in an optimizer step."""

    module: StepwiseModule
    """With ``reads_weights`` false and a ``model_path`` that holds a configuration. It is left as it is."""
    machine: Machine
    strategy: Any
    """``trainer.strategy``, a name or an object."""
    precision: Any

    @property
    def ranks_per_layer(self) -> int:
        """That compute each layer together."""
        return int(getattr(self.strategy, "tensor_parallel_size", 1))

    @property
    def num_shares(self) -> int:
        """Of a mini-batch."""
        return max(1, self.machine.num_ranks // self.ranks_per_layer)


def simulate(training: Training, samples: Sequence[StepSample]) -> RankMemory:
    """One micro-batch of ``samples`` on the first rank, with gradients of one before, then the step.

    Goes through ``StepwiseModule.configure_model``, the strategy, ``PolicyModel`` and the optimizer as a fit does. Not
    in it: vectors of one number a token (the objective's), what the allocator leaves unused, and what CUDA and NCCL
    take for themselves. Raises ``ConfigError`` for what a fit would refuse.
    """
    batch = collate(samples, [1.0] * len(samples), training.module.packing)
    with fake_ranks(training.machine.num_ranks), quiet():
        trainer, module = _trainer(training), deepcopy(training.module)
        _connect(module, trainer, training.machine.kind)
        with fake_tensors() as mode:
            module.configure_model()
            return _measured(module, trainer, fake_batch(batch, mode), training.machine.kind == "gpu")


def _trainer(training: Training) -> pl.Trainer:
    """A real one. Its device is a CPU, where nothing will be put."""
    strategy = deepcopy(training.strategy)
    if strategy == "fsdp" or isinstance(strategy, FSDPStrategy):  # the tracker knows the second generation alone
        settings = {} if isinstance(strategy, str) else {
            name: getattr(strategy, name) for name in ("param_dtype", "reduce_dtype", "reduce_every_micro_batch")
        }  # fmt: skip
        strategy = FSDP2Strategy(**settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=training.machine.num_devices,
        num_nodes=training.machine.num_nodes,
        strategy=strategy,
        precision=training.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    check_strategy(trainer)
    sharding = sharding_of(trainer)
    if sharding is not None and training.machine.kind == "gpu":
        sharding.param_dtype = sharding.param_dtype or "bfloat16"
    return trainer


def _connect(module: StepwiseModule, trainer: pl.Trainer, kind: str) -> None:
    module.trainer = trainer
    if kind == "gpu" and module.attention in ("auto", "flex"):
        # the kernel of flex is compiled, which takes a GPU; that of varlen needs more, never less
        module.attention = "varlen"
    trainer.strategy.connect(module)
    trainer.strategy.setup_environment()
    module.setup("fit")


def _measured(module: StepwiseModule, trainer: pl.Trainer, batch: MicroBatch, on_gpu: bool) -> RankMemory:
    policy = module.policy
    assert policy is not None
    optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]
    # torch steps all weights at a time where these are no shards
    _have_states(optimizer, foreach=on_gpu and sharding_of(trainer) is None)
    tracker = tracker_of(policy, optimizer)
    gloo = GlooCopies(tracker)
    precision = trainer.precision_plugin.train_step_context()
    with tracker, nullcontext() if on_gpu else gloo, precision:
        if not getattr(trainer.strategy, "reduce_every_micro_batch", True):
            with trainer.strategy.block_backward_sync():  # type: ignore[attr-defined]
                _backward(module, batch)
            tracker.reset_mod_stats()
        _backward(module, batch)
    return _account(module, trainer, optimizer, batch, peak_of(tracker), gloo.at_peak, on_gpu)


def _backward(module: StepwiseModule, batch: MicroBatch) -> None:
    """As ``StepwiseModule._loss`` does, but for what is one number a token."""
    assert module.policy is not None
    logprobs, entropies = module.policy(batch, entropy_gradient=module.objective.entropy_bonus > 0)
    losses = logprobs + entropies if module.objective.entropy_bonus > 0 else logprobs
    (batch.weights * losses).sum().backward()


def _account(
    module: StepwiseModule,
    trainer: pl.Trainer,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch,
    update: Mapping[str, int],
    gloo: int,
    on_gpu: bool,
) -> RankMemory:
    """What the tracker saw of forward and backward pass, and what stays or comes besides."""
    assert module.policy is not None
    weights = [*module.policy.parameters()]
    trained = [each for each in weights if each.requires_grad]
    held = (bytes_of(weights), bytes_of(trained), bytes_of(_states(optimizer)))
    of_peak, put_together = _sum(update, _HELD), _sum(update, _PUT_TOGETHER)
    peak = max(update["Total"], sum(held) + _of_step(module, trained, on_gpu and sharding_of(trainer) is None))
    if getattr(trainer.strategy, "cpu_offload", False):  # the step is taken on the CPU
        held, peak = (0, 0, 0), update["Total"] - of_peak
    reference = module.reference.model if isinstance(module.reference, Reference) else None
    of_reference = bytes_of(reference.parameters()) if reference is not None and not module.offload_reference else 0
    buckets = 4 * sum(each.numel() for each in trained) if _has_buckets(trainer) else 0
    return RankMemory(
        weights=held[0],
        gradients=held[1],
        optimizer=held[2],
        reference=of_reference,
        buckets=buckets,
        put_together=put_together,
        gloo=gloo,
        activations=update["Total"] - of_peak - put_together - gloo,
        head=_of_head(module, len(batch.labels)),
        peak=peak + of_reference + buckets,
        num_tokens=len(batch.tree.token_ids),
    )


def _of_head(module: StepwiseModule, num_targets: int) -> int:
    """As ``algo.logprobs`` says: two chunks of logits, and the sum of the gradients of the head."""
    assert module.policy is not None
    head = module.policy.language_model.get_output_embeddings().weight
    rows = min(module.logits_chunk_tokens, num_targets)
    return 8 * rows * len(head) + (4 * head.numel() if head.requires_grad else 0)


def _have_states(optimizer: torch.optim.Optimizer, foreach: bool) -> None:
    """As after a step, with gradients that are still there."""
    for group in optimizer.param_groups:
        if foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what torch chooses on a GPU
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _of_step(module: StepwiseModule, trained: Sequence[Tensor], foreach: bool) -> int:
    """What the optimizer computes on the way, at most, on the parts that this rank has."""
    from torch.distributed._tools.mem_tracker import MemTracker

    own = [nn.Parameter(local(each).detach()) for each in trained]
    optimizer = module.optimizer(own)
    _have_states(optimizer, foreach)
    there = [*own, *(each.grad for each in own if each.grad is not None), *_states(optimizer)]
    tracker = MemTracker()
    tracker.track_external(*there)
    with tracker:
        optimizer.step()
    return peak_of(tracker)["Total"] - bytes_of(there)


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _sum(parts: Mapping[str, int], names: set[str]) -> int:
    return sum(size for name, size in parts.items() if name in names)


def _has_buckets(trainer: pl.Trainer) -> bool:
    """``ddp`` sums gradients in copies of them, unless it is told that these may be one."""
    from lightning.pytorch.strategies import DDPStrategy

    strategy = trainer.strategy
    is_ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, Sharding)
    settings: dict[str, Any] = getattr(strategy, "_ddp_kwargs", {})
    return is_ddp and not settings.get("gradient_as_bucket_view", False)
