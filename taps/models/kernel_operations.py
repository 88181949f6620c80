"""A decoder layer's operations through the CPU kernel, or through torch where it cannot be had.

Knows the kernel's calls and what they are given; nothing of models.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from itertools import chain
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from taps.models.cache import PagedCache
from taps.models.cpu_kernel.build import KernelUnavailable
from taps.models.cpu_kernel.drafting import Grown, PackedDraftHead, TreesAsked
from taps.models.cpu_kernel.kernel import CpuKernel, cpu_kernel
from taps.models.cpu_kernel.layers import PackedLayer, PackedLayers
from taps.models.cpu_kernel.paged import MAX_HEAD_DIM, AttentionLayer, AttentionStep
from taps.models.layers import ComposedLayers
from taps.models.linear import RowLinear
from taps.models.operations import (
    HeadNorms,
    Heads,
    Layers,
    LayerWeights,
    Linear,
    LinearWeights,
    Operations,
    Rope,
)
from taps.models.reference import ReferenceOperations
from taps.models.step import Step
from taps.sampling import Race

_HEAD_STEP = 16
logger = logging.getLogger(__name__)


class Best(Protocol):
    """As `CpuKernel.find_best`."""

    def __call__(
        self, logits: Tensor, k: int, noise: tuple[Tensor, Tensor] | None = None, /
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class KernelOperations:
    """Implements `taps.models.operations.Operations`."""

    def __init__(self, kernel: CpuKernel, dtype: torch.dtype) -> None:
        self.numerics = f"{kernel.numerics} torch {torch.__version__} {str(dtype).removeprefix('torch.')}"
        self._kernel = kernel
        self._layers: WeakKeyDictionary[PagedCache, dict[int, AttentionLayer]] = WeakKeyDictionary()
        self._step: tuple[Step, AttentionStep] | None = None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        self._kernel.rms_norm(x, weight, out, eps)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._kernel.swiglu(gate_up, out)
        return out

    def attend(
        self, layer: int, qkv: Tensor, step: Step, cache: PagedCache, heads: Heads, rope: Rope,
        norms: HeadNorms | None,
    ) -> Tensor:  # fmt: skip
        out = qkv.new_empty(len(qkv), heads.queries * heads.dim)
        described = self.layer(layer, qkv, cache, heads, norms)
        self._kernel.attend(described, self.described(step, rope), qkv, out)
        return out

    def linear(self, weights: LinearWeights) -> Linear:
        return (
            KernelLinear(self._kernel, weights) if self._kernel.packs(weights.weight) else RowLinear(*weights)
        )

    def layers(self, weights: Iterable[LayerWeights]) -> Layers:
        first = next(them := iter(weights))
        every = chain([first], them)
        if all(
            self._kernel.packs(linear.weight) for linear in (first.qkv, first.out, first.gate_up, first.down)
        ):
            return KernelLayers(self, self._kernel, every)
        return ComposedLayers(self, every)

    def layer(
        self, layer: int, like: Tensor, cache: PagedCache, heads: Heads, norms: HeadNorms | None
    ) -> AttentionLayer:
        """Made once for each cache. Args: like: a tensor looked at for its type."""
        known = self._layers.setdefault(cache, {})
        if layer not in known:
            keys, values = cache.layer(layer, like, heads.keys, heads.dim, heads.dim)
            known[layer] = (
                AttentionLayer(keys, values, heads.queries, heads.scale)
                if norms is None
                else AttentionLayer(keys, values, heads.queries, heads.scale, norms.query, norms.key, norms.eps)
            )
        return known[layer]

    def described(self, step: Step, rope: Rope) -> AttentionStep:
        """Made once for all layers of a step."""
        if self._step is None or self._step[0] is not step:
            of = step.on(rope.cos.device)
            self._step = step, AttentionStep(
                of.table, of.committed, of.drafted, of.starts, of.path_ends, of.path_offsets, of.is_chain,
                rope.cos[of.positions], rope.sin[of.positions],
            )  # fmt: skip
        return self._step[1]


class KernelLinear:
    """Implements `taps.models.operations.Linear`."""

    def __init__(self, kernel: CpuKernel, weights: LinearWeights) -> None:
        self.kernel = kernel
        self.packed = kernel.pack(*weights)

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), self.packed.outputs)
        self.kernel.linear(x, self.packed, out)
        return out


class KernelLayers:
    """Implements `taps.models.operations.Layers`: all of them in one call."""

    in_kernel = True

    def __init__(
        self, operations: KernelOperations, kernel: CpuKernel, weights: Iterable[LayerWeights]
    ) -> None:
        self._operations = operations
        self._kernel = kernel
        self._heads: list[tuple[Heads, HeadNorms | None]] = []
        self._packed: list[PackedLayer] = []
        for layer in weights:
            linears = (kernel.pack(*linear) for linear in (layer.qkv, layer.out, layer.gate_up, layer.down))
            self._packed.append(PackedLayer(layer.input_norm, layer.mlp_norm, *linears))
            self._heads.append((layer.heads, layer.head_norms))
        self._with_cache: WeakKeyDictionary[PagedCache, PackedLayers] = WeakKeyDictionary()

    def __call__(self, x: Tensor, step: Step, cache: PagedCache, rope: Rope) -> Tensor:
        """x is overwritten."""
        self._kernel.layers(self.over(cache, x), self._operations.described(step, rope), x)
        return x

    def over(self, cache: PagedCache, like: Tensor) -> PackedLayers:
        """Made once for each cache. Args: like: a tensor looked at for its type."""
        if cache not in self._with_cache:
            attentions = [
                self._operations.layer(index, like, cache, *heads) for index, heads in enumerate(self._heads)
            ]
            self._with_cache[cache] = PackedLayers(self._packed, attentions)
        return self._with_cache[cache]


class KernelDrafts:
    """A draft head that is the kernel's from one end to the other: it grows whole trees in one call."""

    def __init__(
        self, embeddings: Tensor, vocabulary: Tensor,
        fc: KernelLinear, layers: KernelLayers, lm_head: KernelLinear,
    ) -> None:  # fmt: skip
        """Args: as `PackedDraftHead`."""
        self._embeddings, self._vocabulary = embeddings.contiguous(), vocabulary.int().contiguous()
        self._fc, self._layers, self._lm_head = fc, layers, lm_head
        self._with_cache: WeakKeyDictionary[PagedCache, PackedDraftHead] = WeakKeyDictionary()

    def __call__(self, asked: TreesAsked, roots: Tensor, cache: PagedCache, rope: Rope) -> Grown:
        """Args: roots [T, H]: predicted features; rope: that covers what the trees reach."""
        if cache not in self._with_cache:
            layer = self._layers.over(cache, roots)
            self._with_cache[cache] = PackedDraftHead(
                self._embeddings, self._vocabulary, self._fc.packed, layer, self._lm_head.packed
            )
        return self._fc.kernel.grow(self._with_cache[cache], asked, roots, rope.cos, rope.sin)


def kernel_drafts(
    embeddings: Tensor, vocabulary: Tensor, fc: Linear, layers: Layers, lm_head: Linear
) -> KernelDrafts | None:
    """None where a part of the head is not the kernel's."""
    if not (isinstance(fc, KernelLinear) and isinstance(lm_head, KernelLinear)):
        return None
    if not isinstance(layers, KernelLayers) or embeddings.dtype is not torch.bfloat16:
        return None
    return KernelDrafts(embeddings, vocabulary, fc, layers, lm_head)


def cpu_operations(dtype: torch.dtype, head_dim: int) -> Operations:
    """The kernel's where it is to be had and computes heads of this size, else torch's."""
    kernel = _kernel()
    if kernel is None or head_dim % _HEAD_STEP or head_dim > MAX_HEAD_DIM:
        return ReferenceOperations(dtype)
    return KernelOperations(kernel, dtype)


def cpu_race() -> Race | None:
    """The kernel's way to decide rows of logits; None where there is no kernel."""
    kernel = _kernel()
    return None if kernel is None else kernel.decide


def cpu_best() -> Best | None:
    """The kernel's way to find a draft's candidates and the likeliest tokens; None where there is no kernel."""
    kernel = _kernel()
    return None if kernel is None else kernel.find_best


def describe_kernel() -> str:
    """Build the kernel where it was not built yet; what there is, in words."""
    kernel = _kernel()
    return "no CPU kernel: torch computes attention" if kernel is None else f"CPU kernel: {kernel.numerics}"


@functools.cache
def _kernel() -> CpuKernel | None:
    try:
        return cpu_kernel()
    except KernelUnavailable as error:
        logger.warning("attention runs in torch alone, several times slower a step: %s", error)
        return None
