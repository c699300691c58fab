"""An adapter in training: what it trains, what engines get of it, and that PEFT agrees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision

from lit_stepwise.algo import KLPenalty
from lit_stepwise.algo.packing import collate
from lit_stepwise.errors import ConfigError
from lit_stepwise.testing import exact_logprobs
from lit_stepwise.training import Lora, StepwiseModule, lora
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import MiniBatch, StepSample

pytestmark = [
    pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]

LORA = Lora(rank=3, alpha=5)


def module_with(path: Path, settings: Lora = LORA, trained: bool = True, **more: Any) -> StepwiseModule:
    """A module whose adapter has been anywhere but where it starts from, where it changes nothing."""
    module = StepwiseModule(str(path), lora=settings, max_tokens_per_micro_batch=20, **more)
    module.configure_model()
    trainer = {"world_size": 1, "global_rank": 0, "num_training_batches": 2, "precision_plugin": Precision()}
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    if trained:
        draw = torch.Generator().manual_seed(2)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=draw) / 5
    return module


@pytest.fixture(scope="module")
def module(tiny_model: Path) -> StepwiseModule:
    return module_with(tiny_model)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps its weights transposed, and has biases and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokens = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None}
    no_dropout = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    config = GPT2Config(n_positions=32, n_embd=12, n_layer=1, n_head=2, **tokens, **no_dropout)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def samples() -> list[StepSample]:
    sizes = [(3, 2), (9, 5), (4, 7)]
    rows = [[(31 * i + 7 * k) % 39 for k in range(p + r)] for i, (p, r) in enumerate(sizes)]
    return [
        StepSample(row[:p], row[p:], [True] * r, [-4.0] * r, [1.0 - 1.5 * i] * r, 0.0, i, 0, 0, 0)
        for i, (row, (p, r)) in enumerate(zip(rows, sizes, strict=True))
    ]


def saved_by_peft(module: StepwiseModule, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The adapter in a model that PEFT wraps, as it writes it down."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    adapter = module.adapter()
    (folder / "ours").mkdir()
    save_file(dict(adapter.weights), folder / "ours" / "adapter_model.safetensors")
    (folder / "ours" / "adapter_config.json").write_text(json.dumps(adapter.config))
    wrapped = PeftModel.from_pretrained(PolicyModel.load(module.model_path, 9).language_model, folder / "ours")
    wrapped.save_pretrained(folder / "theirs")
    config = json.loads((folder / "theirs" / "adapter_config.json").read_text())
    return config, load_file(folder / "theirs" / "adapter_model.safetensors")


def test_the_adapter_alone_is_trained_and_the_loss_reaches_all_of_it(tiny_model: Path) -> None:
    module = module_with(tiny_model)
    (group,) = module.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [names[id(parameter)] for parameter in group["params"]]
    assert len(trained) == 2 * 2 * 7  # A and B of the seven linear layers of two blocks
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    for micro_batch in module._micro_batches(MiniBatch(samples(), 0, 0)):
        module._loss(micro_batch).backward()
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == set(trained)
    assert all(bool(parameter.grad.abs().max() > 0) for parameter in group["params"])


def test_a_fresh_adapter_changes_nothing(tiny_model: Path) -> None:
    plain = StepwiseModule(str(tiny_model))
    plain.configure_model()
    fresh = module_with(tiny_model, trained=False)
    said = [([5, 6, 7], [8, 9])]
    torch.testing.assert_close(fresh.score(said)[0], plain.score(said)[0], rtol=0, atol=0)
    assert (fresh.adapter_rank, plain.adapter_rank) == (3, 0)


@pytest.mark.parametrize("model", ["tiny_model", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_merged_weights_are_those_of_peft(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from peft import PeftModel

    path = request.getfixturevalue(model)
    module = module_with(path)
    saved_by_peft(module, tmp_path)
    plain = PolicyModel.load(str(path), 9).language_model
    base = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    merged = PeftModel.from_pretrained(plain, tmp_path / "ours").merge_and_unload()
    expected = dict(merged.named_parameters())
    weights = dict(module.weights())
    assert list(weights) == list(base)  # the names of Hugging Face in their order, tied ones once
    assert not any(weight.requires_grad for weight in weights.values())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=1e-6)
    changed = {name for name, weight in weights.items() if not torch.equal(weight, base[name])}
    assert len(changed) == len(list(module.adapter().weights)) / 2
    for name, weight in module.weights(merged=False):
        assert torch.equal(weight, base[name]), name


def test_merged_weights_are_made_one_at_a_time(module: StepwiseModule) -> None:
    assert isinstance(module.weights(), Iterator)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    for _ in module.weights():
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_the_merged_model_says_what_the_adapted_one_says(module: StepwiseModule) -> None:
    plain = PolicyModel.load(module.model_path, 9).language_model
    plain.load_state_dict(dict(module.weights()), strict=False)
    expected = exact_logprobs(plain, [5, 6, 7], [8, 9])[[0, 1], [8, 9]]
    torch.testing.assert_close(module.score([([5, 6, 7], [8, 9])])[0][0], expected, rtol=0, atol=1e-5)


def test_the_adapter_is_what_peft_would_save(module: StepwiseModule, tmp_path: Path) -> None:
    config, weights = saved_by_peft(module, tmp_path)
    ours = module.adapter()
    assert sorted(config.pop("target_modules")) == ours.config["target_modules"]
    assert config == {name: value for name, value in ours.config.items() if name != "target_modules"}
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 5, "LORA")
    found = dict(ours.weights)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_reference_is_the_policy_without_its_adapter(tiny_model: Path, place: Any) -> None:
    estimator = "k2" if place == "loss" else "k1"
    module = module_with(tiny_model, kl=KLPenalty(coefficient=0.5, estimator=estimator, place=place))
    assert isinstance(module.reference, lora.WithoutAdapter)
    assert module.reference.model is module.policy
    batch = collate(samples(), [1.0] * 3)
    plain = PolicyModel.load(str(tiny_model), 9)
    with torch.no_grad():
        expected, own = plain(batch)[0], module.policy(batch)[0]  # type: ignore[union-attr]
        torch.testing.assert_close(module.reference(batch), expected, rtol=0, atol=0)
        torch.testing.assert_close(module.policy(batch)[0], own, rtol=0, atol=0)  # type: ignore[union-attr]
    assert float((expected - own).abs().max()) > 0.01
    module._loss(batch).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in module.parameters())


def test_dropout_is_for_updates_alone(tiny_model: Path) -> None:
    module = module_with(tiny_model, Lora(rank=3, alpha=5, dropout=0.5), old_logprobs="trainer", packing="none")
    said = [([5, 6], [7, 8])]
    assert torch.equal(module.score(said)[0][0], module.score(said)[0][0])
    first, second = (module.with_old_logprobs(samples())[1].old_logprobs for _ in range(2))
    assert first == second
    batch = collate(samples(), [1.0] * 3, "none")
    assert not torch.equal(module.policy(batch)[0], module.policy(batch)[0])  # type: ignore[union-attr]


def test_a_checkpoint_goes_back_into_the_same_model_and_into_no_other(module: StepwiseModule) -> None:
    state = deepcopy(module.state_dict())
    module.on_load_checkpoint({"state_dict": state})
    plain = StepwiseModule(module.model_path)
    plain.configure_model()
    with pytest.raises(ConfigError, match="ckpt_path holds another architecture"):
        plain.on_load_checkpoint({"state_dict": state})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"model\.lora\.rank=0 leaves nothing to train; use 1"),
        ({"alpha": 0}, r"model\.lora\.alpha=0 silences the adapter; use 1"),
        ({"dropout": 1.0}, r"model\.lora\.dropout=1\.0 is outside \[0, 1\)"),
        ({"target_modules": []}, r"model\.lora\.target_modules is empty; name layers, or use all-linear"),
    ],
)
def test_settings_that_can_never_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lora(**settings)


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["q_porj"], r"model\.lora\.target_modules=\['q_porj'\] does not fit the model: .*; use all-linear"),
        (["q_proj", "lm_head"], r"adapts lm_head, which is no linear layer inside the model; leave it out"),
        (["embed_tokens"], r"adapts model\.embed_tokens, which is no linear layer inside the model; leave it out"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
def test_layers_that_are_not_there_or_no_linear_ones_inside_are_refused(
    tiny_model: Path, target_modules: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        module_with(tiny_model, Lora(target_modules=target_modules))


def test_without_peft_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"model\.lora needs PEFT; install it with: pip install 'lit-stepwise\[lora\]'"
    ):
        StepwiseModule("unused", lora=LORA)


@pytest.mark.parametrize("packing", ["tree", "trajectory"])
def test_dropout_is_refused_where_samples_share_tokens(tiny_model: Path, packing: Any) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.dropout=0\.5 with model\.packing='{packing}' would draw once"):
        StepwiseModule(str(tiny_model), lora=Lora(dropout=0.5), packing=packing)
