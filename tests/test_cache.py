"""The paged cache: sequences have pages of their own, and commit keeps just the rows it is told to."""

from __future__ import annotations

import random

import pytest
import torch

from taps.models.cache import PAGE, CachedSequence, CacheFull, Kept, LayerShape, PagedCache
from taps.models.reference import write
from taps.models.step import Segment, Step, StepInputs


def mark(cache: PagedCache, sequence: CachedSequence, marks: list[int], drafted: int = 0) -> None:
    """Write rows behind the committed ones whose keys and values are their marks, in two layers."""
    cache.reserve(sequence, drafted + len(marks))
    step = Step([Segment(sequence, len(marks), drafted=drafted)], StepInputs(torch.device("cpu")))
    rows = torch.tensor(marks, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)
    for layer in range(2):
        keys, values = cache.layer(layer, rows, 2, 3, 3)
        write(step, rows + layer, -rows - layer, keys, values)


def marks_of(cache: PagedCache, sequence: CachedSequence) -> list[int]:
    """The committed rows' marks, which keys and values of all layers agree on."""
    found = []
    for position in range(sequence.length):
        page, lane = divmod(sequence.place(position), PAGE)
        seen = set()
        for layer in range(2):
            keys, values = cache.layer(layer, torch.empty(0), 2, 3, 3)
            seen |= set((keys[page, :, :, lane] - layer).flatten().tolist())
            seen |= set((-values[page, :, lane] - layer).flatten().tolist())
        (one,) = seen
        found.append(int(one))
    return found


def test_what_is_committed_stays_whatever_other_sequences_do() -> None:
    rng = random.Random(0)
    cache, kept = PagedCache(4, 300), {}
    sequences = [cache.open() for _ in range(4)]
    for sequence in sequences:
        kept[sequence] = list[int]()
    for turn in range(60):
        sequence = rng.choice(sequences)
        if sequence.length > 260:
            cache.forget(sequence)
            kept[sequence] = []
        rows = [1000 * turn + i for i in range(rng.randrange(1, 12))]
        mark(cache, sequence, rows)
        path = sorted(rng.sample(range(len(rows)), rng.randrange(1, len(rows) + 1)))
        cache.commit([Kept(sequence, path)])
        kept[sequence] += [rows[i] for i in path]
        assert all(marks_of(cache, s) == kept[s] for s in sequences)


def test_sequences_that_commit_together_are_moved_at_once() -> None:
    cache = PagedCache(2, 200)
    one, other = cache.open(), cache.open()
    mark(cache, one, list(range(70)))
    mark(cache, other, list(range(100, 110)))
    cache.commit([Kept(one, range(2, 70)), Kept(other, (0, 3, 4, 9))])
    assert marks_of(cache, one) == list(range(2, 70))
    assert marks_of(cache, other) == [100, 103, 104, 109]


def test_pages_are_given_as_a_sequence_grows_and_taken_back() -> None:
    cache = PagedCache(2, 128)
    one, other = cache.open(), cache.open()
    cache.reserve(one, 1)
    assert len(one.pages) == 1
    cache.reserve(one, 65)
    cache.reserve(one, 3)
    assert len(one.pages) == 2
    cache.reserve(other, 128)
    with pytest.raises(CacheFull, match="1 pages of 64 positions are wanted, 0 are free"):
        cache.reserve(one, 129)
    assert len(one.pages) == 2, "nothing is lost by a refusal"
    cache.close(other)
    cache.reserve(one, 129)
    assert len(set(one.pages)) == 3


def test_places_are_bounded_and_come_back() -> None:
    cache = PagedCache(1, 64)
    sequence = cache.open()
    with pytest.raises(CacheFull):
        cache.open()
    beside = cache.open(beside=True)
    cache.close(beside)
    with pytest.raises(CacheFull):
        cache.open()
    cache.close(sequence)
    assert cache.open().length == 0


def test_layers_are_moved_together_where_they_are_alike_and_on_one_device() -> None:
    rows, elsewhere = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")
    shapes = [
        LayerShape(2, 3, 3, rows.device),
        LayerShape(2, 3, 3, elsewhere.device),
        LayerShape(2, 3, 4, rows.device),
    ]
    cache = PagedCache(1, 64, layers=[*shapes, shapes[0]])
    for index, like, width in ((0, rows, 3), (1, elsewhere, 3), (2, rows, 4), (3, rows, 3)):
        assert cache.layer(index, like, 2, 3, width)[0].device == like.device
    assert sorted(len(pool.keys) for pool in cache._pools) == [1, 1, 2]
    assert cache.shapes == [*shapes, shapes[0]]


def test_pages_of_a_prefix_are_shared_and_the_longest_unused_goes_first() -> None:
    cache = PagedCache(4, 256, num_tokens=4 * PAGE)
    tokens = list(range(2 * PAGE + 10))

    def computed(own: list[int], salt: str = "") -> CachedSequence:
        sequence = cache.open()
        cache.reuse(sequence, own, salt)
        rest = own[sequence.length :]
        cache.reserve(sequence, len(rest))
        cache.commit([Kept(sequence, range(len(rest)), rest)])
        return sequence

    one = computed(tokens)
    other = computed(tokens)
    assert one.pages[:2] == other.pages[:2]
    assert one.pages[2] != other.pages[2]
    cache.close(one)
    cache.close(other)
    assert cache.num_available == 4
    assert sorted(computed([7] * (2 * PAGE)).pages) == [2, 3], "free ones first"
    fourth = cache.open()
    cache.reserve(fourth, 1)
    cache.close(fourth)
    again = cache.open()
    cache.reuse(again, tokens)
    assert again.length == PAGE, "the second page had to go, before the one that leads to it"
