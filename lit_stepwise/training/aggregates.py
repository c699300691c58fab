"""Metrics by name, with torchmetrics, so that ranks are added up before anything is divided."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_stepwise.training.scoring import from_all_ranks


class Aggregates(nn.Module):
    """Metrics of one kind. Those named at the start are always in the result, others once something was said of them.

    Args:
        kind: a class of torchmetrics that aggregates numbers.
        names: of those that are always there.
    """

    def __init__(self, kind: type[Metric], *names: str) -> None:
        super().__init__()
        self.kind = kind
        self.fixed = frozenset(names)
        self._anchor: Tensor
        self.metrics = nn.ModuleList()  # no ModuleDict: it refuses names such as "type" or "a.b"
        self._places: dict[str, int] = {}
        # knows on which device the metrics are, before there is one
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        for name in names:
            self._metric(name)

    def update(self, name: str, *values: Any) -> None:
        """Take in numbers, or tensors of numbers; what they are is said by the ``kind``."""
        there = self._anchor.device
        self._metric(name).update(*(each.to(there) if isinstance(each, Tensor) else each for each in values))

    def result(self, prefix: str = "") -> dict[str, float]:
        """``<prefix><name>`` over all ranks, then start afresh. All ranks call it together.

        A mean or a maximum of nothing is left out, unless its name was given at the start.
        """
        values = {}
        # a name may have come up on one rank alone, and then the others have to take part in its sum
        for name in dict.fromkeys(name for names in from_all_ranks(list(self._places)) for name in names):
            metric = self._metric(name)
            if not metric.update_called:
                metric.update(torch.empty(0, device=self._anchor.device))
            value = float(metric.compute())
            if name in self.fixed or not (math.isnan(value) or value == -math.inf):
                values[f"{prefix}{name}"] = value
            metric.reset()
        return values

    def _metric(self, name: str) -> Metric:
        """That of this name, made when it is first seen."""
        if name not in self._places:
            self._places[name] = len(self.metrics)
            # a Trainer of precision bf16-true makes bfloat16 the default type, which is too coarse for sums
            self.metrics.append(self.kind().set_dtype(torch.float32).to(self._anchor.device))
        metric = self.metrics[self._places[name]]
        assert isinstance(metric, Metric)
        return metric
