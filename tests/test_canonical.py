"""A row's bits depend on its own sequence alone: of each operation, of attention, and of whole models."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from taps.engine.threads import computing_with
from taps.models.cache import CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.kernel_operations import cpu_operations
from taps.models.linear import MOST_ROWS, RowLinear
from taps.models.operations import Heads, Operations, Rope
from taps.models.probe import Probe
from taps.models.reference import ReferenceOperations, Scoring, attend, write
from taps.models.step import Segment, Step, StepInputs
from tests.test_models import FAMILIES, build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS = [1, 2, 3, 5, 8]
CPU = torch.device("cpu")


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with computing_with(request.param):
        yield request.param


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_alone(operation: Callable[[Tensor], Tensor], rows: Tensor, counts: Sequence[int]) -> None:
    """Each of the first rows has the same bits alone and among any number of others."""
    alone = torch.cat([operation(rows[i : i + 1]) for i in range(4)])
    for count in counts:
        among = operation(rows[:count])
        known = min(count, 4)
        assert torch.equal(among[:known], alone[:known]), count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (64, 1536), (640, 2304), (1000, 3000), (97, 33)])
def test_a_linear_layer_gives_a_row_the_same_bits_among_any_number(
    outputs: int, inputs: int, dtype: torch.dtype, threads: int
) -> None:
    linear = RowLinear(drawn(outputs, inputs, dtype=dtype, seed=1), drawn(outputs, dtype=dtype, seed=2))
    most = MOST_ROWS[dtype]
    counts = (1, 2, 3, 5, 16, 17, 64, most, most + 1, 2 * most + 1)
    same_alone(linear, drawn(2 * most + 1, inputs, dtype=dtype, seed=3), counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["norm", "gate"])
@pytest.mark.parametrize("make", [ReferenceOperations, lambda dtype: cpu_operations(dtype, 64)])
def test_row_wise_operations_give_a_row_the_same_bits_among_any_number(
    make: Callable[[torch.dtype], Operations], kind: str, dtype: torch.dtype, threads: int
) -> None:
    operations = make(dtype)
    weight = drawn(100, dtype=dtype, seed=1)

    def norm(rows: Tensor) -> Tensor:
        return operations.norm(rows, weight, 1e-5)

    operation = norm if kind == "norm" else operations.gate
    same_alone(operation, drawn(1500, 100, dtype=dtype, seed=2), (1, 2, 3, 7, 64, 700, 1500))


def naive(query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """One row [heads, d] over all of keys and values [L, kv_heads, d], in float64."""
    group = query.shape[0] // keys.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), k) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if scoring.rule is not None:
        last = len(keys) - 1
        seen = scoring.rule(0, 0, torch.tensor(last), torch.arange(len(keys)))
        scores = scores.masked_fill(~seen, -math.inf)
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.double()[:, None]], 1)
    weights = scores.softmax(-1)[:, : len(keys)]
    return torch.einsum("hl,lhd->hd", weights, v)


SCORINGS = {
    "plain": Scoring(0.3),
    "soft-capped": Scoring(0.3, softcap=2.0),
    "with sinks": Scoring(0.3, sinks=drawn(6, seed=9)),
    "in a window": Scoring(0.3, rule=lambda b, h, q, k: k > q - 70),
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("committed", [0, 1, 63, 64, 130])
def test_the_reference_computes_what_plain_attention_does_along_every_path(
    committed: int, scoring: Scoring
) -> None:
    """With everything a row does not see poisoned."""
    rng = random.Random(committed)
    heads, kv_heads, dim, n = 6, 2, 8, 12
    cache = PagedCache(2, 256)
    stranger, sequence = cache.open(), cache.open()
    cache.reserve(stranger, 100)
    keys, values = cache.layer(0, drawn(1), kv_heads, dim, dim)
    keys.fill_(math.nan)
    values.fill_(math.nan)
    prefix_k, prefix_v = drawn(committed, kv_heads, dim, seed=1), drawn(committed, kv_heads, dim, seed=2)
    if committed:
        cache.reserve(sequence, committed)
        write(Step([Segment(sequence, committed)], StepInputs(CPU)), prefix_k, prefix_v, keys, values)
        cache.commit([Kept(sequence, range(committed))])
    paths: list[tuple[int, ...]] = [(0,)]
    for row in range(1, n):
        paths.append((*paths[rng.randrange(row)], row))
    cache.reserve(sequence, n)
    step = Step([Segment(sequence, n, paths)], StepInputs(CPU))
    new_k, new_v, query = (drawn(n, h, dim, seed=s) for h, s in ((kv_heads, 3), (kv_heads, 4), (heads, 5)))
    write(step, new_k, new_v, keys, values)
    ours = attend(step, query, keys, values, scoring)
    for row, path in enumerate(paths):
        k, v = torch.cat([prefix_k, new_k[list(path)]]), torch.cat([prefix_v, new_v[list(path)]])
        assert torch.allclose(ours[row].double(), naive(query[row], k, v, scoring), atol=1e-5)


class Sequences:
    """Attention of one layer over sequences that are drawn at random, through one way to compute it."""

    def __init__(self, operations: Operations, dtype: torch.dtype, heads: Heads) -> None:
        self._operations, self._heads = operations, heads
        self._dtype = dtype
        self._rope = Rope(1.0 / 10000 ** (torch.arange(0, heads.dim, 2) / heads.dim))
        self._rope.cover(512)
        self.cache = PagedCache(6, 512)

    def rows(self, seed: int, count: int) -> Tensor:
        return drawn(count, self._heads.width, dtype=self._dtype, seed=seed)

    def attend(self, segments: Sequence[Segment], qkv: Tensor) -> Tensor:
        for segment in segments:
            self.cache.reserve(segment.sequence, segment.offsets.stop)
        step = Step(segments, StepInputs(CPU))
        return self._operations.attend(0, qkv, step, self.cache, self._heads, self._rope, None)

    def append(self, sequence: CachedSequence, qkv: Tensor) -> Tensor:
        out = self.attend([Segment(sequence, len(qkv))], qkv)
        self.cache.commit([Kept(sequence, range(len(qkv)))])
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [ReferenceOperations, lambda dtype: cpu_operations(dtype, 32)])
def test_attention_gives_a_row_the_same_bits_whatever_shares_its_step(
    make: Callable[[torch.dtype], Operations], dtype: torch.dtype, threads: int
) -> None:
    of = Sequences(make(dtype), dtype, Heads(6, 2, 32, 0.2))
    qkv, total = of.rows(1, 150), 150
    one = of.cache.open()
    alone = torch.cat([of.append(one, qkv[i : i + 1]) for i in range(total)])
    for size in (77, total):
        chunked = of.cache.open()
        pieces = [of.append(chunked, qkv[i : i + size]) for i in range(0, total, size)]
        assert torch.equal(torch.cat(pieces), alone), size
        of.cache.close(chunked)
    for committed in (1, 60, 63, 64, 100):
        sequence, other = of.cache.open(), of.cache.open()
        of.append(sequence, qkv[:committed])
        of.append(other, of.rows(2, 90))
        tree, paths, along = _tree(of, qkv[committed : committed + 6], seed=committed)
        segments = [Segment(other, 5), Segment(sequence, len(tree), paths)]
        rows = of.attend(segments, torch.cat([of.rows(3, 5), tree]))[5:]
        assert torch.equal(rows[along], alone[committed : committed + 6]), committed
        of.cache.commit([Kept(sequence, along)])
        assert torch.equal(of.append(sequence, qkv[committed + 6 : committed + 9]), alone[committed + 6 :][:3])
        of.cache.close(sequence)
        of.cache.close(other)


def _tree(of: Sequences, path: Tensor, seed: int) -> tuple[Tensor, list[tuple[int, ...]], list[int]]:
    """Rows of a tree that has these along one of its paths, and where they are."""
    rows, paths = list[Tensor](), list[tuple[int, ...]]()
    along: tuple[int, ...] = ()
    for depth, row in enumerate(path):
        above = along
        for sibling in (of.rows(seed + depth, 1)[0], row, of.rows(seed + depth + 50, 1)[0]):
            paths.append((*above, len(rows)))
            if sibling is row:
                along = paths[-1]
            rows.append(sibling)
    return torch.stack(rows), paths, list(along)


def test_levels_added_one_after_the_other_are_the_tree_at_once() -> None:
    of = Sequences(cpu_operations(torch.float32, 32), torch.float32, Heads(4, 4, 32, 0.2))
    sequence, again = of.cache.open(), of.cache.open()
    prefix, first, second = of.rows(1, 62), of.rows(2, 3), of.rows(3, 4)
    for each in (sequence, again):
        of.append(each, prefix)
    paths = [(0,), (1,), (2,), (0, 3), (0, 4), (1, 5), (2, 6)]
    whole = of.attend([Segment(sequence, 7, paths)], torch.cat([first, second]))
    one = of.attend([Segment(again, 3, paths[:3])], first)
    two = of.attend([Segment(again, 4, paths[3:], drafted=3)], second)
    assert torch.equal(torch.cat([one, two]), whole)


def test_angles_do_not_depend_on_when_they_were_asked_for() -> None:
    frequencies = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    early, late = Rope(frequencies), Rope(frequencies)
    early.cover(5)
    late.cover(5000)
    early.cover(4100)
    assert len(early.cos) >= 4100
    assert torch.equal(early.cos, late.cos[: len(early.cos)])


WHOLE_VECTORS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral with a sliding window", "gemma2 with soft-capping"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_passes(family: str, dtype: torch.dtype) -> None:
    """Through our own decoder for any width; through transformers' code where rows are whole vectors.

    Elsewhere its elementwise operations round a row's tail by where in the step it lies: there the probe fails.
    """
    config = copy.deepcopy(FAMILIES[family])
    if family not in ("llama", "qwen3"):
        config.update(WHOLE_VECTORS)
    assert Probe(CausalLM(build(config).to(dtype))).fault() is None


def test_the_probe_finds_what_depends_on_the_number_of_rows() -> None:
    model = CausalLM(build(FAMILIES["llama"]))
    extend = model.extend

    def sloppy(
        segments: Sequence[Segment], tokens: Sequence[int], keep: Sequence[int], cache: PagedCache
    ) -> tuple[Tensor, Tensor]:
        features, logits = extend(segments, tokens, keep, cache)
        return features, logits + (1e-6 if len(tokens) == 13 else 0.0)

    object.__setattr__(model, "extend", sloppy)
    assert Probe(model).fault() == "how many rows are computed at once changes a row's bits"
