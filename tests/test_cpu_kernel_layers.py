"""The kernel's linear layers and whole decoder layers in bfloat16: right, and a row's bits its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taps.engine.threads import computing_with
from taps.models.cache import PagedCache
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.drafting import TreesAsked
from taps.models.cpu_kernel.kernel import CpuKernel
from taps.models.kernel_operations import KernelLayers, KernelOperations, kernel_drafts
from taps.models.layers import ComposedLayers
from taps.models.operations import HeadNorms, Heads, LayerWeights, LinearWeights, Norm, Rope
from taps.models.step import Segment, Step, StepInputs

SHAPES = [(960, 576), (576, 1536), (970, 64), (1, 2), (33, 130), (64, 6)]


@pytest.fixture(scope="module", params=machine_levels())
def kernel(request: pytest.FixtureRequest) -> CpuKernel:
    return CpuKernel(request.param)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (noise * scale).to(torch.bfloat16)


def product(kernel: CpuKernel, x: Tensor, weights: LinearWeights) -> Tensor:
    out = x.new_empty(len(x), len(weights.weight))
    kernel.linear(x, kernel.pack(*weights), out)
    return out


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_is_right_to_the_rounding_of_its_type(
    kernel: CpuKernel, outputs: int, inputs: int, biased: bool
) -> None:
    weights = LinearWeights(drawn(outputs, inputs, seed=1), drawn(outputs, seed=2) if biased else None)
    x = drawn(37, inputs, seed=3)
    exact = x.double() @ weights.weight.double().T
    if weights.bias is not None:
        exact += weights.bias.double()
    bound = 2**-8 * exact.abs() + 1e-5 * (x.double().abs() @ weights.weight.double().abs().T) + 1e-30
    assert ((product(kernel, x, weights).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("inputs", [576, 118])
def test_a_row_of_a_linear_layer_has_the_same_bits_whatever_rows_there_are(
    kernel: CpuKernel, threads: int, inputs: int
) -> None:
    weights = LinearWeights(drawn(970, inputs, seed=1), drawn(970, seed=2))
    x = drawn(300, inputs, seed=3)
    whole = product(kernel, x, weights)
    packed = kernel.pack(*weights)
    with computing_with(threads):
        for rows in (*range(1, 35), 64, 299, 300):
            out = x.new_empty(rows, 970)
            kernel.linear(x[300 - rows :], packed, out)
            assert torch.equal(out, whole[300 - rows :]), f"{rows} rows"


def test_more_threads_than_stretches_of_weights_miss_no_output(kernel: CpuKernel) -> None:
    weights = LinearWeights(drawn(4099, 32, seed=1), None)
    x, packed = drawn(3, 32, seed=2), kernel.pack(*weights)
    whole = product(kernel, x, weights)
    with computing_with(70):
        for _ in range(20):
            out = torch.full_like(whole, torch.nan)
            kernel.linear(x, packed, out)
            assert torch.equal(out, whole)


@pytest.mark.parametrize("inputs", [64, 70])
def test_a_row_that_is_not_a_number_is_no_other_rows_matter(kernel: CpuKernel, inputs: int) -> None:
    weights = LinearWeights(drawn(64, inputs, seed=1), None)
    x = drawn(13, inputs, seed=3)
    clean = product(kernel, x, weights)
    x[5] = torch.nan
    found = product(kernel, x, weights)
    assert found[5].isnan().all()
    others = [row for row in range(13) if row != 5]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("x", [drawn(2, 62), drawn(2, 64).float(), drawn(64, 2).T, drawn(64)])
def test_rows_that_do_not_fit_are_refused(kernel: CpuKernel, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x is .* it must be torch.bfloat16 \[\d+, 64\], contiguous"):
        kernel.linear(x, kernel.pack(drawn(32, 64)), x.new_empty(len(x), 32, dtype=torch.bfloat16))


def layer_weights(seed: int, heads: Heads, hidden: int, width: int, plain: bool) -> LayerWeights:
    def linear(outputs: int, inputs: int, number: int) -> LinearWeights:
        bias = None if plain else drawn(outputs, seed=seed + number + 50)
        return LinearWeights(drawn(outputs, inputs, seed=seed + number, scale=inputs**-0.5), bias)

    return LayerWeights(
        None if plain and seed == 0 else Norm(drawn(hidden, seed=seed + 1), 1e-5),
        Norm(drawn(hidden, seed=seed + 2), 1e-6),
        linear(heads.width, hidden, 3), linear(hidden, heads.queries * heads.dim, 4),
        linear(2 * width, hidden, 5), linear(hidden, width, 6), heads,
        None if plain else HeadNorms(drawn(heads.dim, seed=seed + 7), drawn(heads.dim, seed=seed + 8), 1e-6),
    )  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_in_one_call_are_the_operations_one_by_one_to_the_bit(
    kernel: CpuKernel, plain: bool, threads: int
) -> None:
    """Two sequences, one with a tree, over what is cached already."""
    heads, hidden, width = Heads(4, 2, 32, 32**-0.5), 96, 160
    operations = KernelOperations(kernel, torch.bfloat16)
    weights = [layer_weights(100 * i, heads, hidden, width, plain) for i in range(3)]
    fused = operations.layers(weights)
    assert isinstance(fused, KernelLayers)
    rope = Rope(1e4 ** -(torch.arange(16).float() / 16))
    rope.cover(200)

    def run(layers: KernelLayers | ComposedLayers) -> list[Tensor]:
        cache, found = PagedCache(2, 200), []
        one, other = cache.open(), cache.open()
        for sequence, rows in ((one, 70), (other, 9)):
            cache.reserve(sequence, rows + 8)
            found.append(
                layers(
                    drawn(rows, hidden, seed=rows),
                    Step([Segment(sequence, rows)], StepInputs(torch.device("cpu"))),
                    cache,
                    rope,
                )
            )
            sequence.length += rows
        tree = Segment(one, 4, [(0,), (0, 1), (0, 2), (0, 2, 3)])
        step = Step([tree, Segment(other, 1)], StepInputs(torch.device("cpu")))
        return [*found, layers(drawn(5, hidden, seed=5), step, cache, rope)]

    with computing_with(threads):
        pairs = zip(run(fused), run(ComposedLayers(operations, weights)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_layers_that_do_not_join_are_refused(kernel: CpuKernel) -> None:
    heads = Heads(4, 2, 32, 0.2)
    weights = layer_weights(0, heads, 96, 160, True)
    operations = KernelOperations(kernel, torch.bfloat16)
    with pytest.raises(ValueError, match="do not join"):
        operations.layers([weights._replace(down=LinearWeights(drawn(96, 158), None))])


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ASKED = TreesAsked(integers(0, 1)[None], integers(2), integers(7), integers(8), integers(2), integers(3))


@pytest.mark.parametrize(
    ("vocabulary", "width", "asked", "says"),
    [
        (range(40), 96, ASKED._replace(committed=integers(3000)), "angles of 2048 positions.* reach 3003"),
        (range(40), 96, ASKED._replace(nodes=integers(0)), "a tree has a node"),
        (range(40), 96, ASKED._replace(children=integers(3, 3)), "children is"),
        (range(40), 96, ASKED._replace(table=integers(0, 99)[None], committed=integers(70)), "block"),
        (range(11, 51), 96, ASKED, "tokens that are not below 50"),
        (range(40), 94, ASKED, "a draft head is fc"),
    ],
)
def test_drafts_that_cannot_be_grown_are_refused(
    kernel: CpuKernel, vocabulary: range, width: int, asked: TreesAsked, says: str
) -> None:
    operations, heads = KernelOperations(kernel, torch.bfloat16), Heads(4, 2, 32, 32**-0.5)
    layers = operations.layers([layer_weights(0, heads, 96, 160, True)])
    fc, lm_head = (operations.linear(LinearWeights(drawn(*shape), None)) for shape in ((96, 192), (40, width)))
    drafts = kernel_drafts(drawn(50, 96), torch.tensor(vocabulary), fc, layers, lm_head)
    assert drafts is not None
    rope = Rope(1e4 ** -(torch.arange(16).float() / 16))
    rope.cover(1)
    with pytest.raises(ValueError, match=says):
        drafts(asked, drawn(1, 96), PagedCache(1, 200), rope)
