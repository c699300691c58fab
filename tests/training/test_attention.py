"""Tree attention inside language models: equal to one sequence at a time, refused where it would not be, and tested."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from lit_stepwise.algo.tree import Nodes, build_tree
from lit_stepwise.algo.tree_attention import Attend, AttentionName, back_end
from lit_stepwise.errors import ConfigError
from lit_stepwise.training import attention
from lit_stepwise.types import Segment, TokenTree

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 20, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 6}
ROPE = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
MAMBA = {"state_size": 4, "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 20}


def model(kind: str, **settings: Any) -> Any:
    """A random causal language model, in training mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **settings})
    config._experts_implementation = "eager"  # the others know no float64
    return transformers.AutoModelForCausalLM.from_config(config).train()


def exact(language_model: Any) -> Any:
    """In float64, with norms that stay in it."""
    for module in list(language_model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return language_model.double()


def some_tree(seed: int = 0) -> tuple[TokenTree, list[Tensor], list[Nodes]]:
    draw = random.Random(seed)
    trunk = draw.choices(range(20), k=9)
    sequences = [trunk[: draw.randint(0, 9)] + draw.choices(range(20), k=draw.randint(1, 9)) for _ in range(5)]
    arrays = [np.array(each, np.int32) for each in [trunk, *sequences]]
    tree, paths, _ = build_tree(arrays, [0] * len(arrays))
    return tree, [torch.from_numpy(each).long() for each in arrays], paths


def of_tree(language_model: Any, tree: TokenTree, name: AttentionName = "auto") -> Tensor:
    """[T, H] Hidden states."""
    inputs = attention.inputs_of(tree, name)
    hidden: Tensor = language_model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[0]


def of_sequences(language_model: Any, sequences: list[Tensor]) -> list[Tensor]:
    return [language_model.base_model(input_ids=each[None], use_cache=False).last_hidden_state[0] for each in sequences]


def use_trees(language_model: Any) -> Any:
    attention.refuse(language_model, "tree")
    attention.register()
    language_model.set_attn_implementation(attention.NAME)
    return language_model


def gradients(language_model: Any, loss: Tensor) -> list[Tensor]:
    language_model.zero_grad()
    loss.backward()
    return [each.grad for each in language_model.parameters() if each.grad is not None]


MODELS = pytest.mark.parametrize(("kind", "settings", "tolerance"), [
    ("Qwen2", {}, 1e-12),
    ("Qwen2", {"sliding_window": 4, "use_sliding_window": False}, 1e-12),
    ("Qwen3", {"head_dim": 6}, 1e-12),
    ("Llama", {}, 1e-12),
    ("Llama", {"rope_parameters": LLAMA3}, 1e-12),
    ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, 1e-12),
    ("Llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, 1e-12),
    ("Mistral", {"sliding_window": None}, 1e-12),
    ("Qwen3Moe", EXPERTS, 1e-6),  # routes in float32
    ("Mixtral", {}, 1e-6),
    ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_embd": 24, "n_head": 4}, 1e-12),
])  # fmt: skip


@MODELS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_computes_a_tree_as_its_sequences(
    kind: str, settings: dict[str, Any], tolerance: float, checkpointing: bool
) -> None:
    language_model = exact(model(kind, **settings))
    tree, sequences, paths = some_tree()
    weights = torch.rand(len(tree.ends), 24, dtype=torch.float64)
    apart, once = of_sequences(language_model, sequences), weights.clone()
    losses = []
    for path, states in zip(paths, apart, strict=True):
        losses.append((once[path] * states).sum())
        once[path] = 0  # what the next sequences share with this one has been counted
    expected = gradients(language_model, torch.stack(losses).sum())

    use_trees(language_model)
    if checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hidden = of_tree(language_model, tree)
    for path, states in zip(paths, apart, strict=True):
        torch.testing.assert_close(hidden[path], states, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients(language_model, (weights * hidden).sum()), expected, strict=True):
        assert (one - other).norm() <= tolerance * (other.norm() + 1)


def test_under_autocast_attention_is_computed_in_its_dtype() -> None:
    language_model = use_trees(model("Qwen3", head_dim=6))
    tree, *_ = some_tree()
    seen: list[torch.dtype] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return back_end("segments")(tree)(query, key, value, scale)

    inputs = attention.inputs_of(tree, "auto") | {"attend": attend}
    with torch.autocast("cpu", torch.bfloat16):
        narrow = language_model.base_model(**inputs).last_hidden_state
    assert seen == [torch.bfloat16] * 6
    wide = language_model.base_model(**inputs).last_hidden_state
    assert seen[6:] == [torch.float32] * 6
    assert 1e-4 < (narrow - wide).norm() / wide.norm() < 2e-2


def test_a_model_gives_its_own_scale_or_none() -> None:
    scales = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        scales.append(scale)
        return query

    states = torch.zeros(1, 2, 3, 16)
    for given in ({"scaling": 0.7}, {"scaling": None}, {}):
        attention._attention(nn.Identity(), states, states, states, None, attend=attend, **given)  # type: ignore[arg-type]
    assert scales == [0.7, 0.25, 0.25]


def test_no_mask_is_ever_built_for_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = use_trees(model("Qwen3", head_dim=6))

    def build(**settings: Any) -> Tensor:
        raise AssertionError("a mask was built")

    monkeypatch.setitem(transformers.AttentionMaskInterface(), attention.NAME, build)
    of_tree(language_model, some_tree()[0])


def test_without_a_tree_the_language_model_is_what_it_was() -> None:
    language_model = model("Qwen3", head_dim=6).eval()
    padded, mask = torch.randint(0, 20, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    asks = {"input_ids": padded, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected, logits = language_model.generate(**asks), language_model(input_ids=padded).logits
    use_trees(language_model)
    assert torch.equal(language_model.generate(**asks), expected)
    assert torch.equal(language_model(input_ids=padded).logits, logits)


def test_what_a_model_adds_to_its_attention_is_not_passed_over() -> None:
    states = torch.zeros(1, 1, 2, 4)
    mask = torch.ones(1, 1, 2, 2)
    for added in ({"sliding_window": 3}, {"softcap": 9.0}, {"s_aux": mask}, {"position_bias": mask}, {"dropout": 0.1}):
        with pytest.raises(ConfigError, match=rf"whose Identity adds {next(iter(added))}; use model\.packing=none"):
            attention._attention(nn.Identity(), states, states, states, None, attend=lambda *_: states, **added)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adds attention_mask"):
        attention._attention(nn.Identity(), states, states, states, mask, attend=lambda *_: states)
    ends = torch.tensor([[[[2, 2]]]])
    with pytest.raises(ConfigError, match="Identity is not handed the tree"):
        attention._attention(nn.Identity(), states, states, states, ends)


# refuse


REFUSED = pytest.mark.parametrize(("kind", "settings", "reason"), [
    ("Qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, "layers of type sliding_att"),
    ("Mistral", {"sliding_window": 4096}, "has sliding_window=4096"),
    ("Gemma2", {"head_dim": 6}, "has layers of type sliding_attention"),
    ("Gemma2", {"head_dim": 6, "layer_types": ["full_attention"] * 2}, r"has attn_logit_softcapping=50\.0"),
    ("Gemma3Text", {"head_dim": 6}, "has layers of type sliding_attention"),
    ("GptOss", {"num_local_experts": 2, "layer_types": ["full_attention"] * 2}, "has attention sinks"),
    ("Qwen3Next", EXPERTS, "has layers of type linear_attention"),
    ("Mamba", MAMBA, "has layers of type linear_attention"),
    ("Rwkv", MAMBA, "carries a state"),
    ("RecurrentGemma", {"lru_width": 24, "attention_window_size": 4}, "carries a state"),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "has layers of type conv"),
    ("Lfm2", {"layer_types": ["full_attention"] * 2}, None),
    ("Bloom", {"n_layer": 2, "n_head": 4}, "takes no position_ids"),
    ("Falcon", {"alibi": True}, "takes no position_ids"),
    ("Falcon", {}, "does not take its attention from transformers.AttentionInterface"),
    ("StableLm", {}, "does not take its attention from"),
    ("GPTJ", {"n_embd": 24, "n_head": 4, "rotary_dim": 4}, "does not take its attention from"),
    ("Bert", {}, "lets tokens see later ones"),
    ("DeepseekV3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
                    "first_k_dense_replace": 2}, "has keys of 8 numbers but values of 6"),
    ("DeepseekV3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
                    "first_k_dense_replace": 2}, None),
    ("Llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic"}}, "rotary embeddings of type dynamic"),
    ("Llama", {"rope_parameters": LONGROPE}, "rotary embeddings of type longrope"),
    ("Llama", {"rope_parameters": LLAMA3}, None),
    ("Llama", {"attention_dropout": 0.125}, r"has attention_dropout=0\.125: one draw would serve"),
    ("GPT2", {"n_embd": 24, "n_head": 4, "attn_pdrop": 0.0}, r"has a dropout of 0\.1 at transformer\.drop: one draw"),
    ("Mixtral", {"router_jitter_noise": 0.25}, r"has router_jitter_noise=0\.25"),
    ("Mixtral", {}, None),
])  # fmt: skip


@REFUSED
def test_models_that_see_more_than_ancestors_are_refused(
    kind: str, settings: dict[str, Any], reason: str | None
) -> None:
    language_model = model(kind, **settings)
    attention.refuse(language_model, "none")
    if reason is None:
        return attention.refuse(language_model, "tree")
    with pytest.raises(ConfigError, match=reason) as caught:
        attention.refuse(language_model, "tree")
    assert f"model.packing=tree cannot train a model of type {language_model.config.model_type}, " in str(caught.value)
    assert "; use model.packing=none, which lays samples out as padded rows" in str(caught.value)


def test_a_refusal_names_the_setting_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"^scorer\.packing=trajectory .*; use scorer\.packing=none"):
        attention.refuse(model("Mistral", sliding_window=8), "trajectory", "scorer.packing")


def test_dropout_of_an_adapter_is_refused() -> None:
    language_model = model("Llama")
    language_model.model.layers[1].mlp.lora_dropout = nn.Dropout(0.05)
    with pytest.raises(ConfigError, match=r"has a dropout of 0\.05 at model\.layers\.1\.mlp\.lora_dropout"):
        attention.refuse(language_model, "tree")


def test_a_convolution_over_tokens_is_refused() -> None:
    language_model = model("Llama")
    language_model.model.layers[0].mlp.convolution = nn.Conv1d(1, 1, 4)
    with pytest.raises(ConfigError, match="carries a state from token to token"):
        attention.refuse(language_model, "tree")


def test_a_model_whose_attention_cannot_be_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = model("Llama")
    monkeypatch.setattr(type(language_model), "_can_set_attn_implementation", lambda _: False)
    with pytest.raises(ConfigError, match=r"does not take its attention from transformers\.AttentionInterface"):
        attention.refuse(language_model, "tree")


def test_experts_that_take_no_more_than_so_many_tokens_are_refused() -> None:
    language_model = model("Llama")
    language_model.config.expert_capacity = 3
    with pytest.raises(ConfigError, match="has expert_capacity=3, for which samples compete"):
        attention.refuse(language_model, "tree")


# self-test


def in_place_of(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[TokenTree], Attend]) -> None:
    """For every back-end but the reference."""
    monkeypatch.setattr(attention, "back_end", lambda name: back_end("dense") if name == "dense" else wrong)


def masked(mask: Callable[[TokenTree, Tensor, Tensor], Tensor]) -> Callable[[TokenTree], Attend]:
    """Dense attention where ``mask`` says so of tree, query and key."""

    def prepare(tree: TokenTree) -> Attend:
        nodes = torch.arange(len(tree.ends))
        seen = mask(tree, nodes[:, None], nodes[None])

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2)

        return attend

    return prepare


def a_fork(tree: TokenTree) -> Segment:
    """The first below another."""
    return next(segment for segment in tree.segments if segment.parent >= 0)


WRONG = {
    "nothing is masked": masked(lambda tree, query, key: key >= 0),
    "causal, but over other branches": masked(lambda tree, query, key: key <= query),
    "the diagonal is one too high": masked(lambda tree, query, key: (key <= query + 1) & (query < tree.ends[key])),
    "the diagonal is one too low": masked(
        lambda tree, query, key: (key < query) & (query < tree.ends[key]) | (key == query) & (tree.positions[key] == 0)
    ),
    "one node past the end": masked(lambda tree, query, key: (key <= query) & (query <= tree.ends[key])),
    "nothing above a fork": masked(
        lambda tree, query, key: (
            (key <= query) & (query < tree.ends[key]) & ~((key < a_fork(tree).start) & (query >= a_fork(tree).start))
        )
    ),
    "not a number": lambda tree: lambda query, key, value, scale: back_end("dense")(tree)(query, key, value, torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "segments", "dense"])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
def test_what_is_right_passes_the_self_test(name: AttentionName, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    language_model = model("Qwen3", num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=64)
    attention.self_test(language_model, name, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_does_not(monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: torch.dtype) -> None:
    in_place_of(monkeypatch, WRONG[wrong])
    with pytest.raises(ConfigError, match=r"^model\.attention=varlen is wrong on cpu in torch\."):
        attention.self_test(model("Llama"), "varlen", CPU, dtype)


class Wrongly(torch.autograd.Function):
    """What goes through it comes out the same, but its gradient half as large."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, "5e-03"), (torch.bfloat16, "5e-02")])
def test_a_wrong_gradient_is_named(
    monkeypatch: pytest.MonkeyPatch, which: str, dtype: torch.dtype, allowed: str
) -> None:
    def wrong(tree: TokenTree) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            states = {"query": query, "key": key, "value": value}
            states[which] = Wrongly.apply(states[which])  # type: ignore[no-untyped-call]
            return back_end("dense")(tree)(*states.values(), scale)

        return attend

    in_place_of(monkeypatch, wrong)
    with pytest.raises(
        ConfigError,
        match=rf"^model\.attention=auto, which is segments here, is wrong on cpu in {dtype}: "
        rf"its gradient of {which} is off by a factor of \d\.\de-01, where {allowed} is allowed; "
        r"use model\.attention=dense, which is slow, or model\.packing=none$",
    ):
        attention.self_test(model("Llama"), "auto", CPU, dtype)


def test_a_kernel_that_is_missing_is_an_error_of_the_configuration() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.attention=varlen does not run on cpu in torch\.bfloat16: .*; use model"
    ):
        attention.self_test(model("Llama"), "varlen", CPU, torch.bfloat16)


def test_the_self_test_leaves_random_numbers_and_gradients_as_they_were() -> None:
    language_model = model("Llama")
    before = torch.get_rng_state()
    with torch.no_grad():
        attention.self_test(language_model, "segments", CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(each.grad is None for each in language_model.parameters())


def test_the_self_test_takes_no_part_in_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        attention.self_test(model("Llama"), "segments", CPU, torch.float32)


def test_the_small_tree_has_every_kind_of_segment() -> None:
    tree = attention._small_tree()
    assert len(tree.ends) == 481
    assert sum(segment.parent == -1 for segment in tree.segments) == 3
    lengths = {segment.stop - segment.start for segment in tree.segments}
    assert 1 in lengths
    assert max(lengths) > 90
    levels: list[int] = []
    for segment in tree.segments:
        levels.append(levels[segment.parent] + 1 if segment.parent >= 0 else 0)
    assert max(levels) > 10
