"""What operators see: Ray metrics, and one line per request."""

from __future__ import annotations

import logging
import time
from collections import Counter

from ray.serve import metrics

from deployments import openai
from deployments.requests import Generation
from taps.decoding.delivery import Delivered
from taps.decoding.loop import Step
from taps.decoding.metrics import SpeculationCounts, drafters_in

logger = logging.getLogger("ray.serve")
_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0]
_SIZES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]


class Observer:
    """The router's metrics. Names begin with `taps_`; times are milliseconds."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("taps_requests", "Requests ended.", ("outcome",))
        self._tokens = metrics.Counter("taps_tokens", "Tokens delivered.")
        self._prompt_tokens = metrics.Counter("taps_prompt_tokens", "Prompt tokens prefilled.")
        self._passes = metrics.Counter("taps_verify_passes", "Verify passes.")
        self._drafted = metrics.Counter("taps_draft_tokens", "Drafted nodes checked.", ("drafter",))
        self._accepted = metrics.Counter("taps_accepted_tokens", "Drafted tokens accepted.", ("drafter",))
        self._first = metrics.Histogram("taps_time_to_first_token_ms", "Until the first token.", _MS)
        self._between = metrics.Histogram("taps_inter_token_ms", "Between tokens, mean of a step.", _MS)
        self._draft = metrics.Histogram("taps_draft_ms", "Waiting for drafters, per step.", _MS)
        self._verify = metrics.Histogram("taps_verify_ms", "Waiting for the verifier, per step.", _MS)
        self._verified = metrics.Counter("taps_verify_sessions", "Trees verified, one per session and pass.")
        self._batch = metrics.Histogram("taps_verify_batch_size", "Sessions that share a verify pass.", _SIZES)

    def observe_step(self, step: Step, delivered: Delivered, record: RequestRecord) -> None:
        """Count one step of a request, in the metrics and in its record."""
        verdict = step.verdict
        since_last_ms = record.take(step, delivered.num_tokens)
        if step.is_prefill:
            if record.num_prefills == 1:
                self._first.observe(since_last_ms)
                self._prompt_tokens.inc(record.prompt_tokens)
        else:
            # A pass is seen by each of its sessions.
            self._passes.inc(1.0 / verdict.batch_size)
            self._verified.inc()
            self._batch.observe(verdict.batch_size)
            self._draft.observe(step.draft_ms)
            self._verify.observe(step.verify_ms)
            self._between.observe(since_last_ms / max(delivered.num_tokens, 1))
        self._tokens.inc(delivered.num_tokens)

    def observe_refusal(self, reason: str) -> None:
        """Count a request that was refused before it began."""
        self._requests.inc(tags={"outcome": "refused"})
        logger.info("request refused: %s", reason)

    def observe_end(self, record: RequestRecord, outcome: str) -> None:
        self._requests.inc(tags={"outcome": outcome})
        for index, name in enumerate(record.drafters):
            if drafted := record.drafted_by_drafter[index]:
                self._drafted.inc(drafted, tags={"drafter": name})
            if accepted := record.counts.accepted_by_drafter[index]:
                self._accepted.inc(accepted, tags={"drafter": name})
        logger.info(record.line(outcome))


class RequestRecord:
    """What one request came to."""

    def __init__(self, request_id: str, job: Generation) -> None:
        self.prompt_tokens = len(job.prompt)
        self.new_tokens = 0
        self.strategy = job.strategy
        self.drafters = job.drafters
        self.counts = SpeculationCounts()
        self.batch_sizes = 0
        self.num_prefills = 0
        self.draft_ms = self.verify_ms = 0.0
        self.drafted_by_drafter: Counter[int] = Counter()
        self.id = request_id
        self._started = self._last = time.perf_counter()
        self._first_ms = 0.0

    def take(self, step: Step, delivered: int) -> float:
        """Count one step; milliseconds since the one before."""
        now = time.perf_counter()
        since_last_ms, self._last = (now - self._last) * 1e3, now
        self.new_tokens += delivered
        if step.is_prefill:
            self.num_prefills += 1
            self._first_ms = self._first_ms or since_last_ms
        else:
            self.counts.observe(step.verdict, delivered)
            self.batch_sizes += step.verdict.batch_size
            for owners in step.drafted:
                self.drafted_by_drafter.update(drafters_in(owners))
            self.draft_ms += step.draft_ms
            self.verify_ms += step.verify_ms
        return since_last_ms

    def line(self, outcome: str) -> str:
        seconds = time.perf_counter() - self._started
        counts = self.counts
        accepted = ", ".join(f"{name} {counts.accepted_by_drafter[i]}" for i, name in enumerate(self.drafters))
        passes = max(counts.num_passes, 1)
        return (
            f"{self.id} {outcome}: {self.prompt_tokens} prompt + {self.new_tokens} new tokens in "
            f"{seconds:.2f} s ({self.new_tokens / seconds:.1f}/s), first after {self._first_ms:.0f} ms; "
            f"{self.strategy}: {counts.num_passes} passes, {counts.acceptance_length:.2f} tokens/pass, "
            f"batch {self.batch_sizes / passes:.1f}, draft {self.draft_ms / passes:.1f} ms, "
            f"verify {self.verify_ms / passes:.1f} ms" + (f"; accepted: {accepted}" if accepted else "")
        )

    def summary(self) -> tuple[openai.Json, openai.Json]:
        """`usage` and `metrics` of the response."""
        used = openai.usage(self.prompt_tokens, self.new_tokens)
        return used, openai.speculation(self.counts, self.drafters)
