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
from taps.engine.verification import Acceptance, Asked, accept_all
from taps.models.cache import CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.probe import Probe
from taps.models.step import Segment, Step
from taps.sampling import InvalidLogits, SamplingParams, sample_rows
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
            outcomes = self._finish(pieces, features, logits)
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

    def _finish(
        self, pieces: Sequence[_Piece], features: Tensor, logits: Tensor
    ) -> list[_Outcome | Exception | None]:
        """Decide, commit and take the features; None for prompts that go on.

        One session's logits that cannot be sampled are that session's answer, not the whole step's.
        """
        for piece in pieces:
            if isinstance(piece.job, PrefillJob):
                _take_in(piece.job, piece, features)
        decided = self._decide(pieces, logits)
        kept = [_kept_rows(piece, decision) for piece, decision in zip(pieces, decided, strict=True)]
        sequences = [piece.job.session.sequence for piece in pieces]
        self.cache.commit([Kept(*one) for one in zip(sequences, kept, strict=True)])
        outcomes: list[_Outcome | Exception | None] = []
        for piece, decision, own in zip(pieces, decided, _checked(pieces, kept, features), strict=True):
            if isinstance(decision, Acceptance):
                job = piece.job
                job.session.generated.update(decision.tokens)
                newest = torch.cat(job.features) if isinstance(job, PrefillJob) else own
                outcomes.append(_Outcome(decision.tokens, decision.owners, newest))
            else:
                outcomes.append(decision)
        return outcomes

    def _decide(self, pieces: Sequence[_Piece], logits: Tensor) -> list[Acceptance | Exception | None]:
        """What the target decides in each piece that has logits: all of them together, level by level."""
        ends = [piece for piece in pieces if piece.logits_start >= 0]

        def decide(asked: Sequence[Asked]) -> list[int | InvalidLogits]:
            at = [ends[one.tree] for one in asked]
            rows = [piece.logits_start + one.node for piece, one in zip(at, asked, strict=True)]
            return sample_rows(
                logits[torch.tensor(rows, device=logits.device)],
                [piece.job.session.params for piece in at],
                [_next_position(piece) + len(one.tokens) for piece, one in zip(at, asked, strict=True)],
                [_counts(piece.job.session, one.tokens) for piece, one in zip(at, asked, strict=True)],
            )

        answers = iter(accept_all([_decided_tree(piece) for piece in ends], decide))
        return [next(answers) if piece.logits_start >= 0 else None for piece in pieces]

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


def _take_in(job: PrefillJob, piece: _Piece, features: Tensor) -> None:
    """Count a chunk of the prompt as done and keep the newest of its features."""
    if job.done == 0:
        job.session.generated.update(job.generated)
    n = len(piece.tree)
    job.done += n
    wanted = min(n, job.feature_window - (len(job.tokens) - job.done))
    if wanted > 0:
        job.features.append(features[piece.rows][n - wanted :].clone())


def _decided_tree(piece: _Piece) -> ProposalTree:
    """What is walked: a prompt that ends here is a root whose only decision is the bonus."""
    return piece.tree if isinstance(piece.job, VerifyJob) else ProposalTree.root_only(piece.tree.tokens[-1])


def _next_position(piece: _Piece) -> int:
    """Absolute position of the token after the root of what is walked."""
    return piece.job.session.sequence.length + (1 if isinstance(piece.job, VerifyJob) else len(piece.tree))


def _counts(session: TargetSession, accepted: Sequence[int]) -> Mapping[int, int]:
    """How often each token was generated, those accepted in this step included where it matters."""
    if session.params.penalised and accepted:
        return session.generated + Counter(accepted)
    return session.generated


def _kept_rows(piece: _Piece, decision: Acceptance | Exception | None) -> Sequence[int]:
    """Offsets of the piece's rows that the cache keeps."""
    if isinstance(piece.job, PrefillJob):
        return range(len(piece.tree))
    return decision.path if isinstance(decision, Acceptance) else ()


def _checked(pieces: Sequence[_Piece], kept: Sequence[Sequence[int]], features: Tensor) -> Sequence[Tensor]:
    """[m, H] features of each tree's kept rows, none for prompts: copies that keep no other rows alive."""
    rows = [
        [piece.rows.start + offset for offset in path] if isinstance(piece.job, VerifyJob) else []
        for piece, path in zip(pieces, kept, strict=True)
    ]
    index = torch.tensor([row for own in rows for row in own], dtype=torch.int64, device=features.device)
    return features[index].split_with_sizes([len(own) for own in rows])


class _Outcome(NamedTuple):
    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    features: Tensor  # [m, H]


def _chain(tokens: Sequence[int]) -> ProposalTree:
    n = len(tokens)
    return ProposalTree(tuple(tokens), tuple(range(-1, n - 1)), (0.0,) * n, (0,) * n)
