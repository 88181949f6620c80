"""Training a draft head on recorded answers (the EAGLE-2 recipe). Knows tensors and shards."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from taps.models.draft_head import DraftHead
from taps.training.dataset import Recording, load_shard, shards
from taps.training.losses import eagle_loss


@dataclass(frozen=True)
class TrainRecipe:
    """EAGLE-2 training. The defaults are good for a small target on two cores."""

    epochs: int = 4
    learning_rate: float = 1.5e-3
    batch_size: int = 16
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    feature_weight: float = 1.0
    token_weight: float = 0.1
    feature_noise: float = 0.0  # uniform in [-x, x] / 2 times 512 / row length, as EAGLE adds; 0 adds none
    seed: int = 0


class Batch(NamedTuple):
    """Right-padded sequences; pair i is (tokens[i], features[i]) = (t_{i+1}, f_i) and predicts labels[i]."""

    tokens: Tensor  # [B, T]
    features: Tensor  # [B, T, H]
    labels: Tensor  # [B, T, H]: f_{i+1}
    counts: Tensor  # [B, T] bool: the label belongs to the answer


def draft_vocabulary(directory: Path, size: int, vocab_size: int) -> Tensor | None:
    """The `size` most frequent tokens of the recorded answers, sorted by id; None for the whole vocabulary.

    Ids never seen fill up in id order: byte-pair merges put frequent tokens first.
    """
    if size >= vocab_size:
        return None
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    counts -= torch.arange(vocab_size) / (2.0 * vocab_size)
    for path in shards(directory):
        for recording in load_shard(path):
            answer = recording.tokens[recording.answer_start :].long()
            counts += torch.bincount(answer, minlength=vocab_size)
    return counts.topk(size).indices.sort().values


def collate(recordings: Sequence[Recording]) -> Batch:
    """Pad recordings to one batch. A recording of n tokens has n - 2 pairs with a known label."""
    longest = max(len(r.tokens) for r in recordings) - 2
    hidden = recordings[0].features.shape[1]
    tokens = torch.zeros(len(recordings), longest, dtype=torch.long)
    features = torch.zeros(len(recordings), longest, hidden)
    labels = torch.zeros(len(recordings), longest, hidden)
    counts = torch.zeros(len(recordings), longest, dtype=torch.bool)
    for row, recording in enumerate(recordings):
        n = len(recording.tokens) - 2
        tokens[row, :n] = recording.tokens[1:-1]
        features[row, :n] = recording.features[:-1]
        labels[row, :n] = recording.features[1:]
        counts[row, max(recording.answer_start - 2, 0) : n] = True
    return Batch(tokens, features, labels, counts)


def batches(directory: Path, batch_size: int, order: random.Random) -> Iterator[Batch]:
    """One pass over the shards: neighbours in length share a batch, batches come in random order."""
    paths = shards(directory)
    order.shuffle(paths)
    for start in range(0, len(paths), 4):
        recordings = [r for path in paths[start : start + 4] for r in load_shard(path)]
        usable = sorted((r for r in recordings if len(r.tokens) > 2), key=lambda r: len(r.tokens))
        groups = [usable[i : i + batch_size] for i in range(0, len(usable), batch_size)]
        order.shuffle(groups)
        yield from map(collate, groups)


class Trainer:
    """Trains a head in place and reports as it goes."""

    def __init__(self, head: DraftHead, directory: Path, recipe: TrainRecipe) -> None:
        self.head = head
        self._directory = directory
        self._recipe = recipe
        decayed = [p for p in head.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            decayed, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        num_recordings = sum(len(load_shard(path)) for path in shards(directory))
        self._num_steps = recipe.epochs * math.ceil(num_recordings / recipe.batch_size)
        self._step = 0

    def run(self) -> None:
        order = random.Random(self._recipe.seed)
        torch.manual_seed(self._recipe.seed)
        started, rows, shown = time.monotonic(), 0, 0.0
        for epoch in range(self._recipe.epochs):
            for batch in batches(self._directory, self._recipe.batch_size, order):
                feature, token = self._update(batch)
                rows += int(batch.counts.sum())
                elapsed = time.monotonic() - started
                if elapsed - shown > 15:
                    shown = elapsed
                    print(
                        f"epoch {epoch + 1}/{self._recipe.epochs}, step {self._step}/{self._num_steps}: "
                        f"feature loss {feature:.4f}, token loss {token:.3f}, {rows / elapsed:.0f} tokens/s",
                        flush=True,
                    )

    def _update(self, batch: Batch) -> tuple[float, float]:
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._schedule()
        features = batch.features
        if self._recipe.feature_noise:
            scale = self._recipe.feature_noise * 512 / features.shape[1]
            features = features + (torch.rand_like(features) - 0.5) * scale
        positions = torch.arange(batch.tokens.shape[1])[None]
        predicted = self.head(batch.tokens, features, positions)
        loss = eagle_loss(
            predicted[batch.counts], batch.labels[batch.counts], self.head.lm_head.weight,
            self._recipe.feature_weight, self._recipe.token_weight,
        )  # fmt: skip
        self._optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch's own lack of types
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self._recipe.max_grad_norm)
        self._optimizer.step()
        self._step += 1
        return float(loss.feature.detach()), float(loss.token.detach())

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to a twentieth."""
        warm = min(1.0, (self._step + 1) / self._recipe.warmup_steps)
        done = min(1.0, self._step / max(1, self._num_steps))
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
