"""Norm and SwiGLU of the CPU kernel: near float64, in torch's roundings, each row by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taps.engine.threads import computing_with
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel, cpu_kernel
from taps.sampling import draft_noise, noise_keys
from taps.shaping import SamplingParams
from tests.paged import ROUNDING, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 16, 17, 64, 576, 1000]
EPS = 1e-5
REPEATS = 3  # a thread that has just started may find no work left


@pytest.fixture(scope="module", params=machine_levels())
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return CpuKernel(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with computing_with(1):
        yield


def _random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _norm(kernel: CpuKernel, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    out = torch.full_like(x, torch.nan)
    kernel.rms_norm(x, weight, out, EPS, residual)
    return out


def _swiglu(kernel: CpuKernel, gate_up: Tensor) -> Tensor:
    out = torch.full((len(gate_up), gate_up.shape[1] // 2), torch.nan, dtype=gate_up.dtype)
    kernel.swiglu(gate_up, out)
    return out


def _assert_rounded_like(ours: Tensor, reference: Tensor) -> None:
    """Equal to a float64 result rounded twice, but for a value that float32 puts across a rounding's edge."""
    error = (ours.double() - reference.double()).abs() / reference.double().abs().clamp(min=1e-30)
    if ours.dtype is torch.float32:
        assert float(error.max()) <= 8 * ROUNDING[ours.dtype]
    else:
        assert float(error.max()) <= 4 * ROUNDING[ours.dtype]
        assert float((error > 0).double().mean()) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_is_rounded_before_and_after_its_weight(
    kernel: CpuKernel, dtype: torch.dtype, width: int
) -> None:
    x, weight = _random(64, width, dtype=dtype, scale=3), _random(width, dtype=dtype, seed=1)
    exact = x.double()
    normed = (exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(dtype)
    _assert_rounded_like(_norm(kernel, x, weight), (normed.double() * weight.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_residual_is_added_as_torch_adds_it_then_normed(
    kernel: CpuKernel, dtype: torch.dtype, width: int
) -> None:
    x, added = _random(5, width, dtype=dtype), _random(5, width, dtype=dtype, seed=1)
    weight, stream = _random(width, dtype=dtype, seed=2), x.clone()
    out = _norm(kernel, stream, weight, added)
    assert same_bits(stream, x + added)
    assert same_bits(out, _norm(kernel, stream, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_rounds_silu_before_it_multiplies(kernel: CpuKernel, dtype: torch.dtype, width: int) -> None:
    gate_up = _random(64, 2 * width, dtype=dtype, scale=4)
    gate, up = gate_up.double().chunk(2, -1)
    _assert_rounded_like(_swiglu(kernel, gate_up), (F.silu(gate).to(dtype).double() * up).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extreme_gates_is_finite(kernel: CpuKernel, dtype: torch.dtype) -> None:
    gates = torch.tensor([[0.0, 1e4, 88, 89, -87, -88, -1e4, 3e-5, -3e-5]], dtype=dtype)
    ours = _swiglu(kernel, torch.cat([gates, torch.ones_like(gates)], 1))
    torch.testing.assert_close(ours, F.silu(gates.double()).to(dtype), rtol=4 * ROUNDING[dtype], atol=1e-30)


def test_what_is_not_a_number_stays_in_its_row(kernel: CpuKernel) -> None:
    for dtype in DTYPES:
        x, weight = _random(3, 50, dtype=dtype), torch.ones(50, dtype=dtype)
        broken = x.clone()
        broken[1, 7] = torch.nan
        ours = _norm(kernel, broken, weight)
        assert ours[1].isnan().all()
        assert same_bits(ours[[0, 2]], _norm(kernel, x, weight)[[0, 2]])
        ours = _swiglu(kernel, broken)
        assert ours[1, 7].isnan()
        assert not ours[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 17, 576, 1000])
def test_a_row_alone_has_the_bits_it_has_among_others(
    kernel: CpuKernel, dtype: torch.dtype, width: int
) -> None:
    x, weight = _random(64, 2 * width, dtype=dtype), _random(2 * width, dtype=dtype, seed=1)
    normed = torch.cat([_norm(kernel, row[None].clone(), weight) for row in x])
    gated = torch.cat([_swiglu(kernel, row[None].clone()) for row in x])
    for count in (2, 3, 7, 64):
        assert same_bits(_norm(kernel, x[:count], weight), normed[:count])
        assert same_bits(_swiglu(kernel, x[:count]), gated[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_has_the_same_bits_in_a_rows_middle_and_at_its_end(
    kernel: CpuKernel, dtype: torch.dtype
) -> None:
    gate, up = _random(1, 40, dtype=dtype), _random(1, 40, dtype=dtype, seed=1)
    whole = _swiglu(kernel, torch.cat([gate, up], 1))
    for end in range(1, 41):
        part = torch.cat([gate[:, :end], up[:, :end]], 1)
        assert same_bits(_swiglu(kernel, part), whole[:, :end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(kernel: CpuKernel, dtype: torch.dtype) -> None:
    x, weight = _random(200, 2002, dtype=dtype), _random(2002, dtype=dtype, seed=1)
    added = _random(200, 2002, dtype=dtype, seed=2)
    normed, gated, streamed = _norm(kernel, x, weight), _swiglu(kernel, x), x.clone()
    summed = _norm(kernel, streamed, weight, added)
    for threads in (2, 3, 5, 7, 8):
        with computing_with(threads):
            for _ in range(REPEATS):
                stream = x.clone()
                assert same_bits(_norm(kernel, x, weight), normed)
                assert same_bits(_swiglu(kernel, x), gated)
                assert same_bits(_norm(kernel, stream, weight, added), summed)
                assert same_bits(stream, streamed)


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_written(kernel: CpuKernel) -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    for bad, said in (
        (torch.zeros(4, 8, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(4, 9), r"\[4, 9\]"),
        (torch.zeros(8, 4).T, "not contiguous"),
        (torch.zeros(4, 8, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel.rms_norm(x, weight, bad, EPS)
        with pytest.raises(ValueError, match=said):
            kernel.rms_norm(x, weight, torch.zeros(4, 8), EPS, residual=bad)
        with pytest.raises(ValueError, match=said):
            kernel.swiglu(bad, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"weight .* must be torch.float32 \[8\]"):
        kernel.rms_norm(x, torch.ones(4), torch.zeros(4, 8), EPS)
    with pytest.raises(ValueError, match=r"computes in torch.float32, torch.bfloat16, torch.float16"):
        kernel.rms_norm(x.double(), weight.double(), torch.zeros(4, 8).double(), EPS)
    with pytest.raises(ValueError, match="rows of at least one element"):
        kernel.swiglu(torch.zeros(4, 0), torch.zeros(4, 0))
    assert torch.equal(x, torch.ones(4, 8))


def test_no_rows_are_no_work(kernel: CpuKernel) -> None:
    kernel.rms_norm(torch.ones(0, 8), torch.ones(8), torch.ones(0, 8), EPS)
    kernel.swiglu(torch.ones(0, 8), torch.ones(0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (37, 5), (8192, 4), (1000, 32)])
def test_a_drafts_candidates_are_the_best_with_their_log_probabilities(
    dtype: torch.dtype, width: int, k: int
) -> None:
    logits = (4 * torch.randn(9, width, generator=torch.Generator().manual_seed(k))).to(dtype)
    if width > 1:
        logits[3, width // 2 :] = -torch.inf
    ids, logprobs, entropies = cpu_kernel().find_best(logits, k)
    exact = logits.double().log_softmax(-1)
    order = exact.sort(dim=-1, descending=True, stable=True)
    there = order.values[:, :k] > -torch.inf
    assert torch.equal(ids.long()[there], order.indices[:, :k][there]), "of equals the first"
    torch.testing.assert_close(logprobs.double(), order.values[:, :k], rtol=0, atol=2e-5)
    terms = torch.where(exact > -torch.inf, exact.exp() * exact, 0.0)
    torch.testing.assert_close(entropies.double(), -terms.sum(-1), rtol=1e-5, atol=2e-5)


def test_a_row_of_no_numbers_has_no_candidates() -> None:
    logits = torch.randn(2, 50)
    logits[1, 7] = torch.nan
    _, logprobs, _ = cpu_kernel().find_best(logits, 4)
    assert logprobs[0].isfinite().all()
    assert logprobs[1].isnan().all()


@pytest.mark.parametrize("k", [0, 51])
def test_more_or_fewer_candidates_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"the best {k} of 50 are wanted; 1 to 50 can be had"):
        cpu_kernel().find_best(torch.randn(2, 50), k)


@pytest.mark.parametrize("level", machine_levels())
def test_candidates_are_tilted_by_the_noise_of_their_rows(level: str) -> None:
    params, positions = [SamplingParams(seed=i, choice=i % 2) for i in range(6)], [7, 7, 9, 1000, 3, 4]
    tokens = torch.randperm(49152, generator=torch.Generator().manual_seed(1))[:8192].int()
    keys = torch.cat(
        [noise_keys(params, positions, tokens.device)[..., 0], torch.ones(1, 6, dtype=torch.int32)]
    )
    keys[2, 4] = 0
    logits = torch.randn(6, 8192, generator=torch.Generator().manual_seed(2))
    noise = draft_noise(params, positions, tokens)
    noise[4] = 0.0
    expected = (logits + noise).log_softmax(-1).topk(8)
    ids, logprobs, _ = CpuKernel(level).find_best(logits, 8, (keys, tokens))
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(logprobs, expected.values, rtol=0, atol=1e-4)
