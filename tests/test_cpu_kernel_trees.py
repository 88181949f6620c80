"""Trees in the CPU kernel: a row on a path has the bits of plain decoding, whatever stands beside the path."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from taps.engine.threads import computing_with
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel
from tests.paged import Item, PagedPool, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMMITTED = [0, 1, 10, 60, 62, 63, 64, 65, 120, 126, 127, 128, 255, 300]
POSITIONS = 310
BLOCKS, ELSEWHERE = [3, 7, 1, 4, 12, 6], [9, 2, 5, 0, 30, 13]
DEPTH, CHILDREN = 5, 3


@dataclass(frozen=True)
class Tree:
    """The true continuation after `committed`, in a tree of siblings that come before, between and after it."""

    parents: list[int]
    rows: Tensor
    true: list[int]  # the nodes of the true path

    @staticmethod
    def around(rows: Tensor, siblings: Tensor) -> Tree:
        """Args: rows: [DEPTH + 1, width] the true path. siblings: [n, width] the other nodes' rows, in turn."""
        parents, packed, true, other = [-1], [rows[0]], [0], itertools.cycle(siblings)
        for depth in range(1, DEPTH + 1):
            parent = true[-1]
            for child in range(CHILDREN):
                if child == depth % CHILDREN:
                    true.append(len(parents))
                packed.append(rows[depth] if child == depth % CHILDREN else next(other))
                parents.append(parent)
        return Tree(parents, torch.stack(packed), true)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with computing_with(1):
        yield


@functools.cache
def _decoded(level: str, dtype: torch.dtype, group: int = 3) -> tuple[PagedPool, Tensor, Tensor]:
    """A sequence decoded one by one: its pool, its rows, what attention gave for each."""
    pool = PagedPool(CpuKernel(level), 2 * group, 2, 32, dtype)
    rows = pool.rows(POSITIONS)
    return pool, rows, pool.one_by_one(BLOCKS, rows)


def _holding(pool: PagedPool, committed: int, blocks: Sequence[int] = BLOCKS) -> PagedPool:
    """Another pool with the first positions of the sequence; NaN lies in every other place."""
    fresh = PagedPool(pool.kernel, pool.heads, pool.kv_heads, pool.head_dim, pool.dtype)
    fresh.keys[list(blocks)] = pool.keys[BLOCKS]
    fresh.values[list(blocks)] = pool.values[BLOCKS]
    fresh.forget(blocks, committed)
    return fresh


def _tree(pool: PagedPool, rows: Tensor, committed: int, poisoned: bool = False) -> Tree:
    siblings = pool.rows(DEPTH * CHILDREN, seed=1 + committed)
    return Tree.around(rows[committed : committed + DEPTH + 1], siblings * torch.nan if poisoned else siblings)


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_a_path_through_a_tree_has_the_bits_of_plain_decoding(
    level: str, dtype: torch.dtype, group: int
) -> None:
    pool, rows, plain = _decoded(level, dtype, group)
    for committed, poisoned in itertools.product(COMMITTED, (False, True)):
        tree = _tree(pool, rows, committed, poisoned)
        out = _holding(pool, committed).extend(Item(BLOCKS, committed, tree.rows, tree.parents))
        assert same_bits(out[tree.true], plain[committed : committed + DEPTH + 1]), (committed, poisoned)


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_added_one_after_the_other_have_the_bits_of_the_whole_tree(
    level: str, dtype: torch.dtype
) -> None:
    pool, rows, _ = _decoded(level, dtype)
    for committed in COMMITTED:
        tree = _tree(pool, rows, committed)
        whole = _holding(pool, committed).extend(Item(BLOCKS, committed, tree.rows, tree.parents))
        growing, outs = _holding(pool, committed), []
        ends = [0, 1, *range(1 + CHILDREN, len(tree.parents) + 1, CHILDREN)]
        for start, end in itertools.pairwise(ends):
            item = Item(BLOCKS, committed, tree.rows[start:end], tree.parents[:end], region=start)
            outs.append(growing.extend(item))
        assert same_bits(torch.cat(outs), whole), committed


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_in_the_region_has_the_bits_of_a_committed_one(level: str, dtype: torch.dtype) -> None:
    """Wherever the boundary between the prefix and the region lies."""
    pool, rows, plain = _decoded(level, dtype)
    for committed, region in itertools.product([0, 10, 63, 64, 100], [0, 1, 20, 70]):
        holding = _holding(pool, committed + region)
        for explicit in (False, True):
            item = Item(BLOCKS, committed, rows[committed + region :][:9], region=region)
            out = holding.extend(item, explicit=explicit)
            assert same_bits(out, plain[committed + region :][:9]), (committed, region, explicit)


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_trees_of_several_sessions_in_other_blocks_change_no_bit(level: str, dtype: torch.dtype) -> None:
    pool, rows, plain = _decoded(level, dtype)
    for first, second in itertools.pairwise(COMMITTED):
        both = _holding(pool, first)
        other = _holding(pool, second, ELSEWHERE)
        both.keys[ELSEWHERE], both.values[ELSEWHERE] = other.keys[ELSEWHERE], other.values[ELSEWHERE]
        tree, branch = _tree(pool, rows, first), _tree(pool, rows, second, poisoned=True)
        out = both.extend(
            Item(BLOCKS, first, tree.rows, tree.parents),
            Item(ELSEWHERE, second, branch.rows, branch.parents),
            Item([20], 0, rows[:2]),
        )
        nodes = len(tree.parents)
        assert same_bits(out[tree.true], plain[first : first + DEPTH + 1])
        assert same_bits(out[nodes:][branch.true], plain[second : second + DEPTH + 1])
        assert same_bits(out[2 * nodes :], plain[:2])


@pytest.mark.parametrize("level", machine_levels())
def test_wide_trees_have_the_bits_of_each_path_alone(level: str) -> None:
    """More nodes than a block has places, each on a path of its own through random branches."""
    pool, _, _ = _decoded(level, torch.float32)
    committed, generator = 100, torch.Generator().manual_seed(5)
    nodes = pool.rows(150, seed=3)
    parents = [-1, *(int(torch.randint(0, node, (), generator=generator)) for node in range(1, 150))]
    item = Item(BLOCKS, committed, nodes, parents)
    out = _holding(pool, committed).extend(item)
    for node, path in list(enumerate(item.paths()))[::7]:
        alone = _holding(pool, committed).extend(Item(BLOCKS, committed, nodes[path]))
        assert same_bits(alone[-1], out[node]), path


@pytest.mark.slow
@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_every_head_size_and_group_has_the_bits_of_plain_decoding_in_a_tree(
    level: str, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    pool = PagedPool(CpuKernel(level), group, 1, head_dim, dtype)
    rows = pool.rows(POSITIONS)
    plain = pool.one_by_one(BLOCKS, rows)
    for committed, threads in zip(COMMITTED, itertools.cycle((1, 2, 3)), strict=False):
        tree = _tree(pool, rows, committed, poisoned=threads == 2)
        with computing_with(threads):
            out = _holding(pool, committed).extend(Item(BLOCKS, committed, tree.rows, tree.parents))
        assert same_bits(out[tree.true], plain[committed : committed + DEPTH + 1]), (committed, threads)
