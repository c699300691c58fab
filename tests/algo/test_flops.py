"""Counted operations against those that PyTorch sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_stepwise.algo.flops import Flops, pairs_of

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTH, NUM_TARGETS = 11, 4


def of_kind(kind: str, **settings: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    config._attn_implementation = "eager"  # matrix products that the counter knows, and all pairs of them
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seen_by_pytorch(model: Any) -> int:
    """Of ``LENGTH`` tokens and the head on the last ``NUM_TARGETS``, but for the angles of the rotary embedding."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(LENGTH)[None], logits_to_keep=NUM_TARGETS, use_cache=False)
    flops = counter.get_flop_counts()
    return sum(flops["Global"].values()) - sum(sum(v.values()) for k, v in flops.items() if k.endswith("rotary_emb"))


MODELS = {
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3, tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1}),
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "head_dim": 8,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2 moe": (
        "Qwen2Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "glm4 moe": (
        "Glm4Moe",
        {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
    ),
    "dots1": (
        "Dots1",
        {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_costs_is_what_pytorch_counts(name: str) -> None:
    kind, settings = MODELS[name]
    model = of_kind(kind, **settings)
    assert Flops.of(model)(LENGTH, LENGTH * LENGTH, NUM_TARGETS) == pytest.approx(seen_by_pytorch(model), rel=1e-12)


def test_an_adapter_is_counted_with_the_layers_that_it_stands_beside() -> None:
    peft = pytest.importorskip("peft")
    model = of_kind("Qwen3", head_dim=8)
    bare = Flops.of(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), model, "default")
    adapted = Flops.of(model)
    # q_proj is 24 x 48, down_proj 40 x 24, in 3 layers; A and B are 3 x inputs and outputs x 3
    assert adapted.per_token - bare.per_token == 2 * 3 * (3 * (24 + 48) + 3 * (40 + 24))
    assert (adapted.per_pair, adapted.per_target) == (bare.per_pair, bare.per_target)
    assert adapted(LENGTH, LENGTH * LENGTH, NUM_TARGETS) == seen_by_pytorch(model)


def test_each_number_is_what_its_name_says() -> None:
    flops = Flops.of(of_kind("Llama", num_hidden_layers=1))
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24  # queries, keys and values of 2 heads of 4, output
    assert flops == Flops(per_token=2 * (attention + 3 * 24 * 40), per_pair=4 * 6 * 4, per_target=2 * 24 * 37)


def test_costs_add_up() -> None:
    assert Flops(per_token=100.0, per_pair=10.0, per_target=1.0)(3, 5, 7) == 357


def test_each_token_sees_itself_and_all_before_it() -> None:
    assert [pairs_of(length) for length in (0, 1, 2, 5)] == [0, 1, 3, 15]
