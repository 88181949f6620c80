"""Sampling many rows at once: each is decided as if it were alone, and the host waits no more for many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taps.engine.threads import computing_with
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel
from taps.sampling import InvalidLogits, draft_noise, gumbel_noise, gumbel_rows, sample, sample_rows
from taps.shaping import SamplingParams, shape_logits, shape_rows


def random_params(rng: Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.6, 1.0, 1.4]),
        top_p=rng.choice([1.0, 1.0, 0.999, 0.9, 0.3]),
        top_k=rng.choice([0, 0, 3, 300]),
        presence_penalty=rng.choice([0.0, 0.0, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.3]),
        seed=rng.randrange(1 << 64),
        choice=rng.randrange(3),
    )


class Rows:
    """Rows to decide, each with parameters of its own."""

    def __init__(self, num_rows: int, vocab_size: int, seed: int = 0, **options: Any) -> None:
        rng = Random(seed)
        draw = torch.Generator().manual_seed(seed)
        spreads = torch.tensor([rng.choice([0.1, 1.0, 3.0, 10.0]) for _ in range(num_rows)])
        self.logits = torch.randn(num_rows, vocab_size, generator=draw) * spreads[:, None]
        self.params = [replace(random_params(rng), **options) for _ in range(num_rows)]
        self.positions = [rng.randrange(4000) for _ in range(num_rows)]
        self.counts = [
            {rng.randrange(vocab_size): rng.randrange(1, 4) for _ in range(rng.randrange(30))}
            for _ in range(num_rows)
        ]

    def decide(self, *chosen: int) -> list[int | InvalidLogits]:
        """The answers of the chosen rows, or of all, that share one call."""
        rows = chosen or range(len(self.params))
        return sample_rows(
            self.logits[list(rows)],
            [self.params[row] for row in rows],
            [self.positions[row] for row in rows],
            [self.counts[row] for row in rows],
        )

    def shape(self, *chosen: int) -> Tensor:
        return shape_rows(
            self.logits[list(chosen)], [self.params[i] for i in chosen], [self.counts[i] for i in chosen]
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(16, 49152), (9, 50257), (17, 8), (64, 1001)])
def test_a_row_is_decided_alike_alone_and_among_any_others(
    num_rows: int, vocab_size: int, dtype: torch.dtype
) -> None:
    rows = Rows(num_rows, vocab_size, seed=num_rows)
    rows.logits = rows.logits.to(dtype)
    together = rows.decide()
    assert [rows.decide(row)[0] for row in range(num_rows)] == together
    some = Random(1).sample(range(num_rows), num_rows // 3)
    assert rows.decide(*some) == [together[row] for row in some]
    assert together == [
        sample(rows.logits[i], rows.params[i], rows.positions[i], rows.counts[i]) for i in range(num_rows)
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("vocab_size", [49152, 50257])
def test_shapes_and_tokens_depend_neither_on_threads_nor_on_the_other_rows(count: int, vocab_size: int) -> None:
    rows = Rows(12, vocab_size, seed=count)
    decided, shaped = rows.decide(), rows.shape(*range(12))
    with threads(count):
        assert rows.decide() == decided
        assert torch.equal(rows.shape(*range(12)), shaped)
        for row in range(12):
            assert rows.decide(row) == [decided[row]]
            assert torch.equal(rows.shape(row)[0], shaped[row])
        assert torch.equal(rows.shape(3, 7), shaped[[3, 7]])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("vocab_size", [49152, 50257])
def test_what_runs_along_rows_treats_them_apart(count: int, vocab_size: int) -> None:
    """The operations that shaping rests on: a library that splits a lone row otherwise is found out here."""
    rows = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(count)) * 3

    def along(rows: Tensor) -> list[Tensor]:
        weights = rows.double()
        weights = (weights - weights.amax(-1, keepdim=True)).exp()
        best = rows.topk(300).values
        return [rows.amax(-1), rows.argmax(-1), best, weights.cumsum(-1)[:, -1]]

    expected = along(rows)
    with threads(count):
        for sharing in (rows[:1], rows[:2], rows[:17], rows):
            for ours, theirs in zip(along(sharing), expected, strict=True):
                assert torch.equal(ours, theirs[: len(sharing)])


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_the_argmax_of_its_own_law_and_noise(seed: int) -> None:
    rows = Rows(20, 700, seed=seed)
    shaped = shape_rows(rows.logits, rows.params, rows.counts)
    noise = gumbel_rows(rows.params, rows.positions, torch.arange(700))
    for row, decided in enumerate(rows.decide()):
        params = rows.params[row]
        assert torch.equal(shaped[row], shape_logits(rows.logits[row], params, rows.counts[row]))
        own = gumbel_noise(params.seed, params.choice, rows.positions[row], torch.arange(700))
        assert torch.equal(noise[row], own)
        assert decided == int((shaped[row] if params.greedy else shaped[row].double() + own).argmax())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"top_p": 0.9}]
)
def test_a_row_that_cannot_be_decided_fails_alone(wrong: float, options: dict[str, Any]) -> None:
    rows = Rows(9, 1000, **options)
    before = rows.decide()
    rows.logits[4] = wrong if wrong < 0 else rows.logits[4].index_fill(0, torch.tensor([17]), wrong)
    after = rows.decide()
    failed = after.pop(4)
    assert isinstance(failed, InvalidLogits)
    assert f"position {rows.positions[4]} is {wrong:g}" in str(failed)
    assert after == before[:4] + before[5:]


def test_no_row_is_no_question() -> None:
    assert sample_rows(torch.empty(0, 8), [], [], []) == []


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "tolist"}


def noting_operations(seen: list[str]) -> Any:
    """A context in which the name of every operation is written down."""

    def dispatch(_: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    return type("Noting", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})()


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 1.0, "top_k": 0, "top_p": 1.0}, 3),
        ({"temperature": 1.4, "top_k": 50, "top_p": 0.9}, 5),
        ({}, 5),
    ],
    ids=["greedy", "drawn", "cut", "mixed"],
)
def test_the_host_waits_as_often_for_many_rows_as_for_few(
    options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    tolist = Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        seen.append("tolist")  # it waits for a device, though on the CPU it is no operation
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", noted)
    for num_rows in (1, 5, 64):
        rows = Rows(num_rows, 2000, **options)
        seen.clear()
        with noting_operations(seen):
            rows.decide()
        assert 1 <= sum(name in WAITS for name in seen) <= most


def test_the_noise_of_drafts_is_the_targets_but_for_its_last_digits() -> None:
    params = [SamplingParams(seed=seed, choice=seed % 3) for seed in range(8)]
    ids = torch.arange(49152)
    exact = gumbel_rows(params, range(8), ids)
    difference = (draft_noise(params, range(8), ids).double() - exact).abs()
    assert float(difference.where(exact > -1, 0.0).max()) < 1e-5, "what has a chance"
    assert float(difference.max()) < 0.01


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("vocab_size", [1, 37, 4099, 49152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_race_is_won_by_torchs_tokens(level: str, vocab_size: int, dtype: torch.dtype) -> None:
    kernel, rng = CpuKernel(level), Random(vocab_size)
    for spread in (0.0, 0.5, 3.0, 30.0, 300.0):
        heats = [rng.choice([0.0, 0.3, 1.0, 1.7]) for _ in range(9)]
        params = [SamplingParams(heat, top_k=rng.choice([0, 5]), seed=i) for i, heat in enumerate(heats)]
        noise = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(int(spread)))
        logits = (spread * noise).to(dtype)
        inside = sample_rows(logits, params, range(9), [{}] * 9)
        for threads, n in ((1, 9), (2, 9), (7, 9), (2, 1), (5, 3)):
            with computing_with(threads):
                found = sample_rows(logits[:n], params[:n], range(n), [{}] * n, kernel.decide)
            assert found == inside[:n]


def test_the_kernels_race_takes_the_first_of_the_best() -> None:
    decide, greedy = CpuKernel(machine_levels()[0]).decide, SamplingParams(temperature=0.0)
    for first in (0, 5, 7, 8, 63, 4000, 8190):
        logits = torch.full((1, 8192), -1.0)
        logits[0, [first, 8191]] = 2.0
        for threads in (1, 2, 6):
            with computing_with(threads):
                assert sample_rows(logits, [greedy], [0], [{}], decide) == [first]


def test_the_kernels_race_says_where_a_row_has_no_token() -> None:
    logits = torch.randn(4, 100)
    logits[1, 7], logits[2], logits[3, 5] = torch.nan, -torch.inf, torch.inf
    decide = CpuKernel(machine_levels()[0]).decide
    for heat in (0.0, 1.0):
        params = [SamplingParams(heat, seed=i) for i in range(4)]
        for threads in (1, 2, 9):
            with computing_with(threads):
                found = sample_rows(logits, params, range(4), [{}] * 4, decide)
            assert found[0] == sample_rows(logits[:1], params[:1], [0], [{}])[0]
            assert all(isinstance(token, InvalidLogits) for token in found[1:])


@pytest.mark.parametrize(
    ("logits", "temperatures", "keys"),
    [
        (torch.zeros(2, 8), [1.0], [[1, 2], [3, 4]]),
        (torch.zeros(2, 8), [1.0, 1.0], [[1], [3]]),
        (torch.zeros(8, 2).T, [1.0, 1.0], [[1, 2], [3, 4]]),
        (torch.zeros(2, 8, dtype=torch.float64), [1.0, 1.0], [[1, 2], [3, 4]]),
        (torch.zeros(2, 0), [1.0, 1.0], [[1, 2], [3, 4]]),
    ],
)
def test_rows_that_cannot_be_decided_are_refused(
    logits: Tensor, temperatures: list[float], keys: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match=r"logits is|there are 2 rows"):
        CpuKernel(machine_levels()[0]).decide(logits, temperatures, keys)
