"""Recorded answers as training data: which recordings share a batch, in an order the seed decides.

Knows shards and tensors; nothing of losses or heads.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from taps.recording.answers import Answers
from taps.recording.batches import Batch, collate
from taps.recording.shards import Recording, ShardRow, load_row
from taps.recording.sources import InvalidData

_POOL_BATCHES = 32  # recordings are sorted by length within so many batches
_PAIRS_BATCH = 8  # recordings
_HELD_OUT_SHARE = 50  # one conversation in so many is kept for validation
_HELD_OUT_MOST = 48

# The target's features [n - 1, H] of recordings that were kept without them.
ComputeFeatures = Callable[[Sequence[Recording]], list[Tensor]]


class RecordedData:
    """Recorded answers, split into training and held-out conversations by their ids."""

    def __init__(self, answers: Sequence[Answers], compute_features: ComputeFeatures | None = None) -> None:
        usable = [row for part in answers for row in part.rows() if row.length > 2]
        first_answers = [row for row in usable if _is_held_out(row) and row.prompt[1] == 0]
        most = min(_HELD_OUT_MOST, len(first_answers))
        # Evenly over all of them: a mixture's parts follow each other.
        self.held_out = [first_answers[i * len(first_answers) // most] for i in range(most)]
        # Those not measured with are not trained on either: another run, that starts from this head, may.
        self.training = [row for row in usable if not _is_held_out(row)]
        if not self.training:
            raise InvalidData(
                f"of {len(usable)} recorded answers all are held out to measure with: record more to train on"
            )
        self._compute_features = compute_features

    @property
    def num_answer_tokens(self) -> int:
        return sum(row.num_answer_tokens for row in self.training)

    @property
    def fingerprint(self) -> int:
        """Which recordings are trained on."""
        return zlib.crc32("\n".join(row.id for row in self.training).encode())

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[list[ShardRow]]:
        """Every training recording once: neighbours in length share a batch, batches come in random order."""
        order = random.Random(f"{seed} {epoch}")
        rows = list(self.training)
        order.shuffle(rows)
        pool = _POOL_BATCHES * batch_size
        batches = []
        for start in range(0, len(rows), pool):
            pooled = sorted(rows[start : start + pool], key=lambda row: row.length)
            batches += [pooled[i : i + batch_size] for i in range(0, len(pooled), batch_size)]
        order.shuffle(batches)
        return batches

    def pairs(self, wanted: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """About `wanted` pairs, evenly from all training recordings: tokens [n], features and labels [n, H]."""
        stride = max(1, sum(row.length for row in self.training) // wanted)
        rows = self.training[::stride]
        for start in range(0, len(rows), _PAIRS_BATCH):
            batch = self.load(rows[start : start + _PAIRS_BATCH])
            yield batch.tokens[batch.known], batch.features[batch.known], batch.labels[batch.known]

    def load(self, rows: Sequence[ShardRow]) -> Batch:
        recordings = [load_row(row) for row in rows]
        if bare := [i for i, row in enumerate(rows) if not row.has_features]:
            assert self._compute_features is not None, "these recordings were kept without features"
            computed = self._compute_features([recordings[i] for i in bare])
            for i, features in zip(bare, computed, strict=True):
                recordings[i] = replace(recordings[i], features=features)
        return collate(recordings)


def _is_held_out(row: ShardRow) -> bool:
    """By the prompt's id: all answers to one prompt are on the same side."""
    return zlib.crc32(row.prompt[0].encode()) % _HELD_OUT_SHARE == 0


def draft_vocabulary(rows: Sequence[ShardRow], size: int | None, vocab_size: int) -> Tensor | None:
    """The `size` most frequent tokens of recorded answers, sorted by id; None is the whole vocabulary.

    Ids never seen fill up in id order: byte-pair merges put frequent tokens first.
    """
    if size is None or size >= vocab_size:
        return None
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    counts -= torch.arange(vocab_size) / (2.0 * vocab_size)
    for row in rows:
        answer = load_row(row).tokens[row.answer_start :].long()
        counts += torch.bincount(answer, minlength=vocab_size)
    return counts.topk(size).indices.sort().values
