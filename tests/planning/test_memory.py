"""What a rank holds and needs, by the real module on fake tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

from lit_stepwise.algo import KLPenalty
from lit_stepwise.errors import ConfigError
from lit_stepwise.planning.attempts import Lengths, step_samples
from lit_stepwise.planning.fakes import fake_ranks
from lit_stepwise.planning.machine import Machine
from lit_stepwise.planning.memory import Training, simulate
from lit_stepwise.planning.tracking import GlooCopies, peak_of
from lit_stepwise.training import FSDP2Strategy, FSDPStrategy, Lora, StepwiseModule
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import Limits

LIMITS = Limits(max_prompt_tokens=64, max_context_tokens=512, max_new_tokens=60, max_turns=4)


def samples(num_attempts=1, turns=1):
    """Trees of 64 + 60 nodes an attempt's first turn."""
    made = step_samples(Lengths(64, 60, 0, 20, turns), LIMITS, "append", "step", 1, num_attempts)
    return [
        replace(each, prompt_ids=[k % 267 for k in each.prompt_ids], response_ids=[k % 267 for k in each.response_ids])
        for each in made  # the tokenizer knows so many
    ]


def planned(tiny_model, strategy="auto", num_ranks=1, kind="cpu", precision="32-true", drawn=None, **settings):
    module = StepwiseModule(str(tiny_model), **settings)
    module.reads_weights = False
    training = Training(module, Machine(kind, num_ranks, 1, 0.0, ""), strategy, precision)
    return simulate(training, samples() if drawn is None else drawn)


@pytest.fixture(scope="module")
def num_weights(tiny_model):
    """Of all parameters; rows of the largest come out even over 2 and 4 ranks."""
    return sum(each.numel() for each in PolicyModel.load(str(tiny_model)).parameters())


def test_one_rank_holds_16_bytes_a_weight(tiny_model, num_weights):
    found = planned(tiny_model)
    assert found.weights == found.gradients == 4 * num_weights
    assert found.optimizer == pytest.approx(8 * num_weights, rel=1e-3)  # and a number of steps for each tensor
    assert (found.reference, found.buckets, found.put_together) == (0, 0, 0)
    assert found.peak > found.held == found.weights + found.gradients + found.optimizer
    assert found.num_tokens == 124


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp", FSDP2Strategy(), FSDPStrategy()])
def test_ranks_share_what_is_held_and_gather_what_they_compute_with(strategy, tiny_model, num_weights):
    found = planned(tiny_model, strategy, 4)
    assert found.weights == pytest.approx(num_weights, rel=0.02)  # rows that do not come out even are padded
    assert found.gradients == found.weights
    assert found.optimizer == pytest.approx(2 * found.weights, rel=0.01)
    assert found.put_together > 0


def test_ddp_holds_all_and_copies_of_the_gradients(tiny_model, num_weights):
    found, alone = planned(tiny_model, "ddp", 2), planned(tiny_model)
    assert (found.weights, found.buckets) == (4 * num_weights, 4 * num_weights)
    assert found.peak == alone.peak + found.buckets


def test_a_reference_is_one_more_copy_of_the_weights(tiny_model, num_weights):
    kl = KLPenalty(coefficient=0.1)
    plain, found = planned(tiny_model), planned(tiny_model, kl=kl)
    assert found.reference == 4 * num_weights
    assert found.peak == plain.peak + found.reference
    sharded = planned(tiny_model, "fsdp2", 2, kl=kl)
    assert sharded.reference == sharded.weights
    assert planned(tiny_model, "fsdp2", 2, kl=kl, offload_reference=True).reference == 0


def test_an_adapter_alone_has_gradients_and_states(tiny_model, num_weights):
    lora = Lora(rank=2, target_modules=["q_proj"])
    found = planned(tiny_model, lora=lora, kl=KLPenalty(coefficient=0.1))
    num_trained = 2 * 2 * (64 + 128)  # in 2 layers, from 64 numbers to 4 heads of 32
    assert found.gradients == 4 * num_trained
    assert found.weights == 4 * (num_weights + num_trained)
    assert found.reference == 0  # it is the policy without its adapter
    sharded = planned(tiny_model, "fsdp2", 2, lora=lora)
    assert sharded.gradients == 2 * num_trained


def test_what_is_offloaded_takes_nothing_of_the_device(tiny_model):
    held, offloaded = (planned(tiny_model, FSDP2Strategy(cpu_offload=on), 2, "gpu") for on in (False, True))
    assert offloaded.held == 0
    assert 0 < offloaded.peak < held.peak - held.weights


def test_activations_grow_with_tokens_and_checkpointing_gives_most_of_them_up(tiny_model):
    few, many = (planned(tiny_model, drawn=samples(3, turns)) for turns in (1, 4))
    assert few.num_tokens == 64 + 3 * 60
    assert many.num_tokens == 64 + 3 * (4 * 60 + 3 * 20)
    assert many.activations / few.activations == pytest.approx(many.num_tokens / few.num_tokens, rel=0.35)
    assert planned(tiny_model, drawn=samples(3, 4), activation_checkpointing=True).peak < 0.8 * many.peak


def test_a_chunk_of_logits_bounds_the_head(tiny_model):
    small, large = (planned(tiny_model, logits_chunk_tokens=chunk, drawn=samples(3, 4)) for chunk in (16, 512))
    assert large.head - small.head == 8 * (512 - 16) * 267
    assert small.peak < large.peak


def test_gloo_takes_a_copy_of_a_layer_that_it_gathers_and_a_gpu_has_none(tiny_model):
    layer = PolicyModel.load(str(tiny_model)).language_model.model.layers[0]
    num_weights = sum(each.numel() for each in layer.parameters())
    wide, half = (planned(tiny_model, "fsdp2", 2, kind) for kind in ("cpu", "gpu"))
    assert (wide.gloo, half.gloo) == (4 * num_weights, 0)  # nothing else of so few tokens is as much
    parts = wide.held + wide.put_together + wide.gloo + wide.activations
    assert wide.peak == pytest.approx(parts, rel=1e-4)  # and tables of the rotary embedding
    kept = planned(tiny_model, "fsdp2", 2, drawn=samples(3, 4))
    assert kept.gloo == 0  # where activations are the most, nothing is sent
    assert planned(tiny_model).gloo == 0


@pytest.mark.parametrize(("send", "copied"), [
    (lambda whole, part: dist.all_gather_single(whole, part), 4 * 1000),
    (lambda whole, part: dist.reduce_scatter_single(part, whole), 4 * 1000),
    (lambda whole, part: dist.all_reduce(whole), 0),  # in its own memory
])  # fmt: skip
def test_what_gloo_copies_is_there_for_as_long_as_it_sends(send, copied):
    whole, part = torch.zeros(1000), torch.zeros(500)
    tracker = MemTracker()
    tracker.track_external(whole, part)
    gloo = GlooCopies(tracker)
    with fake_ranks(2), tracker, gloo:
        send(whole, part)
        assert (peak_of(tracker)["Total"], gloo.at_peak) == (6000 + copied, copied)
        torch.zeros(500)
        assert peak_of(tracker)["Total"] == 6000 + max(copied, 2000)
        assert gloo.at_peak == copied
        torch.zeros(1500)
        send(whole, part)
    assert (peak_of(tracker)["Total"], gloo.at_peak) == (6000 + 6000, 0)


def test_ranks_that_compute_layers_together_hold_as_much_and_compute_with_less(tiny_model, num_weights):
    apart, together = (
        planned(tiny_model, FSDP2Strategy(tensor_parallel_size=size), 2, drawn=samples(3, 4)) for size in (1, 2)
    )
    assert apart.weights == pytest.approx(4 * num_weights / 2, rel=1e-3)
    # norms of its two layers, 2 x 64 and 2 x 32 weights, are whole on both
    assert together.weights == apart.weights + 4 * 2 * (2 * 64 + 2 * 32) / 2
    assert together.activations < 0.9 * apart.activations
    assert together.head == apart.head


def test_a_gpu_computes_in_half_the_bytes(tiny_model):
    wide, half = (planned(tiny_model, "fsdp2", 2, kind, drawn=samples(3, 4)) for kind in ("cpu", "gpu"))
    assert half.weights == wide.weights
    assert half.activations < 0.8 * wide.activations
    mixed = planned(tiny_model, kind="gpu", precision="bf16-mixed", drawn=samples(3, 4))
    assert mixed.weights == pytest.approx(2 * wide.weights, rel=0.01)  # rows that do not come out even are padded


def test_gradients_that_wait_for_their_sum_are_whole(tiny_model, num_weights):
    soon = planned(tiny_model, FSDP2Strategy(), 4)
    late = planned(tiny_model, FSDP2Strategy(reduce_every_micro_batch=False), 4)
    assert late.peak - soon.peak > 2 * num_weights


@pytest.mark.parametrize("packing", ["tree", "trajectory", "none"])
def test_every_packing_can_be_planned(packing, tiny_model):
    assert planned(tiny_model, packing=packing, drawn=samples(2, 2)).peak > 0


def test_the_module_is_left_as_it_was(tiny_model):
    module = StepwiseModule(str(tiny_model))
    module.reads_weights = False
    training = Training(module, Machine("gpu", 2, 1, 0.0, ""), "fsdp2", "32-true")
    before = module.attention
    simulate(training, samples())
    assert module.policy is None
    assert module.attention == before
    assert not torch.distributed.is_initialized()


def test_what_a_fit_refuses_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"trainer.precision=bf16-true rounds"):
        planned(tiny_model, precision="bf16-true")
    with pytest.raises(ConfigError, match="offload_reference=true has no effect"):
        planned(tiny_model, kl=KLPenalty(coefficient=0.1), offload_reference=True)


MEASURED = """
import sys, warnings
from dataclasses import replace
from itertools import accumulate
import lightning.pytorch as pl, torch
from lit_stepwise.training import StepwiseModule
from lit_stepwise.types import MiniBatch
from tests.planning.test_memory import samples
warnings.filterwarnings("ignore")


class Module(StepwiseModule):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


module = Module(sys.argv[1], max_tokens_per_micro_batch=980, activation_checkpointing=True)
drawn = [replace(each, group=group) for group in range(2) for each in samples(3, 4)]  # two micro-batches
trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    trainer.fit(module, torch.utils.data.DataLoader([MiniBatch(drawn, 0, step) for step in range(2)], batch_size=None))
events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
print(max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()))))
"""


@pytest.mark.slow
def test_a_fit_allocates_what_was_planned(tmp_path):
    """Two steps in the real Trainer, as torch's allocator counts them."""
    from lit_stepwise.testing import save_tiny_model

    model = save_tiny_model(tmp_path / "model", hidden_size=512, num_layers=4)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    words = [sys.executable, "-c", MEASURED, str(model)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root, env=environment)
    found = planned(model, drawn=samples(3, 4), activation_checkpointing=True)
    assert found.peak == pytest.approx(int(done.stdout.split()[-1]), rel=0.05)


def test_a_machine_of_several_nodes_has_the_ranks_of_all(tiny_model):
    module = StepwiseModule(str(tiny_model))
    module.reads_weights = False
    training = Training(module, Machine("cpu", 2, 1, 0.0, ""), "fsdp2", "32-true")
    two = simulate(training, samples())
    four = simulate(replace(training, machine=Machine("cpu", 2, 2, 0.0, "")), samples())
    assert four.weights == pytest.approx(two.weights / 2, rel=0.02)
