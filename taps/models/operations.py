"""What a decoder layer does besides linear layers, one object for each way to compute it.

The rest of the engine knows neither device nor kernel: it is given the operations of its model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from taps.models.cache import PagedCache
from taps.models.step import Step

_TABLE = 2048  # positions whose angles are made at once


@dataclass(frozen=True)
class Heads:
    """Shape of a layer's attention."""

    queries: int
    keys: int
    dim: int
    scale: float

    @property
    def width(self) -> int:
        """Of a row of queries, keys and values side by side."""
        return (self.queries + 2 * self.keys) * self.dim


@dataclass(frozen=True)
class HeadNorms:
    """Norms of each head's queries and keys before they are rotated (Qwen3)."""

    query: Tensor  # [d]
    key: Tensor  # [d]
    eps: float


class Norm(NamedTuple):
    """An RMS norm."""

    weight: Tensor  # [H]
    eps: float


class LinearWeights(NamedTuple):
    """A linear layer's, as they were loaded."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class LayerWeights(NamedTuple):
    """A decoder layer's: queries, keys and values side by side, gate and up side by side."""

    input_norm: Norm | None
    mlp_norm: Norm
    qkv: LinearWeights
    out: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    heads: Heads
    head_norms: HeadNorms | None


class Linear(Protocol):
    """A linear layer over rows [n, in]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Layers(Protocol):
    """Decoder layers over rows [n, H], with the pools of a cache."""

    in_kernel: bool  # nothing of them is computed by torch

    def __call__(self, x: Tensor, step: Step, cache: PagedCache, rope: Rope, /) -> Tensor: ...


class Operations(Protocol):
    """Each gives a row the same bits whatever other rows there are."""

    numerics: str  # names all that decides bits

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of rows [n, H]."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: rows [n, 2 I] of gate and up side by side to [n, I]."""
        ...

    def attend(
        self, layer: int, qkv: Tensor, step: Step, cache: PagedCache, heads: Heads, rope: Rope,
        norms: HeadNorms | None,
    ) -> Tensor:  # fmt: skip
        """Rotate, write keys and values to the cache, and attend: [n, heads.width] to [n, queries * d]."""
        ...

    def linear(self, weights: LinearWeights) -> Linear: ...

    def layers(self, weights: Iterable[LayerWeights]) -> Layers:
        """Decoder layers, numbered from 0 in a cache. Each one's weights are taken over before the next's."""
        ...


class Rope:
    """Rotary position embedding as tables, so that a position's angles never depend on who shares a step."""

    def __init__(self, inverse_frequencies: Tensor, scaling: float = 1.0) -> None:
        """Args: inverse_frequencies [rotated / 2]; scaling: of cosine and sine (YaRN)."""
        self._inverse = inverse_frequencies.detach().double().cpu()
        self._scaling = scaling
        self.cos = self.sin = inverse_frequencies.new_empty(0, len(self._inverse), dtype=torch.float32)

    def cover(self, num_positions: int) -> None:
        """Have angles of so many positions: [positions, rotated / 2] float32.

        They are made in tables of one size, so that none depends on when it was asked for.
        """
        while num_positions > len(self.cos):
            positions = torch.arange(len(self.cos), len(self.cos) + _TABLE)
            angles = positions.double()[:, None] * self._inverse
            self.cos = self._with(self.cos, angles.cos())
            self.sin = self._with(self.sin, angles.sin())

    def _with(self, table: Tensor, more: Tensor) -> Tensor:
        return torch.cat([table, (more * self._scaling).float().to(table.device)])
