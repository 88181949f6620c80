"""How well a head drafts on held-out answers while it is trained: a bad run is seen early.

Drafts greedy chains along the recorded text. Knows heads and recordings; nothing of how they are trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from taps.models.alignment import aligned_passes
from taps.models.draft_head import DraftHead
from taps.recording.batches import Batch
from taps.training.data import RecordedData

_BATCH = 16


class Validation(NamedTuple):
    accuracy: tuple[float, ...]  # share of the recorded tokens that the j-th drafted token hits, by j
    acceptance_length: float  # tokens per verify pass of greedy chains, pooled

    def line(self) -> str:
        accuracies = " ".join(f"{a:.3f}" for a in self.accuracy)
        return f"held-out accuracy by depth {accuracies}, chain acceptance length {self.acceptance_length:.3f}"


@torch.no_grad()
def validate(head: DraftHead, data: RecordedData, depth: int = 5) -> Validation:
    """Measure on all held-out recordings, with chains of `depth` tokens."""
    was_training = head.training
    head.eval()
    hit_sums, positions, tokens, passes = [0] * depth, 0, 0, 0
    for start in range(0, len(data.held_out), _BATCH):
        batch = data.load(data.held_out[start : start + _BATCH]).to(head.lm_head.weight.device)
        hits = _hits(head, batch, depth)
        hit_sums = [total + int(h[batch.answers].sum()) for total, h in zip(hit_sums, hits, strict=True)]
        positions += int(batch.answers.sum())
        for row in range(len(batch.tokens)):
            more_tokens, more_passes = _walk([h[row].tolist() for h in hits], batch.answers[row].tolist())
            tokens, passes = tokens + more_tokens, passes + more_passes
    head.train(was_training)
    accuracy = tuple(total / max(positions, 1) for total in hit_sums)
    return Validation(accuracy, tokens / max(passes, 1))


def _hits(head: DraftHead, batch: Batch, depth: int) -> list[Tensor]:
    """[B, T] bool for each pass: whether the j-th drafted token at pair i is the recorded one."""
    passes = aligned_passes(head, batch.tokens, batch.features, depth)
    drafted = (head.draft_vocab[head.lm_head(predicted).argmax(-1)] for predicted in passes)
    return [tokens == batch.next_tokens for tokens in drafted]


def _walk(hits: list[list[bool]], counts: list[bool]) -> tuple[int, int]:
    """Tokens and verify passes of decoding one recorded answer with drafted chains."""
    at = counts.index(True) + 1  # the prefill decides the first token of the answer
    end = len(counts) - counts[::-1].index(True)
    tokens = passes = 0
    while at < end:
        accepted = 0
        while accepted < len(hits) and at + accepted < end and hits[accepted][at + accepted]:
            accepted += 1
        delivered = min(accepted + 1, end - at)
        tokens, passes, at = tokens + delivered, passes + 1, at + delivered
    return tokens, passes
