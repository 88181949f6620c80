"""Recorded conversations on disk: token ids and, where they were kept, the target's features.

Knows tensors and files; nothing of targets or heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taps.recording.sources import ANSWER_MARK, InvalidData


@dataclass(frozen=True)
class Recording:
    """One conversation as the target decided it."""

    id: str
    tokens: Tensor  # [n] int32
    answer_start: int  # index of the first token the target generated
    features: Tensor  # [n - 1, H] bfloat16; row i belongs to tokens[i]. [0, 0] where they were not kept

    @property
    def num_answer_tokens(self) -> int:
        return len(self.tokens) - self.answer_start


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.safetensors"))


def save_shard(
    path: Path, recordings: Sequence[Recording], target: str = "", answering: Mapping[str, Any] | None = None
) -> None:
    """Write recordings to one file, whole or not at all.

    Args: target: the fingerprint of who answered; answering: how (JSON).
    """
    header = {
        "target": target,
        "answering": dict(answering or {}),
        "ids": [r.id for r in recordings],
        "answer_tokens": sum(r.num_answer_tokens for r in recordings),
    }
    tensors = {
        "tokens": torch.cat([r.tokens for r in recordings]),
        "lengths": torch.tensor([len(r.tokens) for r in recordings]),
        "answer_starts": torch.tensor([r.answer_start for r in recordings]),
    }
    if recordings[0].features.numel():
        tensors["features"] = torch.cat([r.features for r in recordings])
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"header": json.dumps(header)})
    partial.rename(path)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise InvalidData(f"{path} cannot be read, perhaps it is not whole; remove it: {error}") from error


def shard_header(path: Path) -> dict[str, Any]:
    """{"target", "answering", "ids", "answer_tokens"} of a shard, without reading its tensors."""
    with _opened(path) as file:
        header: dict[str, Any] = json.loads(file.metadata()["header"])
    return header


@dataclass(frozen=True)
class ShardRow:
    """Where one recording lies, and what can be known without reading it."""

    shard: Path
    id: str
    first: int  # of its tokens in the shard
    number: int  # of the recording in the shard: feature rows before it are `first - number`
    length: int
    answer_start: int
    has_features: bool

    @property
    def num_answer_tokens(self) -> int:
        return self.length - self.answer_start

    @property
    def prompt(self) -> tuple[str, int]:
        """The prompt's id, and which of its answers this is."""
        name, mark, turn = self.id.rpartition(ANSWER_MARK)
        return (name, int(turn)) if mark and turn.isdecimal() else (self.id, 0)


def shard_rows(path: Path) -> list[ShardRow]:
    """The recordings of a shard, without their tokens."""
    with _opened(path) as file:
        ids = json.loads(file.metadata()["header"])["ids"]
        lengths = file.get_tensor("lengths").tolist()
        starts = file.get_tensor("answer_starts").tolist()
        tensors = file.keys()
    rows, first = [], 0
    for number, (row_id, length, start) in enumerate(zip(ids, lengths, starts, strict=True)):
        rows.append(ShardRow(path, row_id, first, number, length, start, "features" in tensors))
        first += length
    return rows


def load_row(row: ShardRow) -> Recording:
    """One recording, read by itself."""
    with _opened(row.shard) as file:
        tokens: Tensor = file.get_slice("tokens")[row.first : row.first + row.length]
        features = torch.empty(0, 0)
        if row.has_features:
            start = row.first - row.number
            features = file.get_slice("features")[start : start + row.length - 1]
    return Recording(row.id, tokens, row.answer_start, features)


def load_tokens(row: ShardRow) -> Tensor:
    """The tokens of one recording [n], prompt and answer."""
    with _opened(row.shard) as file:
        tokens: Tensor = file.get_slice("tokens")[row.first : row.first + row.length]
    return tokens


def load_shard(path: Path) -> list[Recording]:
    return [load_row(row) for row in shard_rows(path)]
