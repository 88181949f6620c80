"""Attention in torch alone, whose result for a row depends on that row's own sequence alone, bit for bit.

A row's keys are put in lanes of their absolute positions, 64 to a block, and every product is of one row and
one block: the same shapes whoever shares the step, however many rows there are and wherever pages lie. Blocks
are then summed one after the other. Lanes a row does not see have no weight and no value, whatever was left
in them.

Serves where there is no compiler, and windows, soft-capping and sinks everywhere. Slower than the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.models.cache import PAGE, PagedCache
from taps.models.layers import ComposedLayers
from taps.models.linear import RowLinear
from taps.models.operations import HeadNorms, Heads, LayerWeights, LinearWeights, Rope
from taps.models.step import Segment, Step

# A layer type's own rule over (batch, head, query position, key position), elementwise on tensors.
PositionRule = Callable[..., Any]
_PAIRS = 512  # rows times blocks whose keys are gathered at once
_UNSPLIT = 1 << 14  # elements that an elementwise operation leaves to one thread


@dataclass(frozen=True)
class Scoring:
    """What a layer does to its scores beside scaling them."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads]
    rule: PositionRule | None = None  # None is plain causal attention


class _Pairs(NamedTuple):
    """Rows and the blocks of positions they see."""

    rows: Tensor  # [n]
    blocks: Tensor  # [n] which of the row's blocks, by position
    places: Tensor  # [n, 64] where each position's key and value lie
    seen: Tensor  # [n, 64] bool
    num_blocks: int  # of the row that sees the most


def attend(
    step: Step, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, pairs: _Pairs | None = None
) -> Tensor:
    """Attention of every row of a step over its own path.

    Args: query [rows, heads, d]; keys [pages, kv_heads, d, 64] and values [pages, kv_heads, 64, d_v], with the
    rows' own in them; pairs: of the step, where they are known. Returns [rows, heads, d_v] in the query's type.
    """
    pairs = pairs_of(step, query.device) if pairs is None else pairs
    positions = step.on(query.device).positions
    kv_heads, dim = keys.shape[1], keys.shape[2]
    grouped = query.float().view(len(query), kv_heads, -1, dim) * scoring.scale
    num_blocks = pairs.num_blocks
    scores = grouped.new_full((len(query), num_blocks, *grouped.shape[1:3], PAGE), -math.inf)
    for part in _parts(pairs):
        scores[part.rows, part.blocks] = _scores(positions, grouped, keys, part, scoring)
    weights = _softmax(scores, scoring.sinks)
    sums = grouped.new_zeros(len(query), num_blocks, *grouped.shape[1:3], values.shape[-1])
    for part in _parts(pairs):
        sums[part.rows, part.blocks] = _sums(weights, values, part)
    out = sums[:, 0]
    for block in range(1, num_blocks):
        out = out + sums[:, block]
    return out.reshape(len(query), -1, values.shape[-1]).to(query.dtype)


def pairs_of(step: Step, device: torch.device) -> _Pairs:
    """Every row of a step with every block of positions that it sees."""
    found = [pair for segment, row in _rows(step) for pair in _blocks(segment, row)]
    numbers = [number for number, (segment, row) in enumerate(_rows(step)) for _ in _blocks(segment, row)]
    places = torch.tensor([places for _, places, _ in found], device=device)
    seen = torch.arange(PAGE) < torch.tensor([count for _, _, count in found])[:, None]
    blocks = [block for block, _, _ in found]
    return _Pairs(
        torch.tensor(numbers, device=device), torch.tensor(blocks, device=device), places, seen.to(device),
        max(blocks) + 1,
    )  # fmt: skip


def _rows(step: Step) -> Iterator[tuple[Segment, int]]:
    for segment in step.segments:
        for row in range(segment.num_rows):
            yield segment, row


def _blocks(segment: Segment, row: int) -> Iterator[tuple[int, list[int], int]]:
    """Number, places and how many of the 64 positions there are, of each block that a row sees."""
    sequence = segment.sequence
    path = segment.path(row)
    end = sequence.length + len(path)
    for block in range(-(-end // PAGE)):
        positions = range(block * PAGE, min(end, (block + 1) * PAGE))
        places = [
            sequence.place(p if p < sequence.length else sequence.length + path[p - sequence.length])
            for p in positions
        ]
        yield block, places + [places[0]] * (PAGE - len(places)), len(places)


def _parts(pairs: _Pairs) -> Iterator[_Pairs]:
    for start in range(0, len(pairs.rows), _PAIRS):
        part = slice(start, start + _PAIRS)
        yield _Pairs(
            pairs.rows[part], pairs.blocks[part], pairs.places[part], pairs.seen[part], pairs.num_blocks
        )


def _scores(positions: Tensor, query: Tensor, keys: Tensor, pairs: _Pairs, scoring: Scoring) -> Tensor:
    """[n, kv_heads, group, 64], -inf where a row does not see."""
    page, lane = pairs.places // PAGE, pairs.places % PAGE
    gathered = keys[page, :, :, lane].float()  # [n, 64, kv_heads, d]
    found = _products(query[pairs.rows], gathered.permute(0, 2, 3, 1))
    if scoring.softcap is not None:
        found = torch.tanh(found / scoring.softcap) * scoring.softcap
    seen = pairs.seen
    if scoring.rule is not None:
        key_at = pairs.blocks[:, None] * PAGE + torch.arange(PAGE, device=seen.device)
        seen = seen & scoring.rule(0, 0, positions[pairs.rows][:, None], key_at)
    return found.masked_fill(~seen[:, None, None], -math.inf)


def _sums(weights: Tensor, values: Tensor, pairs: _Pairs) -> Tensor:
    """[n, kv_heads, group, d_v]"""
    page, lane = pairs.places // PAGE, pairs.places % PAGE
    gathered = values[page, :, lane].float()  # [n, 64, kv_heads, d_v]
    gathered = gathered.masked_fill(~pairs.seen[:, :, None, None], 0.0)  # 0 times NaN is not 0
    return _products(weights[pairs.rows, pairs.blocks], gathered.transpose(1, 2))


def _products(one: Tensor, other: Tensor) -> Tensor:
    """[n, kv_heads, g, x] times [n, kv_heads, x, y], each product by itself; never a single one."""
    n = one.shape[0] * one.shape[1]
    # A transposed operand goes another way through the library.
    pair = one.contiguous().view(n, *one.shape[2:]), other.contiguous().view(n, *other.shape[2:])
    if n == 1:
        pair = pair[0].expand(2, -1, -1), pair[1].expand(2, -1, -1)
    return torch.bmm(*pair)[:n].view(*one.shape[:-1], other.shape[-1])


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over all positions of a row, [rows, blocks, kv_heads, group, 64]; sinks take a share and give nothing."""
    rows, blocks, kv_heads, group, _ = scores.shape
    flat = scores.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group, blocks * PAGE)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, group, 1).expand(rows, -1, -1, PAGE)
        column = column.masked_fill(torch.arange(PAGE, device=column.device) > 0, -math.inf)
        flat = torch.cat([column, flat], -1)
    weights = flat.softmax(-1)[..., -blocks * PAGE :]
    return weights.view(rows, kv_heads, group, blocks, PAGE).permute(0, 3, 1, 2, 4)


class ReferenceOperations:
    """Implements `taps.models.operations.Operations` in torch alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.numerics = f"torch {torch.__version__} {str(dtype).removeprefix('torch.')}"
        self._pairs: tuple[Step, _Pairs] | None = None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        """In pieces that no operation splits among threads, which leaves tails of another rounding."""
        gate, up = gate_up.chunk(2, -1)
        rows = max(1, _UNSPLIT // gate.shape[-1])
        parts = [_gated(g, u) for g, u in zip(torch.split(gate, rows), torch.split(up, rows), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend(
        self, layer: int, qkv: Tensor, step: Step, cache: PagedCache, heads: Heads, rope: Rope,
        norms: HeadNorms | None,
    ) -> Tensor:  # fmt: skip
        rows = qkv.view(len(qkv), -1, heads.dim)
        query, key, value = torch.split(rows, [heads.queries, heads.keys, heads.keys], 1)
        if norms is not None:
            query, key = self.norm(query, norms.query, norms.eps), self.norm(key, norms.key, norms.eps)
        positions = step.on(qkv.device).positions
        query, key = (_rotated(x, rope.cos[positions], rope.sin[positions]) for x in (query, key))
        keys, values = cache.layer(layer, qkv, heads.keys, heads.dim, heads.dim)
        write(step, key, value, keys, values)
        out = attend(step, query, keys, values, Scoring(heads.scale), self._pairs_of(step, qkv.device))
        return out.reshape(len(qkv), -1)

    def linear(self, weights: LinearWeights) -> RowLinear:
        return RowLinear(*weights)

    def layers(self, weights: Iterable[LayerWeights]) -> ComposedLayers:
        return ComposedLayers(self, weights)

    def _pairs_of(self, step: Step, device: torch.device) -> _Pairs:
        """Made once for all layers of a step."""
        if self._pairs is None or self._pairs[0] is not step:
            self._pairs = step, pairs_of(step, device)
        return self._pairs[1]


def write(step: Step, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put the rows' keys and values [n, kv_heads, d] in their places."""
    places = step.on(keys.device).places
    page, lane = places // PAGE, places % PAGE
    keys[page, :, :, lane] = key
    values[page, :, lane] = value


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[n, heads, d] with its first dimensions rotated in float32, halves apart as Llama has them."""
    half = cos.shape[-1]
    one, other, rest = torch.split(x.float(), [half, half, x.shape[-1] - 2 * half], -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], -1).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    """Of few rows, whose width is filled up to whole vectors."""
    width = gate.shape[-1]
    missing = -width % PAGE
    gate, up = F.pad(gate, (0, missing)), F.pad(up, (0, missing))
    return (F.silu(gate) * up)[..., :width]
