"""Tree attention inside Hugging Face models: how they call it, which of them may, and whether it is right here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lit_stepwise.algo.tree import build_tree
from lit_stepwise.algo.tree_attention import Attend, AttentionName, back_end, chosen
from lit_stepwise.errors import ConfigError
from lit_stepwise.types import TokenTree

NAME = "lit_stepwise_tree"
"""For ``set_attn_implementation``, after ``register``; the forward pass then takes ``inputs_of`` a tree."""

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative; TF32, which has 10 bits, passes for float32, while a query that sees one key too many is off by 0.1."""
_STEADY_ROPE = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding whose angles are functions of the position alone."""
_NOISE = ("attention_dropout", "attn_pdrop", "dropout", "hidden_dropout", "activation_dropout", "layerdrop",
          "router_jitter_noise")  # fmt: skip
"""Settings of what is drawn at random outside of ``nn.Dropout``."""
_CHANGES = ("attention_mask", "dropout", "sliding_window", "softcap", "s_aux", "position_bias")
"""What a model may hand to its attention that tree attention would pass over."""


def register() -> None:
    """Make tree attention known to transformers as ``NAME``, which without a tree is ``sdpa``. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def inputs_of(tree: TokenTree, name: AttentionName) -> dict[str, Any]:
    """What the forward pass of a model takes to compute the nodes of a tree, with that back-end."""
    return {
        "input_ids": tree.token_ids[None],
        "position_ids": tree.positions[None],
        # transformers takes what has four dimensions for a mask that is ready, and builds none
        "attention_mask": tree.ends[None, None, None],
        "attend": back_end(name)(tree),
    }


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attend: Attend | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    has_tree = attention_mask is not None and attention_mask.dtype == torch.long
    if attend is None and not has_tree:  # somebody generates, or reads logits, with the language model itself
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)[0]
        return out, None
    changes = {"attention_mask": None if has_tree else attention_mask, "dropout": dropout or None, **others}
    extra = [name for name in _CHANGES if changes.get(name) is not None]
    if extra or attend is None:
        raise ConfigError(
            f"model.packing=tree or trajectory cannot train a model whose {type(module).__name__} "
            f"{f'adds {extra[0]}' if extra else 'is not handed the tree'}; use model.packing=none"
        )
    kind = query.device.type
    # what autocast does to attention of torch's own: rotary embeddings have made float32 of queries and keys
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), scale), None


def refuse(model: Any, packing: str, setting: str = "model.packing") -> None:
    """Raises ``ConfigError`` where a Hugging Face ``model`` would not compute a tree as it computes sequences apart."""
    if packing == "none":
        return
    for reason in _reasons(model):
        raise ConfigError(
            f"{setting}={packing} cannot train a model of type {model.config.model_type}, which {reason}; use "
            f"{setting}=none, which lays samples out as padded rows with the model's own attention"
        )


def _reasons(model: Any) -> Iterator[str]:
    """What stands against it, the plainest first."""
    config = model.config.get_text_config(decoder=True)
    if layer_types := {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        yield f"has layers of type {', '.join(sorted(layer_types))}"
    if model._is_stateful or any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in model.modules()):
        yield "carries a state from token to token"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        yield "lets tokens see later ones"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        yield "takes no position_ids"
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        yield "does not take its attention from transformers.AttentionInterface"
    window = getattr(config, "sliding_window", None)
    if window and not getattr(config, "layer_types", None):  # these say where it is used, if any
        yield f"has sliding_window={window}"
    if any("sink" in name.rpartition(".")[2] for name, _ in model.named_parameters()):
        yield "has attention sinks"
    if getattr(config, "attn_logit_softcapping", None):
        yield f"has attn_logit_softcapping={config.attn_logit_softcapping}"
    size_of_key = getattr(config, "qk_head_dim", None)
    if size_of_key and size_of_key != config.v_head_dim:
        yield f"has keys of {size_of_key} numbers but values of {config.v_head_dim}"
    if unsteady := _rope_types(config) - _STEADY_ROPE:
        yield f"has rotary embeddings of type {', '.join(sorted(unsteady))}, whose angles change with the length"
    if noise := [*_noise(model, config)]:
        yield f"has {noise[0]}: one draw would serve all samples that share a token"
    if getattr(config, "expert_capacity", None):
        yield f"has expert_capacity={config.expert_capacity}, for which samples compete"


def _rope_types(config: Any) -> set[str]:
    """Of all layers; where these differ, there is a dictionary per type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {parameters["rope_type"] for parameters in each if "rope_type" in parameters}


def _noise(model: nn.Module, config: Any) -> Iterator[str]:
    for name in _NOISE:
        if getattr(config, name, None):
            yield f"{name}={getattr(config, name)}"
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            yield f"a dropout of {module.p} at {name}"


def self_test(model: Any, name: AttentionName, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a back-end with ``dense`` in float32 on a small tree, with heads like those of ``model``.

    Raises:
        ConfigError: where its output or a gradient is wrong, or it does not run at all.
    """
    used = chosen(name, device, dtype)
    if used == "dense":
        return
    where = f"model.attention={name}" + ("" if used == name else f", which is {used} here,")
    way_out = "use model.attention=dense, which is slow, or model.packing=none"
    tree = _small_tree().to(device)
    states = [each.to(device, dtype) for each in _states(model, len(tree.ends))]
    try:
        found = _out_and_gradients(back_end(name)(tree), *states)
    except Exception as error:  # whatever a kernel raises, it cannot be used here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{where} does not run on {device} in {dtype}: {reason}; {way_out}") from error
    wide = torch.promote_types(dtype, torch.float32)
    expected = _out_and_gradients(back_end("dense")(tree), *(each.to(wide) for each in states))
    for of, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        factor = _worst_error(one.to(wide), other)
        if not factor <= _TOLERANCES[dtype]:
            raise ConfigError(
                f"{where} is wrong on {device} in {dtype}: its {'gradient of ' * (of != 'output')}{of} is off by a "
                f"factor of {factor:.1e}, where {_TOLERANCES[dtype]:.0e} is allowed; {way_out}"
            )


def _small_tree() -> TokenTree:
    """481 nodes: three roots, forks at every depth and forks below forks, chains of a single token to 300."""
    trunk, branch = range(300), range(1000, 1100)
    sequences = [
        trunk,
        *([*trunk[:depth], 2000] for depth in (1, 2, 3, 50, 150, 299)),
        [*trunk[:200], *branch],
        *([*trunk[:200], *branch[:depth], *range(3000, 3005)] for depth in range(1, 60, 7)),
        range(4000, 4029),
        [5000],
    ]
    return build_tree([np.array(each, np.int32) for each in sequences], [0] * len(sequences))[0]


def _states(model: Any, num_nodes: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output, laid out as a model does; leaves the global generator alone."""
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    sizes = (getattr(config, name, None) for name in ("qk_head_dim", "head_dim"))
    size = next(filter(None, sizes), config.hidden_size // num_heads)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, num_nodes, heads, size, generator=generator, dtype=torch.float32)
        for heads in (num_heads, num_key_heads, num_key_heads, num_heads)
    )
    return [*(each.transpose(1, 2) for each in (query, key, value)), grad]


def _out_and_gradients(attend: Attend, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        inputs = [each.detach().requires_grad_() for each in (query, key, value)]
        out = attend(inputs[0], inputs[1], inputs[2], query.shape[-1] ** -0.5)
        gradients = torch.autograd.grad(out, inputs, grad)
    return [out.detach(), *gradients]


def _worst_error(found: Tensor, expected: Tensor) -> float:
    """Of any node and head, relative to its own size and what is usual."""
    errors, sizes = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    return float((errors / (sizes + sizes.square().mean().sqrt())).max())
