"""Strategies that shard: which part of a model each rank holds, and in which precision all of them compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy as LightningFSDPStrategy
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchmetrics import Metric

from lit_stepwise.checkpoints.shards import WholeShards
from lit_stepwise.errors import ConfigError
from lit_stepwise.training.sharding import set_gradient_sync
from lit_stepwise.training.tensor_parallel import TensorParallel, check_size

Dtype = Literal["bfloat16", "float32"]
_DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


Filling = Callable[[nn.Module], None]
"""Writes weights into a module's own parameters, or what this rank has of them, and buffers; not into its children."""


class Sharding(ABC):
    """What a strategy offers that holds a part of each model on every rank."""

    root_device: torch.device
    param_dtype: Dtype | None
    reduce_dtype: Dtype

    tensor_parallel_size: int = 1
    """Ranks that compute each layer of the policy together, on the same micro-batches."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of forward and backward passes; what is held, reduced and stepped is wider."""
        by_default: Dtype = "float32" if self.root_device.type == "cpu" else "bfloat16"
        return _DTYPES[self.param_dtype or by_default]

    @abstractmethod
    def shard(
        self, model: nn.Module, layers: Sequence[nn.Module], fill: Filling | None, frozen: bool, offload: bool
    ) -> nn.Module:
        """The same model, of which each rank holds its part from now on.

        Args:
            model: on the meta device where there is a ``fill``. What it computes outside of its ``forward`` finds no
                weights.
            layers: are put together one at a time; all that is in none of them, for as long as ``forward`` runs.
            fill: gives it its weights.
            frozen: there are no backward passes.
            offload: between two uses the parts are in the memory of the CPU.
        """

    def finish_gradients(self) -> None:
        """Whatever is left to do between the backward passes and the optimizer step."""


class FSDP2Strategy(Sharding, WholeShards, ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all ranks, with PyTorch's ``fully_shard``.

    Weights and optimizer states are float32; a layer computes with a copy of its weights in ``param_dtype``, which all
    ranks put together just before. Use it with ``trainer.precision: 32-true``.

    Args:
        param_dtype: of forward and backward passes; null: bfloat16 on GPUs, float32 on a CPU.
        reduce_dtype: in which the ranks add up gradients.
        reshard_after_forward: a layer's weights are given up after its forward pass and put together again for its
            backward pass; false saves that communication for the memory of a whole copy in param_dtype.
        cpu_offload: weights, gradients and optimizer states are in the memory of the CPU, and so is the step.
        reduce_every_micro_batch: gradients are summed and sharded after each micro-batch; false does it once in an
            optimizer step, for the memory of a whole gradient in reduce_dtype.
        save_distributed_checkpoint: each rank writes its part into a folder; false collects all in one file on rank 0.
        tensor_parallel_size: ranks of a node that compute each layer of the policy together, with some of its heads
            each, on the same micro-batches; there are as many fewer of these at a time. For layers whose activations do
            not fit: to exchange what they compute takes longer than to gather weights.
    """

    weights_key = "state_dict"

    def __init__(
        self,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype = "float32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        reduce_every_micro_batch: bool = True,
        save_distributed_checkpoint: bool = True,
        tensor_parallel_size: int = 1,
    ) -> None:
        super().__init__(1, tensor_parallel_size, save_distributed_checkpoint)
        _check_dtypes(param_dtype, reduce_dtype)
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.tensor_parallel_size = tensor_parallel_size
        self._tensor_parallel: TensorParallel | None = None

    def setup_environment(self) -> None:
        """All ranks are one mesh; what Lightning itself takes is tensor parallelism over those of a node."""
        num_ranks = self.num_nodes * self.num_processes
        check_size(self.tensor_parallel_size, self.num_processes)
        self._data_parallel_size = num_ranks // self.tensor_parallel_size
        super().setup_environment()
        assert self.device_mesh is not None
        self._of_layers = self._of_all = self.device_mesh["data_parallel"]
        if self.tensor_parallel_size > 1:
            self._of_all = init_device_mesh(self.root_device.type, (num_ranks,))

    def shard(
        self, model: nn.Module, layers: Sequence[nn.Module], fill: Filling | None, frozen: bool, offload: bool
    ) -> nn.Module:
        """See ``Sharding``. What is frozen is asked by each rank by itself, so that no ranks share its layers."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        assert self.device_mesh is not None
        if self.tensor_parallel_size > 1 and not frozen:
            self._tensor_parallel = TensorParallel(model.language_model, self.device_mesh["tensor_parallel"])
        offload = offload or self.cpu_offload
        reshard = self.reshard_after_forward or frozen
        shared: dict[str, Any] = {
            # inputs are as they should be; to cast them would round temperatures and positions
            "mp_policy": MixedPrecisionPolicy(
                self.compute_dtype, _DTYPES[self.reduce_dtype], cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            if offload
            else OffloadPolicy(),
        }
        for layer in layers:
            of_layer = self._of_all if frozen else self._of_layers
            fully_shard(layer, mesh=of_layer, **shared, reshard_after_forward=reshard)
        # the backward pass begins with what is in no layer, so torch by itself keeps that
        at_the_end = True if frozen else None if reshard else False
        fully_shard(model, mesh=self._of_all, **shared, reshard_after_forward=at_the_end)
        if fill is not None:
            model.to_empty(device=torch.device("cpu") if offload else self.root_device)
            for module in model.modules():
                fill(module)
        move_buffers(model, self.root_device)
        return model

    def finish_gradients(self) -> None:
        """See ``TensorParallel``."""
        if self._tensor_parallel is not None:
            self._tensor_parallel.finish_gradients()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of the backward passes in it are left to the next one outside of it, if they may be."""
        assert self.model is not None
        if self.reduce_every_micro_batch:
            yield
            return
        set_gradient_sync(self.model, False)
        try:
            yield
        finally:
            set_gradient_sync(self.model, True)

    def model_to_device(self) -> None:
        """All but the weights that are to stay where they are."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        move_buffers(self.model, self.root_device)
        for module in self.model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)

    def _get_process_group_backend(self) -> str:
        # the norm of gradients that are on the CPU is summed there
        both = self.cpu_offload and self.root_device.type == "cuda"
        return "cpu:gloo,cuda:nccl" if both else super()._get_process_group_backend()


class FSDPStrategy(Sharding, WholeShards, LightningFSDPStrategy):
    """Shards weights, gradients and optimizer states over all ranks, with PyTorch's ``FullyShardedDataParallel``.

    The first generation of what ``FSDP2Strategy`` does, with the same meaning of its settings; it needs more memory
    where only an adapter is trained. Use it with ``trainer.precision: 32-true``.

    Args:
        param_dtype: of forward and backward passes; null: bfloat16 on GPUs, float32 on a CPU.
        reduce_dtype: in which the ranks add up gradients.
        reduce_every_micro_batch: gradients are summed and sharded after each micro-batch; false does it once in an
            optimizer step, for the memory of a whole gradient.
        save_distributed_checkpoint: each rank writes its part into a folder; false collects all in one file on rank 0.
    """

    weights_key = "model"

    def __init__(
        self,
        param_dtype: Dtype | None = None,
        reduce_dtype: Dtype = "float32",
        reduce_every_micro_batch: bool = True,
        save_distributed_checkpoint: bool = True,
    ) -> None:
        super().__init__(state_dict_type="sharded" if save_distributed_checkpoint else "full")
        _check_dtypes(param_dtype, reduce_dtype)
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.save_distributed_checkpoint = save_distributed_checkpoint

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """Lightning's, but for what it does to batches."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = None if precision_plugin is None else _Precision(cast(Any, precision_plugin.precision))

    def shard(
        self, model: nn.Module, layers: Sequence[nn.Module], fill: Filling | None, frozen: bool, offload: bool
    ) -> nn.Module:
        """See ``Sharding``. Lightning leaves a module alone that has one inside that is wrapped already."""
        from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        precision = MixedPrecision(
            param_dtype=self.compute_dtype,
            reduce_dtype=_DTYPES[self.reduce_dtype],
            # those of rotary embeddings are exact in nothing less
            buffer_dtype=torch.float32,
            # inputs are as they should be; to cast them would round temperatures
            cast_forward_inputs=False,
            cast_root_forward_inputs=False,
        )
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in layers}),
            mixed_precision=precision,
            # on a CPU there is nothing to do, and it would pin memory, which takes a GPU
            cpu_offload=CPUOffload(offload_params=offload and self.root_device.type == "cuda"),
            device_id=self.root_device,
            use_orig_params=True,
            param_init_fn=None if fill is None else _made_real(fill, self.root_device),
        )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients of the backward passes in it are left to the next one outside of it, if they may be."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        assert self.model is not None
        roots = (each for each in self.model.modules() if isinstance(each, FullyShardedDataParallel))
        with nullcontext() if self.reduce_every_micro_batch else next(roots).no_sync():
            yield


class _Precision(FSDPPrecision):
    def convert_input(self, data: Any) -> Any:
        """Micro-batches are made in the types they are to have, and a mini-batch is frozen."""
        return data


# by the second name Lightning has its own, which cannot wrap this model under manual optimization
StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks, computing in bfloat16")
StrategyRegistry.register("fsdp", FSDPStrategy, description="FSDP1, the same with flat parameters", override=True)


def sharding_of(trainer: pl.Trainer | None) -> Sharding | None:
    """That of its strategy; None where each rank holds all."""
    strategy = getattr(trainer, "strategy", None)
    return strategy if isinstance(strategy, Sharding) else None


def check_strategy(trainer: pl.Trainer) -> None:
    """Raises ``ConfigError`` for a strategy or a precision in which training would fail, or be silently wrong."""
    strategy, precision = trainer.strategy, str(trainer.precision)
    if precision in ("bf16-true", "16-true"):
        raise ConfigError(
            f"trainer.precision={precision} rounds the tables of rotary embeddings: cosines are off by 0.9 from the "
            "thousandth token on, and the engine's are not; use 32-true with trainer.strategy=fsdp2, which computes "
            "in bfloat16, or bf16-mixed on one device or with ddp"
        )
    name = type(strategy).__name__
    if isinstance(strategy, LightningFSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, Sharding):
        ours = "fsdp" if isinstance(strategy, LightningFSDPStrategy) else "fsdp2"
        raise ConfigError(
            f"trainer.strategy={type(strategy).__module__.split('.')[0]}'s own {name} does not know what to shard; use "
            f"trainer.strategy={ours}, which is made for this model"
        )
    in_one_file = isinstance(strategy, FSDPStrategy) and not strategy.save_distributed_checkpoint
    if in_one_file and strategy.root_device.type == "cpu":
        raise ConfigError(
            "trainer.strategy.save_distributed_checkpoint=false with FSDPStrategy on a CPU ends in a crash of torch at "
            "the first checkpoint; leave it true, or use FSDP2Strategy"
        )
    if isinstance(strategy, Sharding) and precision != "32-true":
        raise ConfigError(
            f"trainer.precision={precision} with trainer.strategy={name} would round twice; use 32-true: weights are "
            "float32 then, and trainer.strategy.init_args.param_dtype says what is computed in"
        )


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """To ``device``; parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _made_real(fill: Filling, device: torch.device) -> Any:
    """What FSDP1 calls with each module before it flattens what is in it. Weights that modules share stay shared."""
    made: dict[int, Tensor] = {}

    def make(module: nn.Module) -> None:
        without = [(name, parameter) for name, parameter in module.named_parameters(recurse=False)]
        module.to_empty(device=device, recurse=False)
        for name, parameter in without:
            setattr(module, name, made.setdefault(id(parameter), getattr(module, name)))
        fill(module)

    return make


def _check_dtypes(param_dtype: Dtype | None, reduce_dtype: Dtype) -> None:
    for name, value in {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}.items():
        if value is not None and value not in _DTYPES:
            raise ConfigError(
                f"trainer.strategy.init_args.{name}={value!r} is unknown; use one of {', '.join(_DTYPES)}"
            )
