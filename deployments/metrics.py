"""What operators see: Ray metrics, spans, and a log line for each request.

Knows records; nothing of responses.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager

from ray.serve import metrics

from deployments.record import RequestRecord
from deployments.status import Recent
from deployments.tracing import RequestTrace
from taps.decoding.policy import Step

logger = logging.getLogger("ray.serve")
_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0]
_SIZES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0]
_TELL_S = 0.5  # between calls that tell Ray of steps: one for each value of each step takes long


class Observer:
    """The router's metrics. Names begin with `taps_`; times are milliseconds.

    Ray is told of a request's steps when it ends, and now and then before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told_at = clock()
        self._counted: defaultdict[metrics.Counter, float] = defaultdict(float)  # since then
        self._measured: list[tuple[metrics.Histogram, float]] = []  # since then
        self.recent = Recent()
        self._requests = metrics.Counter("taps_requests", "Requests ended.", ("outcome",))
        self._tokens = metrics.Counter("taps_tokens", "Tokens delivered.")
        self._prompt_tokens = metrics.Counter("taps_prompt_tokens", "Prompt tokens prefilled.")
        self._cached = metrics.Counter("taps_cached_tokens", "Prompt tokens found in a verifier's cache.")
        self._passes = metrics.Counter("taps_verify_passes", "Verify passes.")
        self._plain = metrics.Counter("taps_plain_passes", "Passes without drafts, one per session and pass.")
        self._numerics = metrics.Counter("taps_numerics_changes", "Answers resumed with other numerics.")
        self._drafted = metrics.Counter("taps_draft_tokens", "Drafted nodes checked.", ("drafter",))
        self._accepted = metrics.Counter("taps_accepted_tokens", "Drafted tokens accepted.", ("drafter",))
        self._took_part = metrics.Counter(
            "taps_drafter_passes", "Passes that checked drafts of it, one per session and pass.", ("drafter",)
        )
        self._first = metrics.Histogram("taps_time_to_first_token_ms", "Until the first token.", _MS)
        self._between = metrics.Histogram("taps_inter_token_ms", "Between tokens, mean of a step.", _MS)
        self._draft = metrics.Histogram("taps_draft_ms", "Waiting for drafters, per step.", _MS)
        self._verify = metrics.Histogram("taps_verify_ms", "Waiting for the verifier, per step.", _MS)
        self._verified = metrics.Counter("taps_verify_sessions", "Trees verified, one per session and pass.")
        self._batch = metrics.Histogram("taps_verify_batch_size", "Sessions that share a verify pass.", _SIZES)
        self._traces: dict[str, RequestTrace] = {}  # of requests that are being answered

    def observe_begin(self, record: RequestRecord) -> None:
        """A request is being answered, until its end is observed."""
        self.recent.begin()
        self._traces[record.id] = RequestTrace(record)

    def leasing(self, record: RequestRecord) -> AbstractContextManager[None]:
        """While a request waits for a verifier."""
        return self._traces[record.id].leasing()

    def observe_step(self, step: Step, record: RequestRecord) -> None:
        """Count one step of a request, the newest its record took."""
        verdict, counted = step.verdict, self._counted
        if step.is_prefill:
            if record.num_prefills == 1:
                self._measured.append((self._first, record.step_ms))
                counted[self._prompt_tokens] += record.prompt_tokens
        else:
            # A pass is seen by each of its sessions.
            counted[self._passes] += verdict.num_passes / verdict.batch_size
            counted[self._verified] += verdict.num_passes
            self._measured += (
                (self._batch, verdict.batch_size),
                (self._draft, step.draft_ms),
                (self._verify, step.verify_ms / verdict.num_passes),
                (self._between, record.step_ms / max(record.step_tokens, 1)),
            )
        counted[self._tokens] += record.step_tokens
        self.recent.deliver(record.step_tokens)
        self._traces[record.id].step(step, record)
        if self._clock() - self._told_at > _TELL_S:
            self._tell()

    def _tell(self) -> None:
        """Tell Ray of the steps that it does not know of."""
        for counter, count in self._counted.items():
            if count:
                counter.inc(count)
        for histogram, value in self._measured:
            histogram.observe(value)
        self._counted.clear()
        self._measured.clear()
        self._told_at = self._clock()

    def observe_refusal(self, reason: str) -> None:
        """Count a request that was refused before it began."""
        self._requests.inc(tags={"outcome": "refused"})
        self.recent.refuse(reason)
        logger.info("request refused: %s", reason)

    def observe_end(self, record: RequestRecord, outcome: str) -> None:
        self._tell()
        self._requests.inc(tags={"outcome": outcome})
        self._traces.pop(record.id).end(record, outcome)
        if record.cached_tokens:
            self._cached.inc(record.cached_tokens)
        if record.counts.num_plain_passes:
            self._plain.inc(record.counts.num_plain_passes)
        if record.numerics_changed:
            self._numerics.inc(record.numerics_changed)
            logger.warning("%s went on with other numerics: its text may differ from there", record.id)
        drafted, accepted, took_part = Counter[str](), Counter[str](), Counter[str]()
        for index, name in enumerate(record.drafters):
            drafted[name] = record.drafted_by_drafter[index]
            accepted[name] = record.counts.accepted_by_drafter[index]
            took_part[name] = record.passes_by_drafter[index]
        for metric, counts in (
            (self._drafted, drafted), (self._accepted, accepted), (self._took_part, took_part)
        ):  # fmt: skip
            for name, count in (+counts).items():
                metric.inc(count, tags={"drafter": name})
        self.recent.end(outcome, drafted, accepted)
        logger.info(record.line(outcome))


class Capacity:
    """A verifier's metrics: what it is asked for, and what was left of its cache at its newest health check."""

    def __init__(self) -> None:
        self._pages = metrics.Gauge("taps_cache_pages", "Pages of a verifier's cache.")
        self._free = metrics.Gauge("taps_cache_pages_free", "Of them, those that a new session may have.")
        self._leases = metrics.Gauge("taps_leases", "Requests that a verifier has room kept for.")
        self._sessions = metrics.Counter("taps_sessions", "Sessions that were opened on a verifier.")

    def open(self) -> None:
        """A session begins."""
        self._sessions.inc()

    def observe(self, pages: int, free: int, leases: int) -> None:
        self._pages.set(pages)
        self._free.set(free)
        self._leases.set(leases)
