"""A paged pool for tests of attention: sequences are extended by rows; an exact causal reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taps.models.cpu_kernel.kernel import CpuKernel
from taps.models.cpu_kernel.paged import BLOCK, AttentionLayer, AttentionStep

_MAX_POSITIONS = 2048
_EPS = 1e-6
# Half a unit in the last place of a result, relative to it.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Item:
    """Rows of one session in a step. `parents` are offsets in the region, -1 the prefix; None is a chain."""

    blocks: Sequence[int]
    committed: int
    rows: Tensor  # [n, (heads + 2 * kv_heads) * d]
    parents: Sequence[int] | None = None  # of all region rows, also those of earlier steps
    region: int = 0

    def paths(self) -> list[list[int]]:
        """The path of each new row: offsets in the region, itself last."""
        end = self.region + len(self.rows)
        parents = range(-1, end - 1) if self.parents is None else self.parents
        paths: list[list[int]] = []
        for node, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        return paths[self.region : end]


class PagedPool:
    """One layer's pools, full of NaN at first: a place that nobody wrote shows in whatever it touches."""

    def __init__(
        self,
        kernel: CpuKernel,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        blocks: int = 32,
        rotary: int | None = None,
        norms: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.kernel = kernel
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.keys = torch.full((blocks, kv_heads, head_dim, BLOCK), torch.nan, dtype=dtype)
        self.values = torch.full((blocks, kv_heads, BLOCK, head_dim), torch.nan, dtype=dtype)
        self.norms = norms
        q_norm, k_norm = norms or (None, None)
        self.layer = AttentionLayer(self.keys, self.values, heads, q_norm=q_norm, k_norm=k_norm, eps=_EPS)
        self.rotary = head_dim if rotary is None else rotary
        turns = 1e4 ** (-torch.arange(self.rotary // 2).double() / (head_dim / 2))
        angles = torch.arange(_MAX_POSITIONS)[:, None] * turns
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def rows(self, count: int, seed: int = 0) -> Tensor:
        """[count, width] of random queries, keys and values."""
        generator = torch.Generator().manual_seed(seed)
        return (1.5 * torch.randn(count, self.layer.qkv_width, generator=generator)).to(self.dtype)

    def extend(self, *items: Item, explicit: bool = False) -> Tensor:
        """[R, heads * d] outputs of the packed rows. Args: explicit: chains give their paths, too."""
        rows = torch.cat([item.rows for item in items])
        out = torch.full((len(rows), self.layer.out_width), torch.nan, dtype=self.dtype)
        self.kernel.attend(self.layer, self.step(*items, explicit=explicit), rows, out)
        return out

    def one_by_one(self, blocks: Sequence[int], rows: Tensor, committed: int = 0) -> Tensor:
        """`extend` of each row alone, after those before it."""
        steps = range(len(rows))
        return torch.cat([self.extend(Item(blocks, committed + i, rows[i : i + 1])) for i in steps])

    def forget(self, blocks: Sequence[int], committed: int) -> None:
        """Poison what lies after the committed positions of a sequence."""
        for index, block in enumerate(blocks):
            lane = min(max(committed - index * BLOCK, 0), BLOCK)
            self.keys[block, :, :, lane:] = torch.nan
            self.values[block, :, lane:] = torch.nan

    def step(self, *items: Item, explicit: bool = False) -> AttentionStep:
        longest = max(len(item.blocks) for item in items)
        chain = [item.parents is None and not explicit for item in items]
        listed = [[] if c else path for item, c in zip(items, chain, strict=True) for path in item.paths()]
        at = [item.committed + len(path) - 1 for item in items for path in item.paths()]
        rope = (self.cos[at], self.sin[at]) if self.rotary else (None, None)
        return AttentionStep(
            ints([[*item.blocks, *[-1] * (longest - len(item.blocks))] for item in items]),
            ints([item.committed for item in items]),
            ints([item.region for item in items]),
            ints([0, *itertools.accumulate(len(item.rows) for item in items)]),
            ints([0, *itertools.accumulate(map(len, listed))]),
            ints([offset for path in listed for offset in path]),
            ints(chain),
            *rope,
        )

    def reference(self, rows: Tensor) -> Tensor:
        """[n, heads * d] in float64: each row of a sequence attends to itself and those before it.

        Only what the kernel stores is rounded: the keys, and the norms of heads.
        """
        n, d, group = len(rows), self.head_dim, self.heads // self.kv_heads
        heads = rows.view(n, -1, d)
        queries, keys, values = torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], 1)
        if self.norms is not None:
            queries, keys = self._normed(queries, self.norms[0]), self._normed(keys, self.norms[1])
        queries = self._turned(queries.double())
        keys = self._turned(keys.float()).to(self.dtype).double().repeat_interleave(group, 1)
        values = values.double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * d**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)

    def _turned(self, x: Tensor) -> Tensor:
        """Rope of the first `rotary` elements of each head, in the dtype of x [n, heads, d]."""
        cos, sin = (turn[: len(x), None].to(x.dtype) for turn in (self.cos, self.sin))
        half = self.rotary // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """The kernel's own norm of each head, which has tests of its own."""
        rows = x.reshape(-1, self.head_dim)
        out = torch.empty_like(rows)
        self.kernel.rms_norm(rows, weight, out, _EPS)
        return out.view(x.shape)


def ints(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bytes: -0 is not 0, and NaN is NaN."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
