"""The model card: what the weights come from, how they were trained, what was measured, and how to load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from lit_stepwise.export.base import Base
from lit_stepwise.export.run import Measured

METRICS = {
    "val/accuracy": "fraction of validation tasks solved",
    "val/reward": "mean reward of a validation trajectory",
    "rollout/accuracy": "fraction of training trajectories that solved their task",
    "rollout/reward": "mean reward of a training trajectory",
}
"""Those that a card tells, and what they are."""
_SECTIONS = ("seed_everything", "model", "data", "rollout")


@dataclass(frozen=True)
class Provenance:
    """How the weights came to be."""

    step: int
    """Optimizer steps."""
    metrics: Measured
    config: Mapping[str, Any]
    """The run's, or nothing where it has none."""

    @property
    def steps(self) -> str:
        """For people."""
        return f"{self.step} optimizer step{'s' * (self.step != 1)}"


def model_card(name: str, base: Base, adapter_rank: int, dtype: str, provenance: Provenance) -> str:
    """The text of README.md for the folder ``name``; with an ``adapter_rank`` above 0 it holds an adapter alone."""
    what = f"A low-rank adapter (rank {adapter_rank}) for" if adapter_rank else "Weights of"
    parts = [
        f"---\n{yaml.safe_dump(_head(base, adapter_rank), sort_keys=False)}---\n# {name}",
        f"{what} `{base.name}` after {provenance.steps} of step-wise, multi-turn reinforcement learning with "
        f"lit-stepwise {version('lit-stepwise')}, in {dtype}.",
        _measured(provenance.metrics),
        _use(name, base, adapter_rank),
        _training(provenance.config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(base: Base, adapter_rank: int) -> dict[str, Any]:
    # the Hub refuses a card whose base model is the path of a folder
    origin = {} if base.is_local else {"base_model": base.name}
    return {
        **base.licence,
        **origin,
        "library_name": "peft" if adapter_rank else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "lit-stepwise"],
    }


def _measured(metrics: Measured) -> str:
    rows = [f"| `{name}` | {METRICS[name]} | {value:.4g} | {step} |" for name, (value, step) in metrics.items()]
    head = ["## Measured", "", "| metric | is | last value | logged at step |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _use(name: str, base: Base, adapter_rank: int) -> str:
    if adapter_rank:
        sizes = f"--max-lora-rank {max(8, 1 << (adapter_rank - 1).bit_length())}"
        load = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        ]
        serve = f"vllm serve {base.name} --enable-lora {sizes} --lora-modules {name}={name}"
    else:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
        serve = f"vllm serve {name}"
    load.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")  # with the chat template')
    return "\n".join(["## Use", "", "```python", *load, "```", "", "or", "", f"    {serve}"])


def _training(config: Mapping[str, Any]) -> str:
    """The sections that say what was learnt from what; not the machine, nor where servers are."""
    told = {section: config[section] for section in _SECTIONS if section in config}
    if "rollout" in told:
        told["rollout"] = {key: value for key, value in told["rollout"].items() if key != "engine"}
    return f"## Training\n\n```yaml\n{yaml.safe_dump(told, sort_keys=False)}```" if told else ""
