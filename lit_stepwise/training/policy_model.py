"""A causal language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.logprobs import entropy, token_logprobs
from lit_stepwise.algo.packing import Packing
from lit_stepwise.algo.tree_attention import AttentionName
from lit_stepwise.errors import ConfigError
from lit_stepwise.training import attention as tree_attention
from lit_stepwise.types import MicroBatch, TokenTree

_ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings of what some models do to their logits."""


class PolicyModel(nn.Module):
    """Wraps a Hugging Face model. The head runs inside ``forward``, which is where sharded weights are whole.

    Args:
        language_model: a causal language model.
        chunk_tokens: targets whose logits exist at a time.
        packing: none lays step samples out as padded rows, with the model's own attention; else they are one tree.
        attention: what computes attention over a tree.
    """

    def __init__(
        self,
        language_model: Any,
        chunk_tokens: int = 1024,
        packing: Packing = "tree",
        attention: AttentionName = "auto",
    ) -> None:
        super().__init__()
        _refuse_head(language_model)
        if packing != "none":
            tree_attention.refuse(language_model, packing)
            tree_attention.register()
            language_model.set_attn_implementation(tree_attention.NAME)
        self.language_model = language_model
        self.chunk_tokens = chunk_tokens
        self.packing = packing
        self.attention: AttentionName = attention
        self.flops = Flops.of(language_model)
        self.num_tokens: int = len(language_model.get_output_embeddings().weight)
        """Rows of the output embedding."""

    @classmethod
    def load(
        cls,
        path: str,
        chunk_tokens: int = 1024,
        packing: Packing = "tree",
        attention: AttentionName = "auto",
        setting: str = "model.model_path",
        empty_on: str | None = None,
    ) -> PolicyModel:
        """Read the weights as float32, in training mode. Raises ``ConfigError``, naming ``setting``, if that fails.

        ``empty_on`` names a device on which to make the model without them.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds of import that others need not pay

        form: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        missing: Collection[str] = ()
        try:
            if empty_on is not None:
                with torch.device(empty_on):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **form)
            else:
                model, found = AutoModelForCausalLM.from_pretrained(path, **form, output_loading_info=True)
                missing = found["missing_keys"]
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{setting}={path!r} cannot be loaded{_hint(Path(path))}: {reason}") from error
        if missing:
            raise ConfigError(
                f"{setting}={path!r} lacks {len(missing)} tensors of the model, such as {min(missing)}, which would be "
                "random; fetch the folder again, or give one that is whole"
            )
        return cls(model.train(), chunk_tokens, packing, attention)

    @property
    def layers(self) -> list[nn.Module]:
        """Those that transformers never splits over devices: the decoder's."""
        names = {*(self.language_model._no_split_modules or ())}
        return [module for module in self.language_model.modules() if type(module).__name__ in names]

    def checkpoint_activations(self) -> None:
        """From now on keep what goes into each layer alone, and compute the rest again for the backward pass."""
        if not self.language_model.supports_gradient_checkpointing:
            kind = self.language_model.config.model_type
            raise ConfigError(
                f"model.activation_checkpointing=true is nothing that models of type {kind} can do; use false"
            )
        self.language_model.gradient_checkpointing_enable({"use_reentrant": False})

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """As engines compute, and whoever recomputes what they did."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def test_attention(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Raises ``ConfigError`` where attention over a tree is wrong on ``device``.

        ``dtype`` is what the model computes in; None: what its weights are, or autocast makes of them.
        """
        if self.packing != "none":
            autocast = torch.is_autocast_enabled(device.type)
            of_now = torch.get_autocast_dtype(device.type) if autocast else self.language_model.dtype
            dtype = of_now if dtype is None else dtype
            tree_attention.self_test(self.language_model, self.attention, device, dtype)

    def check_positions(self) -> None:
        """Raises ``ConfigError`` where the tables of rotary embeddings are not float32, and positions so not exact."""
        for name, buffer in self.language_model.named_buffers():
            if name.endswith("inv_freq") and buffer.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"the table {name} of rotary embeddings is {buffer.dtype}, in which distant positions are wrong; "
                    "use trainer.precision=32-true, with trainer.strategy=fsdp2 where bfloat16 is wanted"
                )

    def forward(
        self,
        batch: MicroBatch,
        entropy_gradient: bool = False,
        summary: Callable[[Tensor], Tensor] = entropy,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every sampled token.

        Args:
            batch: of N sampled tokens.
            entropy_gradient: the entropies carry a gradient, too.
            summary: what to say of the distribution of each token in place of its entropy, as in ``token_logprobs``.

        Returns:
            logprobs [N] with gradient, entropies [N] without unless asked for.
        """
        hidden = self._of_rows(batch.tree) if self.packing == "none" else self._of_nodes(batch.tree)
        head = self.language_model.get_output_embeddings().weight
        logprobs, said = token_logprobs(
            hidden[batch.sources], head, batch.labels, batch.temperatures, self.chunk_tokens, entropy_gradient, summary
        )
        return logprobs[batch.targets], said[batch.targets]

    def num_forwarded(self, tree: TokenTree) -> int:
        """Tokens that ``forward`` computes, padding included."""
        lengths = _lengths(tree)
        return len(lengths) * max(lengths) if self.packing == "none" else sum(lengths)

    def _of_nodes(self, tree: TokenTree) -> Tensor:
        """[T, H] The hidden state of every node."""
        return self._last_hidden_state(**tree_attention.inputs_of(tree, self.attention))[0]

    def _of_rows(self, tree: TokenTree) -> Tensor:
        """The same of a tree without forks, each root a row; causality keeps the padding on the right out of it."""
        lengths = _lengths(tree)
        rows = list(torch.split(tree.token_ids, lengths))
        hidden = self._last_hidden_state(input_ids=pad_sequence(rows, batch_first=True))
        return torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])

    def _last_hidden_state(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.language_model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden


def _hint(path: Path) -> str:
    """What a person may see for himself."""
    if not path.exists():
        return "; the folder does not exist"
    return "" if (path / "config.json").exists() else "; it has no config.json, so it is no Hugging Face model"


def _refuse_head(language_model: Any) -> None:
    """Logits have to be the product of the last hidden state and the output embedding, and nothing else."""
    config = language_model.config.get_text_config(decoder=True)
    extras = {name: getattr(config, name, None) for name in _ON_LOGITS}
    found = [f"{name}={value}" for name, value in extras.items() if value not in (None, 1, 1.0)]
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias of its output embedding")
    if found:
        raise ConfigError(
            f"model.model_path={language_model.name_or_path!r} has {found[0]}, which the chunked head would leave out; "
            "use a model whose logits are its hidden states times the output embedding"
        )


def _lengths(tree: TokenTree) -> list[int]:
    return [segment.stop - segment.start for segment in tree.segments]
