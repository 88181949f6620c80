"""Sampling: the noise is a function of the position, and what it samples has exactly the right law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from taps.sampling import InvalidLogits, gumbel_noise, sample
from taps.shaping import SamplingParams, shape_logits
from tests.fakes import chi_square_p

LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.7, -3.0, 1.5, 0.0])
COUNTS = {0: 2, 3: 1, 7: 4}
NUM_DRAWS = 2500


def random_logits(size: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def kept(shaped: Tensor) -> list[int]:
    return shaped.isfinite().nonzero().flatten().tolist()


def exact(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> list[float]:
    """The law of the next token, written down a second time in plain floats."""
    scores = logits.double().tolist()
    for token, times in counts.items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * times
    weights = [math.exp(score / params.temperature) for score in scores]
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])
    ranked = ranked[: params.top_k or None]
    total, mass, nucleus = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= params.top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


def test_greedy_takes_the_best_token_and_ties_go_to_the_lowest_id() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert sample(torch.tensor([0.0, 3.0, 1.0, 3.0]), greedy, 0, {}) == 1
    assert sample(torch.zeros(5), greedy, 0, {}) == 0
    assert sample(torch.tensor([-math.inf, -1.0, -1.0]), greedy, 0, {}) == 1
    late = torch.full((200,), -1.0)
    late[[130, 131, 199]] = 2.0
    assert sample(late, greedy, 0, {}) == sample(late[:197], greedy, 0, {}) == 130


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_no_numbers_decide_no_token(wrong: float, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidLogits, match=f"position 7 is {wrong}"):
        sample(torch.tensor([0.0, wrong, 1.0]), SamplingParams(**options), 7, {})


def test_greedy_ignores_seed_top_p_and_top_k() -> None:
    params = SamplingParams(temperature=0.0, top_p=0.1, top_k=1, seed=9, choice=2)
    assert torch.equal(shape_logits(LOGITS, params, {}), LOGITS)


@pytest.mark.parametrize(
    ("seed", "choice", "position", "noise"),
    [
        (0, 0, 0, [1.177349074076, 1.348148908673, -0.086926925257, -0.610696192359]),
        (7, 0, 0, [-0.759336919580, 1.703393655837, 1.198311597036, -0.646439750413]),
        (7, 1, 0, [0.364080281639, -0.674325229899, 0.359249833158, 1.921654142730]),
        (7, 0, 1, [0.518514038526, -0.414158948746, -0.492426362317, -0.498314762809]),
        (2**64 - 1, 3, 2047, [1.045487030884, -0.031436211550, 1.332229407331, 1.136233869201]),
    ],
)
def test_the_noise_never_changes(seed: int, choice: int, position: int, noise: list[float]) -> None:
    """A recorded answer must come out again in every later version, or seeds mean nothing."""
    assert gumbel_noise(seed, choice, position, torch.tensor([0, 1, 2, 49151])).tolist() == pytest.approx(
        noise, abs=1e-11
    )


def test_the_noise_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    everything = gumbel_noise(3, 1, 40, torch.arange(1000))
    ids = torch.tensor([999, 5, 5, 321])
    assert torch.equal(gumbel_noise(3, 1, 40, ids), everything[ids])
    assert ids.tolist() == [999, 5, 5, 321], "the caller's ids are left alone"


@pytest.mark.parametrize(
    "other", [(4, 1, 40), (3 + 2**63, 1, 40), (3, 2, 40), (3, 1, 41), (1, 3, 40), (3, 40, 1)]
)
def test_seed_choice_and_position_each_change_all_the_noise(other: tuple[int, int, int]) -> None:
    ids = torch.arange(200)
    here, there = gumbel_noise(3, 1, 40, ids), gumbel_noise(*other, ids)
    assert not (here == there).any()
    assert abs(scipy.stats.pearsonr(here.numpy(), there.numpy()).statistic) < 0.25


def test_the_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(12, 0, 7, torch.arange(20_000))
    assert noise.dtype == torch.float64
    assert scipy.stats.kstest(noise.numpy(), "gumbel_r").pvalue > 0.01


@pytest.mark.parametrize(
    ("params", "counts"),
    [
        (SamplingParams(), {}),
        (SamplingParams(temperature=0.7), {}),
        (SamplingParams(top_p=0.75), {}),
        (SamplingParams(top_k=3), {}),
        (SamplingParams(presence_penalty=0.8, frequency_penalty=0.5), COUNTS),
        (SamplingParams(1.3, top_p=0.9, top_k=5, presence_penalty=-0.4, frequency_penalty=0.3), COUNTS),
    ],
    ids=["plain", "cool", "top-p", "top-k", "penalties", "everything"],
)
def test_samples_follow_the_exact_distribution(params: SamplingParams, counts: Mapping[int, int]) -> None:
    observed = [0] * len(LOGITS)
    for i in range(NUM_DRAWS):
        observed[sample(LOGITS, replace(params, seed=i // 50, choice=i % 5), i % 50 // 5, counts)] += 1
    assert chi_square_p(observed, exact(LOGITS, params, counts)) > 1e-3


@pytest.mark.parametrize("neighbour", ["position", "choice", "seed"])
def test_neighbouring_positions_choices_and_seeds_draw_independently(neighbour: str) -> None:
    def draw(i: int) -> int:
        params = SamplingParams(seed=i if neighbour == "seed" else 5, choice=i if neighbour == "choice" else 0)
        return sample(LOGITS[:4], params, i if neighbour == "position" else 9, {})

    drawn = [draw(i) for i in range(NUM_DRAWS + 1)]
    pairs = torch.zeros(4, 4)
    for first, second in pairwise(drawn):
        pairs[first, second] += 1
    assert scipy.stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_leaving_out_hopeless_tokens_changes_no_draw(spread: float) -> None:
    params = SamplingParams(seed=3, top_p=0.999)
    for position in range(200):
        logits = random_logits(400, spread, seed=position)
        noise = gumbel_noise(3, 0, position, torch.arange(400))
        assert sample(logits, params, position, {}) == int(
            (shape_logits(logits, params, {}).double() + noise).argmax()
        )


def test_the_luckiest_token_still_beats_the_unluckiest_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise lies between those of u = 2**-33 and u = 1 - 2**-33: no token within that reach is left out."""
    lowest, highest = -math.log(-math.log(2.0**-33)), -math.log(-math.log1p(-(2.0**-33)))
    hashed = torch.tensor([0, -1 << 16], dtype=torch.int32)  # once folded, the lowest and the highest
    monkeypatch.setattr("taps.sampling._hash_but_folded", lambda keys, ids: hashed[ids.long()] + 0 * keys[0])
    assert sample(torch.tensor([0.0, lowest - highest + 1e-3]), SamplingParams(), 0, {}) == 1
    assert sample(torch.tensor([0.0, lowest - highest - 1e-3]), SamplingParams(), 0, {}) == 0


@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 5}])
def test_sampling_is_the_argmax_over_every_token(spread: float, options: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(7)
    for position in range(150):
        logits = torch.randn(400, generator=draw) * spread
        params = SamplingParams(seed=position << 40, **options)
        noise = gumbel_noise(params.seed, 0, position, torch.arange(400))
        every = shape_logits(logits, params, {}).double() + noise
        assert sample(logits, params, position, {}) == int(every.argmax())


def test_penalties_follow_the_formula_and_count_tokens_once_per_kind() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    wanted = LOGITS.clone()
    wanted[0] -= 0.5 + 2 * 0.25
    wanted[3] -= 0.5 + 1 * 0.25
    wanted[7] -= 0.5 + 4 * 0.25
    assert torch.allclose(shape_logits(LOGITS, params, COUNTS), wanted)


def test_penalties_come_before_the_temperature() -> None:
    params = SamplingParams(temperature=2.0, frequency_penalty=1.0)
    assert shape_logits(LOGITS, params, {3: 2})[3] == pytest.approx((2.0 - 2.0) / 2.0)


def test_without_penalties_the_history_changes_nothing() -> None:
    assert torch.equal(
        shape_logits(LOGITS, SamplingParams(), COUNTS), shape_logits(LOGITS, SamplingParams(), {})
    )


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1e-9, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]), (1.0, None)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, nucleus: Sequence[int] | None) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    assert kept(shape_logits(logits, SamplingParams(top_p=top_p), {})) == (nucleus or [0, 1, 2, 3])


def test_top_p_keeps_all_that_tie_with_the_last_one() -> None:
    logits = torch.tensor([0.0, -9.0, 0.0, 0.0])
    assert kept(shape_logits(logits, SamplingParams(top_p=0.4), {})) == [0, 2, 3]


def test_top_p_is_exact_when_the_nucleus_is_larger_than_the_first_look() -> None:
    logits = random_logits(3000, spread=0.3)
    probabilities = logits.double().softmax(0).sort(descending=True).values
    size = int((probabilities.cumsum(0) < 0.9).sum()) + 1
    nucleus = kept(shape_logits(logits, SamplingParams(top_p=0.9), {}))
    assert len(nucleus) == size > 1024
    assert set(nucleus) == set(logits.topk(size).indices.tolist())


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_nucleus_is_that_of_double_precision(top_p: float, spread: float) -> None:
    logits = random_logits(20_000, spread)
    mass = logits.double().softmax(0).sort(descending=True).values.cumsum(0)
    size = int((mass < top_p).sum()) + 1
    assert len(kept(shape_logits(logits, SamplingParams(top_p=top_p), {}))) == size


@pytest.mark.parametrize(("top_k", "survivors"), [(0, 8), (1, 1), (3, 3), (8, 8), (100, 8)])
def test_top_k_keeps_the_best_k(top_k: int, survivors: int) -> None:
    shaped = shape_logits(LOGITS, SamplingParams(top_k=top_k), {})
    assert set(kept(shaped)) == set(LOGITS.topk(survivors).indices.tolist())


def test_top_k_keeps_all_that_tie_with_the_last_one() -> None:
    assert kept(shape_logits(torch.tensor([1.0, 2.0, 1.0, 0.0]), SamplingParams(top_k=2), {})) == [0, 1, 2]


def test_top_p_is_taken_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(shape_logits(logits, SamplingParams(top_k=2, top_p=0.55), {})) == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shaping_is_done_in_float32_and_leaves_the_logits_alone(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    before = logits.clone()
    shaped = shape_logits(logits, SamplingParams(temperature=0.7, top_k=4, presence_penalty=1.0), COUNTS)
    assert shaped.dtype == torch.float32
    assert torch.equal(logits, before)


def test_shaping_float32_logits_leaves_them_alone() -> None:
    before = LOGITS.clone()
    shape_logits(LOGITS, SamplingParams(temperature=0.0, presence_penalty=1.0), COUNTS)
    assert torch.equal(LOGITS, before)
