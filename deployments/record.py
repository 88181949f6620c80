"""The record of one request: what it asked for and what it came to.

The router feeds it; metrics, the log and the response read it. All its answers are counted together.
Knows steps and counts; nothing of JSON or Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deployments.requests import Generation
from taps.adaptive.gains import accepted_of
from taps.decoding.metrics import SpeculationCounts, drafters_in
from taps.decoding.policy import Step
from taps.tree import ProposalTree


@dataclass
class _Answer:
    """One of a request's answers."""

    is_first: bool  # of its prompt's: others find in the cache what that one has put there
    last: float  # when it came to its newest step
    num_prefills: int = 0
    numerics: str | None = None


class RequestRecord:
    """What one request came to."""

    def __init__(
        self, request_id: str, jobs: Sequence[Generation], text_of: Callable[[int], str] = str
    ) -> None:
        """Args: jobs: its answers, which differ in their prompts and in their noise alone; text_of: a token."""
        self._text_of = text_of
        job = jobs[0]
        self._started = time.perf_counter()
        self._answers = [_Answer(not one.state.sampling.choice, self._started) for one in jobs]
        self.prompt_tokens = sum(len(one.state.tokens) for one in jobs if not one.state.sampling.choice)
        self.cached_tokens = 0  # of the prompts, found in the verifier's cache
        self.new_tokens = 0
        self.strategy = job.strategy
        self.drafters = job.drafters
        self.counts = SpeculationCounts()
        self.batch_sizes = 0
        self.num_prefills = 0
        self.numerics_changed = 0  # times it went on where bits may differ
        self.draft_ms = self.verify_ms = 0.0
        self.step_ms, self.step_tokens = 0.0, 0  # since the step before, and what the newest delivered
        self.drafted_by_drafter: Counter[int] = Counter()
        self.passes_by_drafter: Counter[int] = Counter()  # those that checked something of it
        self.steps: list[dict[str, Any]] | None = [] if job.explains else None  # what each did, and why
        self.id = request_id
        self._first_ms = 0.0

    def take(self, step: Step, delivered: int, index: int = 0) -> None:
        """Count one step of one answer, of whose tokens so many were delivered."""
        now, answer = time.perf_counter(), self._answers[index]
        self.step_ms, answer.last = (now - answer.last) * 1e3, now
        self.step_tokens = delivered
        self.new_tokens += delivered
        if step.is_prefill:
            if answer.is_first and not answer.num_prefills:
                self.cached_tokens += step.verdict.num_reused
            self.num_prefills += 1
            answer.num_prefills += 1
            self.numerics_changed += answer.numerics not in (None, step.numerics)
            answer.numerics = step.numerics
            self._first_ms = self._first_ms or self.step_ms
        else:
            self.counts.observe(step.verdict, delivered)
            self.batch_sizes += step.verdict.batch_size * step.verdict.num_passes
            of_node = [drafters_in(owners) for owners in step.drafted]
            self.drafted_by_drafter.update(chain.from_iterable(of_node))
            self.passes_by_drafter.update({*chain.from_iterable(of_node)})
            self.draft_ms += step.draft_ms
            self.verify_ms += step.verify_ms
            if self.steps is not None:
                self.steps.append(self._explained(step, index))

    def _explained(self, step: Step, index: int) -> dict[str, Any]:
        verdict = step.verdict
        whose = {"index": index} if len(self._answers) > 1 else {}
        tree = {} if verdict.checked is None else {"tree": self._nodes(verdict.checked, verdict.tokens)}
        kept = [[self.drafters[i] for i in drafters_in(owners)] for owners in step.drafted]
        return {
            **whose,
            **(step.why or {}),
            "kept": kept,
            "accepted": len(verdict.owners),
            "tokens": len(verdict.tokens),
            "text": [self._text_of(token) for token in verdict.tokens],
            **tree,
            "passes": verdict.num_passes,
            "batch": verdict.batch_size,
            "pass_ms": None if verdict.cost is None else round(verdict.cost.ms, 2),
            "draft_ms": round(step.draft_ms, 2),
            "verify_ms": round(step.verify_ms, 2),
        }

    def _nodes(self, tree: ProposalTree, decided: Sequence[int]) -> list[dict[str, Any]]:
        """The drafted nodes of a tree: parents by their place here, -1 for the root."""
        accepted = accepted_of(tree.tokens, tree.parents, decided)
        return [
            {
                "text": self._text_of(tree.tokens[node]),
                "parent": tree.parents[node] - 1,
                "drafters": [self.drafters[i] for i in drafters_in(tree.owners[node])],
                "accepted": accepted[node],
            }
            for node in range(1, len(tree))
        ]

    @property
    def per_pass(self) -> dict[str, float]:
        """Means over the passes: sessions that shared one, milliseconds of waiting for drafts and for it."""
        passes = max(self.counts.num_passes, 1)
        means = {"batch_size": self.batch_sizes, "draft_ms": self.draft_ms, "verify_ms": self.verify_ms}
        return {name: round(whole / passes, 2) for name, whole in means.items()}

    def line(self, outcome: str) -> str:
        seconds = time.perf_counter() - self._started
        counts, means = self.counts, self.per_pass
        accepted = ", ".join(f"{name} {counts.accepted_by_drafter[i]}" for i, name in enumerate(self.drafters))
        return (
            f"{self.id} {outcome}: {self.prompt_tokens} prompt ({self.cached_tokens} cached) + "
            f"{self.new_tokens} new tokens in {seconds:.2f} s ({self.new_tokens / seconds:.1f}/s), "
            f"first after {self._first_ms:.0f} ms; "
            f"{self.strategy}: {counts.num_passes} passes, {counts.acceptance_length:.2f} tokens/pass, "
            f"batch {means['batch_size']:.1f}, draft {means['draft_ms']:.1f} ms, "
            f"verify {means['verify_ms']:.1f} ms" + (f"; accepted: {accepted}" if accepted else "")
        )
