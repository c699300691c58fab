"""What can be asked of the strategies, and what is refused before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn

from lit_stepwise.algo import KLPenalty
from lit_stepwise.errors import ConfigError
from lit_stepwise.training import FSDP2Strategy, FSDPStrategy, Lora, StepwiseModule
from lit_stepwise.training.loading import chunk, part_of
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.strategies import check_strategy, move_buffers


def test_the_strategies_have_names() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="fsdp2", logger=False)
    assert type(trainer.strategy) is FSDP2Strategy
    assert type(StrategyRegistry.get("fsdp")) is FSDPStrategy
    check_strategy(trainer)


def test_on_gpus_they_compute_in_bfloat16_unless_told() -> None:
    for kind in (FSDP2Strategy, FSDPStrategy):
        for device, given, expected in (
            ("cuda", None, torch.bfloat16),
            ("cuda", "float32", torch.float32),
            ("cpu", None, torch.float32),
            ("cpu", "bfloat16", torch.bfloat16),
        ):
            strategy = kind(param_dtype=given)  # type: ignore[arg-type]
            strategy.parallel_devices = [torch.device(device, 0)]
            assert strategy.compute_dtype == expected


def test_gradients_on_the_cpu_of_a_machine_with_gpus_are_summed_there() -> None:
    for offload, device, expected in (
        (True, "cuda", "cpu:gloo,cuda:nccl"),
        (False, "cuda", "nccl"),
        (True, "cpu", "gloo"),
    ):
        strategy = FSDP2Strategy(cpu_offload=offload)
        strategy.parallel_devices = [torch.device(device, 0)]
        assert strategy._get_process_group_backend() == expected


def test_offloaded_weights_stay_while_buffers_move() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    move_buffers(model, torch.device("meta"))
    assert model[1].running_mean.is_meta  # type: ignore[union-attr]
    assert not any(each.is_meta for each in model.parameters())


def test_a_rank_fills_what_it_has_all_of() -> None:
    assert part_of(torch.arange(6.0).reshape(3, 2)) == (slice(0, 3), slice(0, 2))


def test_parts_are_dealt_out_as_torch_does() -> None:
    assert [chunk(5, 10, 2, index) for index in range(2)] == [(5, 8), (8, 10)]
    assert [chunk(0, 3, 4, index) for index in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert [chunk(0, 5, 4, index) for index in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


IN_LOSS = KLPenalty(coefficient=0.5, estimator="k2")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bf16-true": ({"precision": "bf16-true"}, "bf16-true rounds the tables of rotary .* use 32-true .*=fsdp2"),
    "16-true": ({"precision": "16-true"}, "trainer.precision=16-true rounds"),
    "bf16-true sharded": ({"precision": "bf16-true", "strategy": FSDP2Strategy()}, "bf16-true rounds the tables"),
    "bf16-mixed with FSDP1": (
        {"precision": "bf16-mixed", "strategy": FSDPStrategy()},
        "bf16-mixed with trainer.strategy=FSDPStrategy would round twice; use 32-true",
    ),
    "bf16-mixed with FSDP2": (
        {"precision": "bf16-mixed", "strategy": FSDP2Strategy()},
        "bf16-mixed with trainer.strategy=FSDP2Strategy would round twice; use 32-true",
    ),
    "Lightning's own": (
        {"strategy": ModelParallelStrategy()},
        "lightning's own ModelParallelStrategy does not know what to shard; use trainer.strategy=fsdp2",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_silently_wrong_is_refused(settings: dict[str, Any], message: str) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, **settings)
    with pytest.raises(ConfigError, match=message):
        check_strategy(trainer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_leaves_positions_alone_is_not(precision: Any) -> None:
    check_strategy(pl.Trainer(accelerator="cpu", devices=2, logger=False, strategy="ddp", precision=precision))


def test_a_type_that_is_none_is_refused() -> None:
    for kind in (FSDP2Strategy, FSDPStrategy):
        with pytest.raises(ConfigError, match="param_dtype='float16' is unknown; use one of bfloat16, float32"):
            kind(param_dtype="float16")  # type: ignore[arg-type]


def test_rounded_positions_are_refused_whatever_rounded_them(tiny_model: Path) -> None:
    policy = PolicyModel.load(str(tiny_model))
    policy.check_positions()
    policy.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"table model.rotary_emb.inv_freq .* is torch.bfloat16, .*=32-true"):
        policy.check_positions()


def test_the_module_looks_at_them_before_it_trains(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StepwiseModule(str(tiny_model))
    module.configure_model()
    module.policy.to(torch.bfloat16)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"inv_freq"):
        module.on_fit_start()


def test_a_reference_is_offloaded_only_where_there_is_one_that_is_sharded(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.offload_reference=true has no effect where no second model"):
        StepwiseModule(str(tiny_model), offload_reference=True)
    with pytest.raises(ConfigError, match=r"model.offload_reference=true has no effect where no second model"):
        StepwiseModule(str(tiny_model), kl=IN_LOSS, lora=Lora(), offload_reference=True)
    module = StepwiseModule(str(tiny_model), kl=IN_LOSS, offload_reference=True)
    module.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ConfigError, match=r"model.offload_reference=true .* trainer.strategy=fsdp2 or fsdp"):
        module.setup("fit")


def test_models_that_cannot_compute_activations_again_are_refused(tiny_model: Path) -> None:
    policy = PolicyModel.load(str(tiny_model))
    type(policy.language_model).supports_gradient_checkpointing, before = False, True
    try:
        with pytest.raises(ConfigError, match=r"activation_checkpointing=true is nothing that models of type qwen3"):
            policy.checkpoint_activations()
    finally:
        type(policy.language_model).supports_gradient_checkpointing = before


WORDS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "tensor parallel where it is not offered": (
        ("--trainer.strategy", "lit_stepwise.training.FSDPStrategy", "--trainer.strategy.tensor_parallel_size", "2"), 2,
        "Option 'tensor_parallel_size' is not accepted .*; FSDPStrategy takes param_dtype, reduce",
    ),
    "tensor parallel over more ranks than a node has": (
        ("--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.tensor_parallel_size", "2"), 1,
        "tensor_parallel_size=2 does not divide trainer.devices=1; use 1",
    ),
    "settings of a name": (
        ("--trainer.strategy", "fsdp2", "--trainer.strategy.cpu_offload", "true"), 2,
        "the name fsdp2 takes no settings: use FSDP2Strategy",
    ),
    "a name that is none": (("--trainer.strategy", "fsdp3"), 1, "strategy=fsdp3 is unknown; use auto, ddp, fsdp2 or"),
    "more devices than there are": (
        ("--trainer.accelerator", "gpu", "--trainer.devices", "8"), 1,
        "trainer.accelerator=gpu, trainer.devices=8, trainer.strategy=auto: .*; change what does not fit",
    ),
    "a precision": (("--trainer.precision", "bf16-true"), 1, "trainer.precision=bf16-true rounds"),
    "a precision with FSDP1": (
        ("--trainer.precision", "bf16-mixed", "--trainer.strategy", "fsdp"), 1, "bf16-mixed with trainer.strategy=FSDP",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("words", "code", "message"), WORDS.values(), ids=WORDS)
def test_the_command_line_says_it_in_a_line(
    words: tuple[str, ...], code: int, message: str, countdown: dict[str, Any], main: Any
) -> None:
    if torch.cuda.device_count() >= 8 and "gpu" in words:
        pytest.skip("there are as many")
    ended, stderr = main("fit", countdown, *words)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert ended == code
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
