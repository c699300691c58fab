"""What is refused of layers that several ranks compute; what they compute is in test_strategies.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from lit_stepwise.errors import ConfigError
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.training import FSDP2Strategy, Lora, StepwiseModule
from lit_stepwise.training.tensor_parallel import TensorParallel


@pytest.mark.parametrize("size", [0, 2])
def test_a_size_that_does_not_divide_the_devices_of_a_node_is_refused(size: int, tiny_model: Path) -> None:
    strategy = FSDP2Strategy(tensor_parallel_size=size)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size={size} does not divide trainer.devices=1; use 1$"):
        trainer.test(StepwiseModule(str(tiny_model)), torch.utils.data.DataLoader([0]))  # type: ignore[arg-type]


class TestTwoRanks:
    @pytest.fixture(autouse=True)
    def ranks(self) -> Any:
        torch.distributed.init_process_group("fake", rank=0, world_size=6, store=FakeStore())
        yield
        torch.distributed.destroy_process_group()

    def split(self, folder: Path, size: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder)
        TensorParallel(model, init_device_mesh("cpu", (6 // size, size), mesh_dim_names=("data", "layer"))["layer"])
        return model

    def test_each_holds_its_heads_and_its_columns_of_the_mlp(self, tiny_model: Path) -> None:
        (layer, *_) = self.split(tiny_model, 2).model.layers
        shapes = {
            name: tuple(each.to_local().shape) for name, each in layer.named_parameters() if hasattr(each, "to_local")
        }
        assert shapes == {
            "self_attn.q_proj.weight": (64, 64),
            "self_attn.k_proj.weight": (32, 64),
            "self_attn.v_proj.weight": (32, 64),
            "self_attn.o_proj.weight": (64, 64),
            "mlp.gate_proj.weight": (96, 64),
            "mlp.up_proj.weight": (96, 64),
            "mlp.down_proj.weight": (64, 96),
        }

    def test_heads_that_cannot_be_dealt_out_are_counted(self, tiny_model: Path) -> None:
        message = r"tensor_parallel_size=3 does not divide the model's 4 heads; use 1 or 2$"
        with pytest.raises(ConfigError, match=message):
            self.split(tiny_model, 3)

    def test_a_model_that_transformers_does_not_split_is_refused(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=9)).save_pretrained(tmp_path)
        with pytest.raises(
            ConfigError, match=r"tensor_parallel_size=2: models of type gpt2 are not split by transf.*; use 1$"
        ):
            self.split(tmp_path, 2)

    def test_a_way_to_split_that_is_not_known_is_named(self, tiny_model: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.config.base_model_tp_plan = {"layers.*.mlp.experts": "grouped_gemm", "layers.*.mlp.up_proj": "colwise"}
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("data", "layer"))["layer"]
        with pytest.raises(
            ConfigError, match=r"of type qwen3 are split in ways that are not known here \(grouped_gemm\)"
        ):
            TensorParallel(model, mesh)


class TestSettings:
    def module(self, folder: Path, **settings: Any) -> StepwiseModule:
        module = StepwiseModule(str(folder), **settings)
        trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(tensor_parallel_size=2), logger=False)
        module.trainer = trainer
        return module

    def test_adapters_are_not_split(self, tiny_model: Path) -> None:
        with pytest.raises(ConfigError, match=r"^model.lora with .*tensor_parallel_size=2: adapters are not split"):
            self.module(tiny_model, lora=Lora(rank=2)).setup("fit")

    @pytest.mark.parametrize("setting", ["foreach", "fused"])
    def test_optimizers_take_one_weight_at_a_time(self, setting: str, tiny_model: Path) -> None:
        module = self.module(tiny_model, optimizer=lambda each: torch.optim.AdamW(each, **{setting: True}))
        module.setup("fit")
        module.policy = torch.nn.Linear(2, 2)  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=rf"^model.optimizer.init_args.{setting}=true .*_size=2; leave it out"):
            module.configure_optimizers()


def test_the_model_of_these_tests_has_four_heads_of_which_two_share_their_keys(tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path)).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 192)
