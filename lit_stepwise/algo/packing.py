"""Step samples to a micro-batch: what they share becomes one path of a tree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import compress
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_stepwise.algo.tree import Ids, Nodes, build_tree
from lit_stepwise.types import MicroBatch, StepSample

Packing = Literal["tree", "trajectory", "none"]
"""Which step samples share what they have in common: all of a micro-batch, those of one trajectory, or none."""


def collate(samples: Sequence[StepSample], weights: Sequence[float], packing: Packing = "tree") -> MicroBatch:
    """Lay samples into a tree. No samples give one node without targets, so that a rank with nothing to do keeps step.

    Args:
        samples: their sampled tokens alone are targets.
        weights: of the loss of every sampled token of each sample, see ``token_weights``.
        packing: which samples share nodes.
    """
    sequences = [tokens_of(sample) for sample in samples] or [np.zeros(1, np.int32)]
    tree, paths, parents = build_tree(sequences, forests_of(samples, packing) or [None])
    sampled = [_sampled_nodes(sample, path) for sample, path in zip(samples, paths, strict=False)]
    nodes, first, targets = np.unique(_joined(sampled), return_index=True, return_inverse=True)
    counts = [len(each) for each in sampled]
    temperatures = np.repeat([sample.temperature for sample in samples], counts)
    return MicroBatch(
        tree=tree,
        sources=torch.from_numpy(parents[nodes]),
        labels=tree.token_ids[torch.from_numpy(nodes)],
        temperatures=_floats(temperatures[first]),
        targets=torch.from_numpy(targets),
        turns=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        rollout_logprobs=_of_sampled(samples, [sample.rollout_logprobs for sample in samples]),
        old_logprobs=_of_sampled(samples, [sample.old_logprobs or sample.rollout_logprobs for sample in samples]),
        advantages=_of_sampled(samples, [sample.advantages for sample in samples]),
        weights=_floats(np.repeat(weights, counts)),
        lengths=[sample.num_tokens for sample in samples],
    )


def tokens_of(sample: StepSample) -> Ids:
    """[P + R] Prompt and response."""
    return np.array([*sample.prompt_ids, *sample.response_ids], np.int32)


def forests_of(samples: Sequence[StepSample], packing: Packing) -> list[Hashable]:
    """Samples of different forests share nothing. Nor do those of different temperatures: theirs are other targets."""
    match packing:
        case "tree":
            return [sample.temperature for sample in samples]
        case "trajectory":
            return [(sample.group, sample.sample) for sample in samples]
        case "none":
            return list(range(len(samples)))


def _sampled_nodes(sample: StepSample, path: Nodes) -> Nodes:
    nodes: Nodes = path[len(sample.prompt_ids) :][np.array(sample.response_mask, bool)]
    return nodes


def _joined(nodes: Sequence[Nodes]) -> Nodes:
    return np.concatenate([*nodes, np.empty(0, np.int64)])


def _of_sampled(samples: Sequence[StepSample], values: Sequence[Sequence[float]]) -> Tensor:
    """[N] Of [R] ``values`` per sample those of the sampled tokens."""
    pairs = zip(samples, values, strict=True)
    return _floats([value for sample, row in pairs for value in compress(row, sample.response_mask)])


def _floats(values: Sequence[float] | npt.NDArray[np.float64]) -> Tensor:
    # a Trainer of precision bf16-true makes bfloat16 the default type, which holds no logprob
    return torch.tensor(values, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
