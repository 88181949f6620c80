"""What speculation did: counts in the loop, ratios at the edge. Counts of replicas and requests add up.

The acceptance length here is the only definition in the project: tokens committed per verify pass, the
bonus token included, pooled over a run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from taps.verdict import Verdict


@dataclass
class SpeculationCounts:
    """Counts of verify passes; the prefill is not one."""

    num_passes: int = 0
    num_plain_passes: int = 0  # of them, without drafts
    num_tokens: int = 0  # committed by verify passes, bonus included
    num_draft_tokens: int = 0  # drafted nodes checked
    num_accepted: int = 0  # drafted tokens accepted
    max_depth: int = 0  # the deepest draft that was checked, tokens
    accepted_lengths: Counter[int] = field(default_factory=Counter)  # accepted tokens -> passes
    # (drafter, depth from 1) -> accepted tokens it proposed there
    accepted_at: Counter[tuple[int, int]] = field(default_factory=Counter)

    def observe(self, verdict: Verdict, delivered: int) -> None:
        """Count a verdict's passes; tokens beyond the first `delivered` were cut and do not count."""
        accepted = min(len(verdict.owners), delivered)
        num_passes = max(min(verdict.num_passes, delivered), 1)
        self.num_passes += num_passes
        self.num_plain_passes += 0 if verdict.num_nodes else num_passes
        self.num_tokens += delivered
        self.num_draft_tokens += verdict.num_nodes
        self.num_accepted += accepted
        self.max_depth = max(self.max_depth, verdict.depth)
        self.accepted_lengths[accepted] += num_passes
        for depth, owners in enumerate(verdict.owners[:accepted], 1):
            self.accepted_at.update((drafter, depth) for drafter in drafters_in(owners))

    def __add__(self, other: SpeculationCounts) -> SpeculationCounts:
        """Counts of both: ratios are taken at the edge."""
        return SpeculationCounts(
            self.num_passes + other.num_passes,
            self.num_plain_passes + other.num_plain_passes,
            self.num_tokens + other.num_tokens,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted + other.num_accepted,
            max(self.max_depth, other.max_depth),
            self.accepted_lengths + other.accepted_lengths,
            self.accepted_at + other.accepted_at,
        )

    @property
    def acceptance_length(self) -> float:
        """τ, tokens per verify pass; 0 when there was none."""
        return self.num_tokens / self.num_passes if self.num_passes else 0.0

    @property
    def accepted_by_drafter(self) -> Counter[int]:
        """Drafter -> accepted tokens it proposed."""
        sums: Counter[int] = Counter()
        for (drafter, _), n in self.accepted_at.items():
            sums[drafter] += n
        return sums

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted drafted tokens per drafted node checked."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def histogram(self) -> list[int]:
        """Passes by accepted drafted tokens, from 0 to the deepest draft."""
        return [self.accepted_lengths[n] for n in range(self.max_depth + 1)]


def drafters_in(owners: int) -> list[int]:
    """The drafter numbers of owner bits."""
    return [bit for bit in range(owners.bit_length()) if owners >> bit & 1]
