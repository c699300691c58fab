"""Which language models answer with log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.policy_model import PolicyModel

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def language_model(kind: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None}, "final_logit_softcapping=30.0"),
        ("Cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ],
)
@pytest.mark.parametrize("packing", ["tree", "none"])
def test_what_happens_to_logits_after_the_head_is_not_left_out(
    kind: str, settings: dict[str, Any], found: str, packing: Any
) -> None:
    with pytest.raises(ConfigError, match=f"has {found}, which the chunked head would leave out"):
        PolicyModel(language_model(kind, **settings), packing=packing)


def test_a_bias_of_the_head_is_not_left_out() -> None:
    model = language_model("Qwen3")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(20))
    with pytest.raises(ConfigError, match="has a bias of its output embedding"):
        PolicyModel(model)


def test_a_scale_of_one_changes_nothing() -> None:
    PolicyModel(language_model("Granite", logits_scaling=1.0))
