"""Decoder layers composed of single operations: whatever these are computed by.

Knows operations and weights; nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from taps.models.cache import PagedCache
from taps.models.operations import LayerWeights, Norm, Operations, Rope
from taps.models.step import Step


class ComposedLayers:
    """Implements `taps.models.operations.Layers`."""

    in_kernel = False

    def __init__(self, operations: Operations, weights: Iterable[LayerWeights]) -> None:
        self._layers = [_Layer(operations, index, layer) for index, layer in enumerate(weights)]

    def __call__(self, x: Tensor, step: Step, cache: PagedCache, rope: Rope) -> Tensor:
        for layer in self._layers:
            x = layer(x, step, cache, rope)
        return x


class _Layer:
    def __init__(self, operations: Operations, index: int, weights: LayerWeights) -> None:
        self._operations = operations
        self._index = index
        self._norms = weights.input_norm, weights.mlp_norm
        self._qkv, self._out, self._gate_up, self._down = (
            operations.linear(linear) for linear in (weights.qkv, weights.out, weights.gate_up, weights.down)
        )
        self._heads, self._head_norms = weights.heads, weights.head_norms

    def __call__(self, x: Tensor, step: Step, cache: PagedCache, rope: Rope) -> Tensor:
        operations, (input_norm, mlp_norm) = self._operations, self._norms
        qkv = self._qkv(self._normed(x, input_norm))
        attended = operations.attend(self._index, qkv, step, cache, self._heads, rope, self._head_norms)
        x = x + self._out(attended)
        return x + self._down(operations.gate(self._gate_up(self._normed(x, mlp_norm))))

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else self._operations.norm(x, *norm)
