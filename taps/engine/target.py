"""The target: prefill, verify and commit for a batch of sessions in one forward.

Knows the target's model, cache and sampling; nothing of drafters, asyncio, Ray or HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from taps.engine.scheduling import MAX_LEN, MAX_SESSIONS, StepBudget, share_nodes, share_prefill
from taps.engine.verification import accept
from taps.models.cache import CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.probe import Probe
from taps.models.step import Segment, Step
from taps.sampling import InvalidLogits, SamplingParams, sample
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import PromptTooLong, Verdict


@dataclass
class TargetSession:
    """One sequence being decoded: its place in the cache, its sampling, and the tokens it generated."""

    sequence: CachedSequence
    params: SamplingParams
    generated: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class PrefillJob:
    """Append `tokens` to the session; a verdict with one token when all are in the cache."""

    session: TargetSession
    tokens: Sequence[int]
    generated: Sequence[int] = ()  # the part of `tokens` that was generated before (a resumed session)
    feature_window: int = 1 << 30  # return at most this many of the newest features
    done: int = 0
    features: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class VerifyJob:
    """Check one proposal tree."""

    session: TargetSession
    tree: ProposalTree


Job: TypeAlias = PrefillJob | VerifyJob


class _Piece(NamedTuple):
    """A job's share of one step."""

    job: Job
    tree: ProposalTree  # for prefill: the chunk as a chain
    rows: slice
    logits_start: int  # first of the piece's rows in the logits; -1 when it needs none


class Target:
    """The model with its cache. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: CausalLM,
        max_sessions: int = MAX_SESSIONS,
        max_len: int = MAX_LEN,
        budget: StepBudget | None = None,
    ) -> None:
        self.model = model
        self.budget = budget or StepBudget()
        self.cache = PagedCache(max_sessions, min(max_len, model.max_positions))
        self.inexact_because: str | None = "it was not probed"

    def probe(self) -> None:
        """Find out whether bits depend on who shares a step; call it in the thread that steps, before them."""
        self.inexact_because = Probe(self.model).fault()

    @property
    def numerics(self) -> str:
        """Sessions on targets of the same numerics go on with the same bits, where these are exact."""
        exact = "exact" if self.inexact_because is None else "inexact"
        return f"{self.model.numerics} {exact}"

    @property
    def max_tokens(self) -> int:
        """Prompt and generated tokens that fit a session, with room for the drafted nodes of a step."""
        return self.cache.max_len - self.budget.tree_nodes - 1

    def open(self, params: SamplingParams) -> TargetSession:
        """A session with a place of its own; raises `CacheFull`. Free it with `close`."""
        return TargetSession(self.cache.open(), params)

    def close(self, session: TargetSession) -> None:
        self.cache.close(session.sequence)

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> list[Verdict | Exception | None]:
        """One forward for all jobs; None for prompts that need further steps."""
        results: dict[Job, Verdict | Exception | None] = dict.fromkeys(jobs)
        fitting = []
        for job in jobs:
            if (error := self._misfit(job)) is None:
                fitting.append(job)
            else:
                results[job] = error
        pieces = self._plan(fitting)
        if pieces:
            features, logits = self._forward(pieces)
            outcomes = [self._try_to_finish(piece, features, logits) for piece in pieces]
            sharing = sum(isinstance(piece.job, VerifyJob) for piece in pieces)
            for piece, outcome in zip(pieces, outcomes, strict=True):
                if isinstance(outcome, _Outcome):
                    results[piece.job] = self._verdict(piece, *outcome, sharing)
                else:
                    results[piece.job] = outcome
        return [results[job] for job in jobs]

    def _misfit(self, job: Job) -> ValueError | None:
        length = job.session.sequence.length
        if isinstance(job, PrefillJob) and not job.tokens:
            return ValueError("a prompt needs at least one token")
        if isinstance(job, VerifyJob) and not all(0 <= t < self.model.vocab_size for t in job.tree.tokens):
            return InvalidTree("a tree holds token ids outside the vocabulary")
        if isinstance(job, VerifyJob):
            fits = length < self.max_tokens
        else:
            fits = length + len(job.tokens) - job.done <= self.max_tokens
        if fits:
            return None
        return PromptTooLong(f"a session holds at most {self.max_tokens} tokens on this verifier")

    def _plan(self, jobs: Sequence[Job]) -> list[_Piece]:
        """Every waiting tree, cut to the shared node budget, then prompts as far as the budget goes."""
        verifies = [job for job in jobs if isinstance(job, VerifyJob)]
        prefills = [job for job in jobs if isinstance(job, PrefillJob)]
        trees = share_nodes([job.tree for job in verifies], self.budget.tree_nodes)
        counts = share_prefill([len(job.tokens) - job.done for job in prefills], self.budget.prefill_tokens)
        shares: list[tuple[Job, ProposalTree, int]] = [
            (job, tree, len(tree)) for job, tree in zip(verifies, trees, strict=True)
        ]
        for job, n in zip(prefills, counts, strict=True):
            if n > 0:
                ends = job.done + n == len(job.tokens)
                shares.append((job, _chain(job.tokens[job.done : job.done + n]), int(ends)))
        pieces, row, kept = [], 0, 0
        for share_job, tree, logit_rows in shares:
            rows = slice(row, row + len(tree))
            pieces.append(_Piece(share_job, tree, rows, kept if logit_rows else -1))
            row, kept = rows.stop, kept + logit_rows
        return pieces

    def _forward(self, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
        """Features [rows, H] of every row and logits [kept, V] of the rows that need them."""
        tokens: list[int] = []
        keep: list[int] = []
        for piece in pieces:
            tokens += piece.tree.tokens
            if piece.logits_start >= 0:
                first = piece.rows.start if isinstance(piece.job, VerifyJob) else piece.rows.stop - 1
                keep += range(first, piece.rows.stop)
            self.cache.reserve(piece.job.session.sequence, len(piece.tree))
        step = Step([_segment(piece) for piece in pieces], self.model.device)
        return self.model.extend(tokens, step, self.cache, keep)

    def _try_to_finish(
        self, piece: _Piece, features: Tensor, logits: Tensor
    ) -> _Outcome | InvalidLogits | None:
        """One session's logits that cannot be sampled are that session's answer, not the whole step's."""
        try:
            return self._finish(piece, features, logits)
        except InvalidLogits as error:
            return error

    def _finish(self, piece: _Piece, features: Tensor, logits: Tensor) -> _Outcome | None:
        """Sample, accept and commit; None while the prompt goes on."""
        if isinstance(piece.job, PrefillJob):
            return self._finish_prefill(piece.job, piece, features[piece.rows], logits)
        session = piece.job.session
        position = session.sequence.length + 1

        def decide(node: int, accepted: Sequence[int]) -> int:
            counts: Mapping[int, int] = session.generated
            if session.params.penalised and accepted:
                counts = session.generated + Counter(accepted)
            return sample(logits[piece.logits_start + node], session.params, position + len(accepted), counts)

        path, tokens, owners = accept(piece.tree, decide)
        self.cache.commit([Kept(session.sequence, path)])
        session.generated.update(tokens)
        return _Outcome(tokens, owners, features[piece.rows][list(path)].clone())

    def _finish_prefill(
        self, job: PrefillJob, piece: _Piece, features: Tensor, logits: Tensor
    ) -> _Outcome | None:
        session = job.session
        if job.done == 0:
            session.generated.update(job.generated)
        n = len(piece.tree)
        job.done += n
        self.cache.commit([Kept(session.sequence, range(n))])
        wanted = min(n, job.feature_window - (len(job.tokens) - job.done))
        if wanted > 0:
            job.features.append(features[n - wanted :].clone())
        if job.done < len(job.tokens):
            return None
        position = session.sequence.length
        token = sample(logits[piece.logits_start], session.params, position, session.generated)
        session.generated.update((token,))
        return _Outcome((token,), (), torch.cat(job.features))

    def _verdict(
        self, piece: _Piece, tokens: tuple[int, ...], owners: tuple[int, ...], features: Tensor, batch_size: int
    ) -> Verdict:
        verified = isinstance(piece.job, VerifyJob)
        num_nodes = len(piece.tree) - 1 if verified else 0
        depth = max(piece.tree.depths) if verified else 0
        return Verdict(tokens, owners, features, num_nodes, depth, batch_size)


def _segment(piece: _Piece) -> Segment:
    tree = piece.tree
    paths = None if tree.is_chain else [tree.path(node) for node in range(len(tree))]
    return Segment(piece.job.session.sequence, len(tree), paths)


class _Outcome(NamedTuple):
    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    features: Tensor  # [m, H]


def _chain(tokens: Sequence[int]) -> ProposalTree:
    n = len(tokens)
    return ProposalTree(tuple(tokens), tuple(range(-1, n - 1)), (0.0,) * n, (0,) * n)
