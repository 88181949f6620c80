"""Memory: what is left is found out wherever a limit is set, and tensors begin where nothing else lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from taps.models import memory
from taps.models.memory import HugePages, free_memory, require_memory, zeros

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


def test_a_containers_limit_holds_in_either_version_less_what_is_used_but_for_files(tmp_path: Path) -> None:
    stat = "anon 5\ninactive_file 100\nactive_file 7\n"
    write(tmp_path, {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": stat})
    assert list(memory._container_free(tmp_path)) == [700]
    stat = "inactive_file 1\ntotal_inactive_file 50\n"
    write(tmp_path, {
        "memory.max": "max\n", "memory/memory.limit_in_bytes": "500",
        "memory/memory.usage_in_bytes": "600", "memory/memory.stat": stat,
    })  # fmt: skip
    assert list(memory._container_free(tmp_path)) == [0]
    assert list(memory._container_free(tmp_path / "nowhere")) == []


def test_more_than_is_left_is_refused_with_what_helps() -> None:
    require_memory(1 << 20, CPU, "a cache", "max_len")
    with pytest.raises(ValueError, match=r"a cache takes \d+.\d\d GiB, and .* are left: lower max_len"):
        require_memory(free_memory(CPU) + (1 << 34), CPU, "a cache", "max_len")


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1 << 21,), (3 << 22,)])
def test_tensors_are_zero_of_their_own_and_begin_on_a_line(shape: tuple[int, ...]) -> None:
    pages = HugePages()
    one, other = pages.zeros(shape, torch.bfloat16), pages.zeros(shape, torch.float32)
    large = zeros(shape, one)
    for tensor in (one, other, large):
        assert tensor.shape == shape
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(1.0)
    assert all(bool((tensor == 1).all()) for tensor in (one, other, large))
