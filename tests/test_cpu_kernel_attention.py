"""Attention of the CPU kernel: near float64, and a row's bits the same however its sequence is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from taps.engine.threads import computing_with
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel
from taps.models.cpu_kernel.paged import AttentionLayer, AttentionStep
from tests.paged import ROUNDING, Item, PagedPool, ints, same_bits

Integers = dict[str, Sequence[int] | Sequence[Sequence[int]]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 32, 64, 80, 96, 112, 128, 160, 192, 256]
GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25]
BLOCKS, ELSEWHERE = [3, 7, 1, 4, 12], [9, 2, 5, 0, 30]
REPEATS = 5  # a thread that has just started may find no work left
# Beside the rounding of the result: sums and exponentials in float32, of values about 1.5.
FLOAT32_ERROR = 1e-5


@pytest.fixture(scope="module", params=machine_levels())
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return CpuKernel(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with computing_with(1):
        yield


def _assert_near(ours: Tensor, exact: Tensor) -> None:
    beyond = (ours.double() - exact).abs() - exact.abs() * ROUNDING[ours.dtype]
    assert float(beyond.max()) <= FLOAT32_ERROR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size_is_near_float64_and_alone_as_together(
    kernel: CpuKernel, head_dim: int, dtype: torch.dtype
) -> None:
    pool = PagedPool(kernel, 4, 2, head_dim, dtype)
    rows = pool.rows(70)
    together = pool.extend(Item(BLOCKS, 0, rows))
    _assert_near(together, pool.reference(rows))
    assert same_bits(pool.one_by_one(ELSEWHERE, rows), together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_heads_is_near_float64_and_alone_as_together(
    kernel: CpuKernel, group: int, dtype: torch.dtype
) -> None:
    pool = PagedPool(kernel, 2 * group, 2, 32, dtype)
    rows = pool.rows(70)
    together = pool.extend(Item(BLOCKS, 0, rows))
    _assert_near(together, pool.reference(rows))
    assert same_bits(pool.one_by_one(ELSEWHERE, rows), together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [0, 16, 24, 96])
def test_rope_may_turn_a_part_of_a_head_or_none(kernel: CpuKernel, rotary: int, dtype: torch.dtype) -> None:
    pool = PagedPool(kernel, 4, 2, 96, dtype, rotary=rotary)
    rows = pool.rows(70)
    _assert_near(pool.extend(Item(BLOCKS, 0, rows)), pool.reference(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normed_before_rope(kernel: CpuKernel, dtype: torch.dtype) -> None:
    norms = (torch.linspace(0.5, 2, 48).to(dtype), torch.linspace(1.5, 0.5, 48).to(dtype))
    pool = PagedPool(kernel, 4, 2, 48, dtype, norms=norms)
    rows = pool.rows(70)
    together = pool.extend(Item(BLOCKS, 0, rows))
    _assert_near(together, pool.reference(rows))
    assert same_bits(pool.one_by_one(ELSEWHERE, rows), together)


def test_the_scale_is_the_layers_own(kernel: CpuKernel) -> None:
    pool, other = PagedPool(kernel), PagedPool(kernel)
    rows = pool.rows(20)
    scaled = rows.clone()
    scaled[:, : pool.layer.out_width] *= 2
    other.layer = AttentionLayer(other.keys, other.values, other.heads, scale=2 * 32**-0.5)
    ours, theirs = other.extend(Item(BLOCKS, 0, rows)), pool.extend(Item(BLOCKS, 0, scaled))
    torch.testing.assert_close(ours, theirs)


def test_large_scores_neither_overflow_nor_lose_their_order(kernel: CpuKernel) -> None:
    pool = PagedPool(kernel)
    rows = pool.rows(200)
    rows[:, : pool.layer.out_width] *= 300
    out = pool.extend(Item(BLOCKS, 0, rows))
    # A score of a thousand has an error of its own, in float32, of about a ten-thousandth.
    torch.testing.assert_close(out.double(), pool.reference(rows), atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_explicit_paths_change_no_bit(kernel: CpuKernel, dtype: torch.dtype) -> None:
    pool = PagedPool(kernel, 3, 1, 64, dtype)
    rows = pool.rows(310)
    alone = pool.one_by_one(BLOCKS, rows)
    _assert_near(alone, pool.reference(rows))
    for size in (310, 77, 64, 2, 3, 7):
        for explicit in (False, True):
            pool.forget(ELSEWHERE, 0)
            chunks = [
                pool.extend(Item(ELSEWHERE, c, rows[c : c + size]), explicit=explicit)
                for c in range(0, len(rows), size)
            ]
            assert same_bits(torch.cat(chunks), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_cached_is_the_same_bits_whichever_way_it_was_computed(
    kernel: CpuKernel, dtype: torch.dtype
) -> None:
    pool, other = PagedPool(kernel, dtype=dtype), PagedPool(kernel, dtype=dtype)
    rows = pool.rows(150)
    pool.one_by_one(BLOCKS, rows)
    other.extend(Item(BLOCKS, 0, rows[:77]))
    other.extend(Item(BLOCKS, 77, rows[77:]))
    assert same_bits(pool.keys, other.keys)
    assert same_bits(pool.values, other.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [2, 3, 5, 7, 8])
def test_the_number_of_threads_changes_no_bit(kernel: CpuKernel, threads: int, dtype: torch.dtype) -> None:
    pool = PagedPool(kernel, 8, 4, 64, dtype)
    rows, tree = pool.rows(300), [-1, 0, 0, 1, 1, 2, 3]
    items = (Item(BLOCKS, 0, rows), Item(ELSEWHERE, 0, rows[:7], tree), Item([20], 0, rows[:1]))
    single = pool.extend(*items)
    with computing_with(threads):
        for _ in range(REPEATS):
            assert same_bits(pool.extend(*items), single)
        assert same_bits(pool.extend(Item([20], 0, rows[:1])), single[-1:])


def test_calls_from_two_threads_at_once_change_no_bit(kernel: CpuKernel) -> None:
    """A target and a drafter of one process each compute on a thread of their own."""

    def prefill(seed: int) -> Tensor:
        with computing_with(2):
            pool = PagedPool(kernel, 8, 4, 64)
            rows = pool.rows(300, seed)
            return torch.stack([pool.extend(Item(BLOCKS, 0, rows)) for _ in range(REPEATS)])

    single = [prefill(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        assert all(map(same_bits, threads.map(prefill, (0, 1)), single))


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_sessions_in_the_call_change_no_bit(kernel: CpuKernel, dtype: torch.dtype) -> None:
    pool = PagedPool(kernel, 6, 2, 32, dtype, blocks=64)
    rows = pool.rows(310)
    alone = pool.one_by_one(BLOCKS, rows)
    lengths = [0, 1, 10, 63, 64, 65, 127, 128, 255, 300]
    tables = [list(range(13 + 5 * i, 18 + 5 * i)) for i in range(len(lengths))]
    for table, length in zip(tables, lengths, strict=True):
        if length:
            pool.extend(Item(table, 0, rows[:length]))
    items = [
        Item(table, length, rows[length : length + 1 + i])
        for i, (table, length) in enumerate(zip(tables, lengths, strict=True))
    ]
    expected = torch.cat([alone[item.committed :][: len(item.rows)] for item in items])
    assert same_bits(pool.extend(*items), expected)
    assert same_bits(pool.extend(*items[::-1])[-1:], expected[:1])
    assert same_bits(pool.extend(*items[4:6]), expected[10:21])


def test_a_session_may_have_no_rows(kernel: CpuKernel) -> None:
    pool = PagedPool(kernel)
    rows = pool.rows(5)
    alone = pool.extend(Item(BLOCKS, 0, rows))
    nobody = Item([-1], 0, rows[:0])
    assert same_bits(pool.extend(nobody, Item(ELSEWHERE, 0, rows), nobody), alone)
    assert pool.extend(nobody).shape == (0, pool.layer.out_width)


def test_what_a_layer_cannot_be_is_refused(kernel: CpuKernel) -> None:
    def layer(heads: int = 4, kv_heads: int = 2, head_dim: int = 32) -> AttentionLayer:
        return AttentionLayer(
            torch.zeros(3, kv_heads, head_dim, 64), torch.zeros(3, kv_heads, 64, head_dim), heads
        )

    for head_dim in (24, 0, 272):
        with pytest.raises(ValueError, match="a multiple of 16 up to 256"):
            layer(head_dim=head_dim)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key heads"):
        layer(heads=5)
    with pytest.raises(ValueError, match=r"values .* must be torch.float32 \[3, 2, 64, 32\]"):
        AttentionLayer(torch.zeros(3, 2, 32, 64), torch.zeros(3, 2, 32, 64), 4)
    with pytest.raises(ValueError, match="computes in"):
        AttentionLayer(torch.zeros(3, 2, 32, 64).double(), torch.zeros(3, 2, 64, 32).double(), 4)
    with pytest.raises(ValueError, match=r"q_norm .* must be torch.float32 \[32\]"):
        AttentionLayer(torch.zeros(3, 2, 32, 64), torch.zeros(3, 2, 64, 32), 4, q_norm=torch.ones(64))
    with pytest.raises(ValueError, match=r"they must be \[blocks, kv_heads, head_dim, 64\]"):
        AttentionLayer(torch.zeros(2, 32, 64), torch.zeros(2, 64, 32), 4)


def test_tensors_of_another_size_are_refused(kernel: CpuKernel) -> None:
    pool = PagedPool(kernel)
    rows = pool.rows(3)
    step, out = pool.step(Item([1], 0, rows)), torch.zeros(3, pool.layer.out_width)
    with pytest.raises(ValueError, match=r"qkv is .* \[2, 320\]"):
        kernel.attend(pool.layer, step, rows[:2], out)
    with pytest.raises(ValueError, match=r"out is torch.bfloat16"):
        kernel.attend(pool.layer, step, rows, out.bfloat16())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": [0, 1, 3]}, "starts must begin with 0"),
        ({"starts": [1, 2, 4]}, "starts must begin with 0"),
        ({"starts": [0, 5, 4]}, "starts must begin with 0"),
        ({"committed": [-1, 0]}, "one of them is negative"),
        ({"region": [0, -2]}, "one of them is negative"),
        ({"committed": [127, 0]}, "more positions than its row of the table"),
        ({"region": [0, 2**31 - 1]}, "more positions than its row of the table"),
        ({"table": [[32, 0], [1, 1]]}, "a block that is not in the pools"),
        ({"table": [[0, 0], [-1, 1]]}, "a block that is not in the pools"),
        ({"path_idx": [0, 0, 1, 0, 2]}, "a row's path"),
        ({"path_idx": [0, 0, 1, -1, 1]}, "a row's path"),
        ({"path_idx": [0, 1, 0, 0, 1]}, "a row's path"),
        ({"path_ptr": [0, 1, 3, 3, 5]}, "a row's path"),
        ({"path_ptr": [0, 1, 3, 4, 6]}, "a row's path"),
        ({"path_ptr": [-1, 1, 3, 4, 5]}, "a row's path"),
    ],
)
def test_integers_that_lead_astray_are_refused_and_nothing_is_written(
    kernel: CpuKernel, changes: Integers, said: str
) -> None:
    pool = PagedPool(kernel)
    good: Integers = {
        "table": [[0, 2], [1, 3]],
        "committed": [0, 5],
        "region": [0, 0],
        "starts": [0, 2, 4],
        "path_ptr": [0, 1, 3, 4, 5],
        "path_idx": [0, 0, 1, 0, 1],
        "chain": [0, 0],
    }
    rows, out = pool.rows(4), torch.zeros(4, pool.layer.out_width)
    turns = {"cos": torch.ones(4, 16), "sin": torch.zeros(4, 16)}
    tensors = {name: ints(numbers) for name, numbers in {**good, **changes}.items()}
    with pytest.raises(ValueError, match=said):
        kernel.attend(pool.layer, AttentionStep(**tensors, **turns), rows, out)
    assert not out.any()
    assert pool.keys.isnan().all()
    tensors = {name: ints(numbers) for name, numbers in good.items()}
    kernel.attend(pool.layer, AttentionStep(**tensors, **turns), rows, out)
    assert not pool.keys[0, :, :, :2].isnan().any()


def test_rope_that_does_not_fit_is_refused(kernel: CpuKernel) -> None:
    pool = PagedPool(kernel)
    numbers = {"table": ints([[0]]), "committed": ints([0]), "region": ints([0]), "starts": ints([0, 1])}
    paths = {"path_ptr": ints([0, 1]), "path_idx": ints([0]), "chain": ints([0])}
    wide = torch.ones(1, 17)
    out = torch.zeros(1, pool.layer.out_width)
    with pytest.raises(ValueError, match="rope turns more elements than a head has"):
        kernel.attend(pool.layer, AttentionStep(**numbers, **paths, cos=wide, sin=wide), pool.rows(1), out)
    with pytest.raises(ValueError, match="rope needs both cos and sin"):
        AttentionStep(**numbers, **paths, cos=wide)
    with pytest.raises(ValueError, match=r"sin is .* must be torch.float32 \[1, 17\]"):
        AttentionStep(**numbers, **paths, cos=wide, sin=wide[:, :16])
    with pytest.raises(ValueError, match=r"table is \[sessions, max_blocks\]"):
        AttentionStep(**{**numbers, "table": ints([0])}, **paths)
    with pytest.raises(ValueError, match=r"chain is torch.int64"):
        AttentionStep(**numbers, **{**paths, "chain": torch.tensor([0])})
