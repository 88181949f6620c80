"""Recorded conversations made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from taps.recording.shards import Recording, save_shard, shards


def recording(tokens: Sequence[int], answer_start: int, name: str = "r") -> Recording:
    """Feature i is (i, -i)."""
    positions = torch.arange(len(tokens) - 1, dtype=torch.bfloat16)
    features = torch.stack([positions, -positions], dim=1)
    return Recording(name, torch.tensor(tokens, dtype=torch.int32), answer_start, features)


def saved(directory: Path, *recordings: Recording) -> Path:
    directory.mkdir(exist_ok=True)
    save_shard(directory / f"shard-{len(shards(directory)):05d}.safetensors", recordings)
    return directory
