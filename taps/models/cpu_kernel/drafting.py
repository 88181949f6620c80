"""Whole drafts in one call of the kernel: a draft head as it reads it, and the trees that are asked for.

Knows tensors and their layout; nothing of sessions or why a tree is wanted.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taps.models.cpu_kernel.layers import Linear, PackedLayers, PackedLinear
from taps.models.cpu_kernel.tensors import require


class _DraftHead(ctypes.Structure):
    """`DraftHead` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("embeddings", "vocabulary", "layer", "cos", "sin")),
        *((name, Linear) for name in ("fc", "lm_head")),
        ("rotary", ctypes.c_int32),
    )


class _Asked(ctypes.Structure):
    """`Asked` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "committed", "nodes", "depths", "children", "keys")),
        *((name, ctypes.c_int32) for name in ("trees", "max_blocks")),
        *((name, ctypes.c_int32) for name in ("most_nodes", "most_depth", "most_children")),
    )


class PackedDraftHead:
    """A draft head over one cache."""

    def __init__(
        self,
        embeddings: Tensor,
        vocabulary: Tensor,
        fc: PackedLinear,
        layer: PackedLayers,
        lm_head: PackedLinear,
    ) -> None:
        """Raises ValueError for what does not join.

        Args: embeddings [V, H] bfloat16; vocabulary [D] int32: the tokens that logits are of; fc: 2 H to H;
        layer: one; lm_head: H to D.
        """
        vocab, hidden = embeddings.shape
        require("embeddings", embeddings, torch.bfloat16, (vocab, hidden))
        require("vocabulary", vocabulary, torch.int32, (lm_head.outputs,))
        joins = (fc.inputs, fc.outputs, layer.hidden, lm_head.inputs) == (2 * hidden, hidden, hidden, hidden)
        if not joins or layer.count != 1:
            raise ValueError(
                "a draft head is fc, 2 H to H, one decoder layer, and lm_head, H to the vocabulary"
            )
        if not 0 <= int(vocabulary.min()) <= int(vocabulary.max()) < vocab:
            raise ValueError(f"the vocabulary has tokens that are not below {vocab}")
        self.hidden = hidden
        self._kept = embeddings, vocabulary, fc, layer, lm_head

    def struct(self, cos: Tensor, sin: Tensor) -> _DraftHead:
        """With the angles of all positions, [n, rotary / 2] float32 each."""
        positions, half = cos.shape
        require("cos", cos, torch.float32, (positions, half))
        require("sin", sin, torch.float32, (positions, half))
        embeddings, vocabulary, fc, layer, lm_head = self._kept
        pointers = (embeddings.data_ptr(), vocabulary.data_ptr(), layer.address, cos.data_ptr(), sin.data_ptr())
        return _DraftHead(*pointers, fc.struct, lm_head.struct, 2 * half)


class TreesAsked(NamedTuple):
    """Trees that are asked for, all int32, and where their sequences lie."""

    table: Tensor  # [T, max_blocks] blocks of each in the pools
    committed: Tensor  # [T] positions; nothing is drafted behind them yet
    tokens: Tensor  # [T] at the roots
    nodes: Tensor  # [T] of each tree at most, the root included
    depths: Tensor  # [T] levels below the root's children
    children: Tensor  # [T] of a node at most
    keys: Tensor | None = None  # [levels, 3, T] of each level, as `CpuKernel.find_best` takes them

    @property
    def reach(self) -> int:
        """Positions of the longest sequence with its longest path."""
        return int(self.committed.max()) + int(self.depths.max()) + 1

    def struct(self) -> _Asked:
        """Raises ValueError for tensors of other shapes, and for trees of nothing."""
        trees, max_blocks = self.table.shape
        require("table", self.table, torch.int32, (trees, max_blocks))
        for name in ("committed", "tokens", "nodes", "depths", "children"):
            require(name, getattr(self, name), torch.int32, (trees,))
        if int(self.nodes.min()) < 1 or int(self.depths.min()) < 0 or int(self.children.min()) < 1:
            raise ValueError("a tree has a node, and a node that is extended a child")
        depth = int(self.depths.max())
        if self.keys is not None:
            require("keys", self.keys, torch.int32, (1 + depth, 3, trees))
        tensors = self.table, self.committed, self.nodes, self.depths, self.children, self.keys
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return _Asked(*pointers, trees, max_blocks, int(self.nodes.max()), depth, int(self.children.max()))


class Grown:
    """Where the trees are written: tree t has the first counts[t] of its row, behind them zeros."""

    def __init__(self, trees: int, most_nodes: int) -> None:
        shape = trees, most_nodes
        self.tokens: npt.NDArray[np.int32] = np.zeros(shape, np.int32)
        self.parents: npt.NDArray[np.int32] = np.zeros(shape, np.int32)  # -1 for the root
        self.surprisals: npt.NDArray[np.float64] = np.zeros(shape)  # cumulative, nats
        self.entropies: npt.NDArray[np.float32] = np.zeros(shape, np.float32)  # 0 where no children were asked
        self.counts: npt.NDArray[np.int32] = np.zeros(trees, np.int32)

    @property
    def addresses(self) -> list[int]:
        parts = self.tokens, self.parents, self.surprisals, self.entropies, self.counts
        return [part.ctypes.data for part in parts]
