"""The target: prefill, verify and commit for a batch of sessions in one forward.

Knows the target's model, cache and sampling; nothing of drafters, asyncio, Ray or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from taps.engine.admission import Admission
from taps.engine.batching import BLOCKED, Blocked
from taps.engine.costs import Rhythm, StepCosts
from taps.engine.deciding import Undecided, decide, tell
from taps.engine.jobs import Job, PrefillJob, TargetSession, VerifyJob
from taps.engine.scheduling import MAX_LEN, MAX_SESSIONS, StepBudget, share_nodes, share_prefill
from taps.engine.verification import Acceptance
from taps.models.cache import PAGE, CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.memory import require_memory, zeros
from taps.models.probe import Probe
from taps.models.step import Segment
from taps.session import SessionState
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import InvalidGrammar, PassCost, PromptTooLong, TokenLogprob, Verdict

_ASIDE = ThreadPoolExecutor(1, "grammars")  # what may come is found out beside the forward
_PROFILED, _PROFILED_FROM = (1, 2, 4, 6, 8, 12, 16, 24, 32), 64  # rows of the steps; positions before them


class _Piece(NamedTuple):
    """A job's share of one step."""

    job: Job
    tree: ProposalTree  # for prefill: the chunk as a chain
    rows: slice
    logits_start: int  # first of the piece's rows in the logits; -1 when nothing is decided

    @property
    def is_prefill(self) -> bool:
        return isinstance(self.job, PrefillJob) or self.logits_start < 0


class Target:
    """The model with its cache. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: CausalLM,
        max_sessions: int = MAX_SESSIONS,
        max_len: int = MAX_LEN,
        budget: StepBudget | None = None,
        cache_tokens: int | None = None,
        overcommit: float = 1.0,
    ) -> None:
        """Args: cache_tokens: positions of all sessions together, by default what they need at their longest;
        overcommit: as `Admission` has it. Raises ValueError where the cache is too large for the memory, or too
        small for a session.
        """
        self.model = model
        self.budget = budget or StepBudget()
        max_len = min(max_len, model.max_positions)
        if cache_tokens is not None and cache_tokens < max_len:
            raise ValueError(
                f"a cache of {cache_tokens} tokens does not hold a session of max_len {max_len}: "
                "raise cache_tokens or lower max_len"
            )
        self.cache = PagedCache(max_sessions, max_len, cache_tokens, model.layer_shapes)
        positions = self.cache.num_pages * PAGE
        needed = positions * model.bytes_per_position
        require_memory(
            needed, model.device, f"a cache of {positions} tokens", "cache_tokens, max_sessions or max_len"
        )
        self._features = zeros((positions, model.hidden_size), model.embeddings)
        self._admission = Admission(self.cache, self.budget.tree_nodes + 1, overcommit)
        self.costs = StepCosts()  # by rows
        # The same of steps that only check trees: a prompt's rows cost less, they have no logits.
        self._checking = StepCosts()
        self._rhythm = Rhythm()
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

    @property
    def num_pauses(self) -> int:
        """How often a session gave its pages to others, which came before it."""
        return self._admission.num_pauses

    def open(self, beside: bool = False) -> TargetSession:
        """A session with a place of its own, or beside one that has a place; raises `CacheFull` where there is
        none. Free it with `close`.
        """
        return TargetSession(self.cache.open(beside))

    def close(self, session: TargetSession) -> None:
        self._admission.let_out(session)
        self.cache.close(session.sequence)

    @torch.inference_mode()
    def step(self, jobs: Sequence[Job]) -> list[Verdict | Exception | Blocked | None]:
        """One forward for all jobs; None for those that need more, `BLOCKED` for those without room."""
        results: dict[Job, Verdict | Exception | Blocked | None] = dict.fromkeys(jobs)
        fitting = []
        for job in jobs:
            if (error := self._misfit(job)) is None:
                fitting.append(job)
            else:
                results[job] = error
        pieces = self._plan(self._let_in(fitting))
        results |= {job: BLOCKED for job in fitting if not self._admission.is_in(job.session)}
        if pieces:
            began = time.perf_counter()
            has_forms = any(piece.job.session.text is not None for piece in pieces)
            allowed = _ASIDE.submit(_allowed, pieces) if has_forms else None
            features, logits = self._forward(pieces)
            failed = {} if allowed is None else _restrict(logits, *allowed.result())
            outcomes = self._finish(pieces, features, logits, began, failed)
            results |= {piece.job: outcome for piece, outcome in zip(pieces, outcomes, strict=True)}
        return [results[job] for job in jobs]

    def profile(self) -> None:
        """Measure what steps cost by their rows, before the first user's; call it in the thread that steps."""
        session, measured = self.open(), {}
        self.step([PrefillJob(session, SessionState((0,) * _PROFILED_FROM))])
        most = min(self.budget.tree_nodes + 1, self.max_tokens - _PROFILED_FROM)
        for rows in (n for n in _PROFILED if n <= most):
            measured[rows] = min(self._seconds_of(session, rows) for _ in range(3))
        self.close(session)
        if len(measured) > 1:
            self.costs, self._checking = StepCosts(measured), StepCosts(measured)

    def _seconds_of(self, session: TargetSession, rows: int) -> float:
        """Of a step that checks a tree of the session."""
        nodes = [(token, 0, -1.0, 0) for token in range(rows - 1)]
        job = VerifyJob(session, ProposalTree.ordered(session.tokens[-1], nodes, rows))
        began = time.perf_counter()
        self.step([job])
        return time.perf_counter() - began

    def _cost_of(self, pieces: Sequence[_Piece], began: float) -> PassCost:
        """What a step cost that ends now; it is learned from."""
        ended, rows = time.perf_counter(), pieces[-1].rows.stop
        self.costs.observe(rows, ended - began)
        if not any(piece.is_prefill for piece in pieces):
            self._checking.observe(rows, ended - began)
        self._rhythm.observe(began, ended)
        return PassCost(rows, (ended - began) * 1e3)

    def _misfit(self, job: Job) -> ValueError | None:
        if isinstance(job, PrefillJob):
            if not job.state.tokens:
                return ValueError("a prompt needs at least one token")
            if job.num_missing < 1:
                return ValueError("the session has these tokens: take up what is shorter in a new session")
            fits = len(job.state.tokens) <= self.max_tokens
        else:
            if not all(0 <= t < self.model.vocab_size for t in job.tree.tokens):
                return InvalidTree("a tree holds token ids outside the vocabulary")
            if job.tree.tokens[:1] != tuple(job.session.tokens[-1:]):
                return InvalidTree("a tree grows from the token decided last")
            fits = len(job.session.tokens) <= self.max_tokens
        if fits:
            return None
        return PromptTooLong(f"a session holds at most {self.max_tokens} tokens on this verifier")

    def _let_in(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose sessions have pages, and those that get them: paused ones first, then others in turn."""
        there = [job for job in jobs if self._admission.is_in(job.session)]
        outside = [job for job in jobs if not self._admission.is_in(job.session)]
        for job in sorted(outside, key=lambda job: isinstance(job, PrefillJob)):
            session = job.session
            if isinstance(job, PrefillJob) and session.asked is not job.state:
                session.take_up(job.state, job.text)
            if not self._admission.let_in(session):
                break
            there.append(job)
        return there

    def _plan(self, jobs: Sequence[Job]) -> list[_Piece]:
        """Every waiting tree, cut to the shared node budget, then prompts as far as the budget goes."""
        verifies = [job for job in jobs if isinstance(job, VerifyJob) and not job.num_missing]
        prefills = [job for job in jobs if isinstance(job, PrefillJob) or job.num_missing]
        drafted = [job.session.drafts(job.tree) for job in verifies]
        trees = share_nodes(drafted, self.budget.tree_nodes, self._cost(len(verifies)))
        limit = self.budget.prefill_tokens
        if verifies:
            limit = min(limit, self.costs.size_within(self.budget.longest_step_s) - sum(map(len, trees)))
            limit = max(limit, self.budget.least_prefill_tokens)
        counts = share_prefill([job.num_missing for job in prefills], limit)
        shares: list[tuple[Job, ProposalTree, int]] = [
            (job, tree, len(tree)) for job, tree in zip(verifies, trees, strict=True)
        ]
        for job, n in zip(prefills, counts, strict=True):
            if n > 0:
                ends = isinstance(job, PrefillJob) and n == job.num_missing
                start = job.session.sequence.length
                shares.append((job, _chain(job.session.tokens[start : start + n]), int(ends)))
        return self._with_room(shares)

    def _cost(self, num_roots: int) -> Callable[[int], float] | None:
        """Seconds from one verdict to the next by the nodes drafted, once that is known."""
        if not self._checking.is_known:
            return None
        return lambda nodes: self._checking.seconds(num_roots + nodes) + self._rhythm.between_s

    def _with_room(self, shares: Sequence[tuple[Job, ProposalTree, int]]) -> list[_Piece]:
        """The shares whose rows have pages, laid out one after the other. Args: shares: with rows of logits."""
        for job, tree, _ in shares:
            if self._admission.is_in(job.session):
                self._admission.make_room(job.session, len(tree))
        pieces, row, kept = [], 0, 0
        for job, tree, logit_rows in shares:
            if self._admission.is_in(job.session):
                rows = slice(row, row + len(tree))
                pieces.append(_Piece(job, tree, rows, kept if logit_rows else -1))
                row, kept = rows.stop, kept + logit_rows
        return pieces

    def _forward(self, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
        """Features [rows, H] of every row and logits [kept, V] of the rows that need them."""
        tokens: list[int] = []
        keep: list[int] = []
        for piece in pieces:
            tokens += piece.tree.tokens
            if piece.logits_start >= 0:
                keep += range(piece.rows.stop - 1 if piece.is_prefill else piece.rows.start, piece.rows.stop)
        return self.model.extend([_segment(piece) for piece in pieces], tokens, keep, self.cache)

    def _finish(
        self, pieces: Sequence[_Piece], features: Tensor, logits: Tensor, began: float,
        failed: Mapping[int, Exception],
    ) -> list[Verdict | Exception | None]:  # fmt: skip
        """Decide, commit and keep the features; None for prompts that go on. Args: began: when the step did;
        failed: what is an answer whatever the logits say, by piece.

        One session's logits that cannot be sampled are that session's answer, not the whole step's.
        """
        decided, told = self._decide(pieces, logits)
        decided = [failed.get(index, decision) for index, decision in enumerate(decided)]
        kept = [_kept(piece, decision) for piece, decision in zip(pieces, decided, strict=True)]
        before = [piece.job.session.sequence.length for piece in pieces]
        self.cache.commit(kept)
        own = self._keep_features(pieces, kept, before, features)
        sharing = sum(not piece.is_prefill for piece in pieces)
        cost = self._cost_of(pieces, began)
        verdicts: list[Verdict | Exception | None] = []
        for piece, decision, newest, logprobs in zip(pieces, decided, own, told, strict=True):
            if isinstance(decision, Acceptance):
                piece.job.session.extend(decision.tokens)
                verdict = self._verdict(piece, decision, newest, sharing, cost)
                verdicts.append(replace(verdict, logprobs=logprobs) if logprobs else verdict)
            else:
                verdicts.append(decision)
        return verdicts

    def _decide(
        self, pieces: Sequence[_Piece], logits: Tensor
    ) -> tuple[list[Acceptance | Exception | None], list[tuple[TokenLogprob, ...]]]:
        """What the target decides in each piece that has logits, and what it tells of it."""
        ends = [
            Undecided(piece.job.session, _decided_tree(piece), piece.logits_start)
            for piece in pieces
            if piece.logits_start >= 0
        ]
        decisions = decide(ends, logits, self.model.race)
        made = iter(zip(decisions, tell(ends, decisions, logits, self.model.find_best), strict=True))
        both = [next(made) if piece.logits_start >= 0 else (None, ()) for piece in pieces]
        return [decision for decision, _ in both], [logprobs for _, logprobs in both]

    def _keep_features(
        self, pieces: Sequence[_Piece], kept: Sequence[Kept], before: Sequence[int], features: Tensor
    ) -> Sequence[Tensor]:
        """Put the kept rows' features beside their pages. [m, H] of each piece's: copies."""
        rows = [[piece.rows.start + i for i in one.path] for piece, one in zip(pieces, kept, strict=True)]
        places = [
            one.sequence.place(start + i)
            for one, start in zip(kept, before, strict=True)
            for i in range(len(one.path))
        ]
        device = features.device
        copies = features[torch.tensor([row for own in rows for row in own], dtype=torch.int64, device=device)]
        self._features[torch.tensor(places, dtype=torch.int64, device=device)] = copies
        return copies.split_with_sizes([len(own) for own in rows])

    @torch.inference_mode()
    def features_of(self, session: TargetSession, window: int) -> Tensor:
        """[m, H] of the session's newest positions, `window` at most; call it in the thread that steps."""
        return self._features_of(session.sequence, window)

    def _features_of(self, sequence: CachedSequence, window: int) -> Tensor:
        """[m, H] of the sequence's newest positions, `window` at most: a copy."""
        positions = range(max(sequence.length - window, 0), sequence.length)
        places = sequence.places(positions.start, positions.stop)
        return self._features[torch.tensor(places, dtype=torch.int64, device=self._features.device)]

    def _verdict(
        self, piece: _Piece, decision: Acceptance, newest: Tensor, sharing: int, cost: PassCost
    ) -> Verdict:
        job, tokens = piece.job, decision.tokens
        if isinstance(job, PrefillJob):
            features = self._features_of(job.session.sequence, job.feature_window)
            return Verdict(tokens, (), features, 0, 0, sharing, job.session.num_reused, cost)
        nodes, depth = len(piece.tree) - 1, max(piece.tree.depths)
        is_told = job.session.text is not None or job.session.asked.tells_trees
        checked = piece.tree if is_told else None
        return Verdict(tokens, decision.owners, newest, nodes, depth, sharing, cost=cost, checked=checked)


def _allowed(pieces: Sequence[_Piece]) -> tuple[list[int], Tensor, dict[int, Exception]]:
    """Rows of logits, [n, V] uint8: 0 for what may not come there, and whose grammar has failed, by piece."""
    rows: list[int] = []
    found: list[Tensor] = []
    failed: dict[int, Exception] = {}
    for index, piece in enumerate(pieces):
        if piece.job.session.text is not None and piece.logits_start >= 0:
            tree = _decided_tree(piece)
            try:
                found.append(piece.job.session.text.allowed(tree))
                rows += range(piece.logits_start, piece.logits_start + len(tree))
            except InvalidGrammar as error:
                failed[index] = error
    return rows, torch.cat(found) if found else torch.empty(0, 0), failed


def _restrict(
    logits: Tensor, rows: Sequence[int], allowed: Tensor, failed: dict[int, Exception]
) -> dict[int, Exception]:
    """Leave what may not come out of these rows of logits [n, V], in place; what failed is handed on."""
    if rows:
        places = torch.tensor(rows, device=logits.device)
        forbidden = (allowed == 0).to(logits.device)
        logits[places] = logits[places].masked_fill(forbidden, -torch.inf)
    return failed


def _segment(piece: _Piece) -> Segment:
    tree = piece.tree
    paths = None if tree.is_chain else [tree.path(node) for node in range(len(tree))]
    return Segment(piece.job.session.sequence, len(tree), paths)


def _decided_tree(piece: _Piece) -> ProposalTree:
    """What is walked: a prompt that ends here is a root whose only decision is the bonus."""
    return ProposalTree.root_only(piece.tree.tokens[-1]) if piece.is_prefill else piece.tree


def _kept(piece: _Piece, decision: Acceptance | Exception | None) -> Kept:
    """The piece's rows that the cache keeps."""
    path: Sequence[int] = ()
    if piece.is_prefill:
        path = range(len(piece.tree))
    elif isinstance(decision, Acceptance):
        path = decision.path
    return Kept(piece.job.session.sequence, path, [piece.tree.tokens[i] for i in path])


def _chain(tokens: Sequence[int]) -> ProposalTree:
    n = len(tokens)
    return ProposalTree(tuple(tokens), tuple(range(-1, n - 1)), (0.0,) * n, (0,) * n)
