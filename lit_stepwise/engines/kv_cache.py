"""The padded key/value cache of the transformers engine, whose rows grow, are copied and trade places."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_stepwise.engines.rows import Array


class KeyValues:
    """The part of a Hugging Face ``Cache`` that a decoder calls: rows of different lengths, written in place."""

    def __init__(self) -> None:
        self._layers: list[list[Tensor]] = []  # keys and values, each [rows, heads, columns, head_dim]
        self._shape = (0, 0)

    def open(self, rows: slice, width: int, inside: Tensor, columns: Tensor) -> None:
        """Choose where ``update`` writes and what it returns: ``width`` columns of ``rows``.

        ``inside`` [n, q] marks the new tokens that are no padding, ``columns`` [inside.sum()] is where they go.
        """
        self._reserve(rows.stop, width)
        self._view = rows, slice(None), slice(width)
        self._inside = inside
        self._place = inside.nonzero()[:, 0] + rows.start, slice(None), columns.to(inside.device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with the new keys and values, [n, heads, q, head_dim]."""
        if layer_idx == len(self._layers):
            self._layers.append([_zeros(states, self._shape) for states in (keys, values)])
        layer = self._layers[layer_idx]
        for states, new in zip(layer, (keys, values), strict=True):
            states[self._place] = new.transpose(1, 2)[self._inside]
        return layer[0][self._view], layer[1][self._view]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked by decoders that were given no positions; ours always are."""
        return 0

    def copy(self, source: int, target: int, width: int) -> None:
        """Copy the first ``width`` columns of a row."""
        self._reserve(target + 1, width)
        for states in (states for layer in self._layers for states in layer):
            states[target, :, :width] = states[source, :, :width]

    def move(self, sources: Array, targets: Array, width: int) -> None:
        """Rearrange rows, as far as ``width`` columns."""
        self._reserve(int(max(sources.max(), targets.max())) + 1, width)
        for states in (states for layer in self._layers for states in layer):
            states[targets, :, :width] = states[sources, :, :width]

    def _reserve(self, rows: int, width: int) -> None:
        old_rows, old_width = self._shape
        if rows <= old_rows and width <= old_width:
            return
        # in larger strides than asked for, so that a growing batch is not copied at every step
        rows = old_rows if rows <= old_rows else max(rows, old_rows * 3 // 2)
        width = old_width if width <= old_width else -(-width // 128) * 128
        self._shape = rows, width
        for index, layer in enumerate(self._layers):
            grown = [_zeros(states, self._shape) for states in layer]
            for states, old in zip(grown, layer, strict=True):
                states[:old_rows, :, :old_width] = old
            self._layers[index] = grown


def _zeros(like: Tensor, shape: tuple[int, int]) -> Tensor:
    return like.new_zeros(shape[0], like.shape[1], shape[1], like.shape[3])
