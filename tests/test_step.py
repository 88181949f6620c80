"""A step's inputs: at the same places from step to step, copied to a device once, read by nobody who waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from taps.models.cache import PAGE, CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.step import Segment, Step, StepInputs
from tests.tiny import VOCAB, tiny_target
from tests.waits import counting_waits

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
TREE = [(0,), (0, 1), (0, 2), (0, 2, 3)]


def sequence_of(cache: PagedCache, committed: int, rows: int) -> CachedSequence:
    sequence = cache.open()
    cache.reserve(sequence, committed + rows)
    sequence.length = committed
    return sequence


def test_every_field_worked_by_hand() -> None:
    cache = PagedCache(3, 3 * PAGE)
    long, short = sequence_of(cache, PAGE - 1, 4), sequence_of(cache, 2, 8)
    segments = [Segment(long, 4, TREE), Segment(short, 2, drafted=3)]
    layout = Step(segments, StepInputs(CPU), range(10, 16), [3, 5]).on(CPU)
    a, b = long.pages
    assert {name: field.tolist() for name, field in layout._asdict().items()} == {
        "tokens": [10, 11, 12, 13, 14, 15],
        "chosen": [3, 5],
        "positions": [63, 64, 64, 65, 2, 3],
        "places": [a * PAGE + 63, b * PAGE, b * PAGE + 1, b * PAGE + 2, *(short.place(i) for i in (5, 6))],
        "committed": [63, 2],
        "drafted": [0, 3],
        "starts": [0, 4, 6],
        "is_chain": [0, 1],
        "path_ends": [0, 1, 3, 5, 8, 8, 8],
        "path_offsets": [0, 0, 1, 0, 2, 0, 2, 3],
        "table": [[a, b], [short.pages[0], 0]],
    }


def test_places_stay_and_a_step_is_copied_once() -> None:
    cache, inputs = PagedCache(8, 200), StepInputs(ELSEWHERE)
    sequences = [sequence_of(cache, 20 * i, 8) for i in range(8)]

    def places(number: int, rows: int) -> tuple[list[int], int]:
        with counting_copies() as copies:
            step = Step([Segment(s, rows) for s in sequences[:number]], inputs, range(number * rows))
            layouts = [step.on(device) for device in (CPU, ELSEWHERE, CPU, ELSEWHERE)]
        assert [list(field.shape) for field in layouts[0]] == [list(field.shape) for field in layouts[1]]
        return [field.data_ptr() for field in layouts[0]], copies.count

    first, copies = places(8, 8)
    assert copies == 1
    for number, rows in ((1, 1), (3, 5), (8, 2)):
        assert places(number, rows) == (first, 1)


def counting_copies() -> Any:
    """A context whose `count` is how many tensors were copied, and made of numbers on the host."""

    def dispatch(mode: Any, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode.count += operation.overloadpacket.__name__ in ("copy_", "_to_copy", "lift_fresh")
        return operation(*args, **(kwargs or {}))

    return type("Copies", (TorchDispatchMode,), {"__torch_dispatch__": dispatch, "count": 0})()


def test_a_step_whose_integers_were_overwritten_is_not_read() -> None:
    inputs = StepInputs(CPU)
    sequence = sequence_of(PagedCache(1, 64), 0, 2)
    step = Step([Segment(sequence, 1)], inputs, [1])
    step.on(CPU)
    Step([Segment(sequence, 1)], inputs, [2])
    with pytest.raises(AssertionError, match="another step"):
        step.on(CPU)


def through_transformers() -> Any:
    """A Llama of another activation, which our own decoder does not have."""
    config = LlamaConfig(**(tiny_target().config.to_dict() | {"sliding_window": None, "hidden_act": "gelu"}))
    torch.manual_seed(0)
    return type(tiny_target())(config).eval()


@pytest.mark.parametrize("build", [tiny_target, through_transformers])
def test_the_host_waits_for_nothing_inside_a_forward(build: Callable[[], Any]) -> None:
    model = CausalLM(build())
    cache = PagedCache(4, 200, layers=model.layer_shapes)
    sequences = [cache.open() for _ in range(3)]

    def forward(rows: int, paths: Any = None) -> int:
        for sequence in sequences:
            cache.reserve(sequence, rows)
        count = rows * len(sequences)
        with counting_waits() as waits:
            model.extend(
                [Segment(s, rows, paths) for s in sequences], [7 * i % VOCAB for i in range(count)],
                range(0, count, 2), cache,
            )  # fmt: skip
        cache.commit([Kept(s, range(rows)) for s in sequences])
        return int(waits.count)

    assert [forward(70), forward(1), forward(4, TREE)] == [0, 0, 0]


def test_waits_are_counted() -> None:
    with counting_waits() as waits, torch.inference_mode():
        x = torch.ones(3)
        assert x.max().item() == int(x.min())
        assert len(x.nonzero()) == len(x[x > 0])
        assert torch.equal(x, x)
        if x[0] > 1:
            x[x > 0] = 1
    assert waits.count == 6
