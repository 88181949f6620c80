"""The record of one request: what it asked for and what it came to.

The router feeds it; metrics, the log and the response read it. Knows steps and counts; nothing of JSON or Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from deployments.requests import Generation
from taps.decoding.metrics import SpeculationCounts, drafters_in
from taps.decoding.policy import Step


class RequestRecord:
    """What one request came to."""

    def __init__(self, request_id: str, job: Generation) -> None:
        self.prompt_tokens = len(job.state.tokens)
        self.cached_tokens = 0  # of the prompt, found in the verifier's cache
        self.new_tokens = 0
        self.strategy = job.strategy
        self.drafters = job.drafters
        self.counts = SpeculationCounts()
        self.batch_sizes = 0
        self.num_prefills = 0
        self.numerics_changed = 0  # times it went on where bits may differ
        self._numerics: str | None = None
        self.draft_ms = self.verify_ms = 0.0
        self.step_ms, self.step_tokens = 0.0, 0  # since the step before, and what the newest delivered
        self.drafted_by_drafter: Counter[int] = Counter()
        self.steps: list[dict[str, Any]] | None = [] if job.explains else None  # what each did, and why
        self.id = request_id
        self._started = self._last = time.perf_counter()
        self._first_ms = 0.0

    def take(self, step: Step, delivered: int) -> None:
        """Count one step, of whose tokens so many were delivered."""
        now = time.perf_counter()
        self.step_ms, self._last = (now - self._last) * 1e3, now
        self.step_tokens = delivered
        self.new_tokens += delivered
        if step.is_prefill:
            self.cached_tokens = step.verdict.num_reused if not self.num_prefills else self.cached_tokens
            self.num_prefills += 1
            self.numerics_changed += self._numerics not in (None, step.numerics)
            self._numerics = step.numerics
            self._first_ms = self._first_ms or self.step_ms
        else:
            self.counts.observe(step.verdict, delivered)
            self.batch_sizes += step.verdict.batch_size * step.verdict.num_passes
            for owners in step.drafted:
                self.drafted_by_drafter.update(drafters_in(owners))
            self.draft_ms += step.draft_ms
            self.verify_ms += step.verify_ms
            if self.steps is not None:
                self.steps.append(self._explained(step))

    def _explained(self, step: Step) -> dict[str, Any]:
        verdict = step.verdict
        kept = [[self.drafters[i] for i in drafters_in(owners)] for owners in step.drafted]
        return {
            **(step.why or {}),
            "kept": kept,
            "accepted": len(verdict.owners),
            "tokens": len(verdict.tokens),
            "passes": verdict.num_passes,
            "batch": verdict.batch_size,
            "pass_ms": None if verdict.cost is None else round(verdict.cost.ms, 2),
            "draft_ms": round(step.draft_ms, 2),
            "verify_ms": round(step.verify_ms, 2),
        }

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
