"""Drafting with an EAGLE-2 or HASS head: many sessions' trees grown together.

Knows the head, its cache and growth; nothing of asyncio, Ray or the verifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taps.context import ContextDelta
from taps.drafting.drafter import DRAFT_LEN, RESERVED_ROWS, DraftJob, InvalidAsk
from taps.drafting.growth import Growth
from taps.engine.scheduling import MAX_SESSIONS
from taps.models.cache import CachedSequence, Kept, PagedCache
from taps.models.draft_head import DraftHead
from taps.models.drafting_head import DraftingHead
from taps.models.step import Segment, Step
from taps.sampling import SamplingParams, gumbel_noise, shape_logits
from taps.tree import ROOT, ProposalTree


@dataclass(eq=False)
class EagleSession:
    """One sequence: its pages, and the position whose pair comes next."""

    sequence: CachedSequence
    next_position: int = 0


class _Growing:
    """One job on its way: the tree so far, and what its next level attends to and is fed with."""

    def __init__(self, job: DraftJob) -> None:
        self.session: EagleSession = job.session
        self.growth = Growth(job.delta.root, job.ask)
        self.sampling = job.ask.sampling
        self.position = job.delta.end  # absolute position of the root's children
        self.hidden: dict[int, Tensor] = {}  # node -> [H] predicted feature at the node
        self.num_rows = 0  # drafted ones in the cache
        self.paths: dict[int, tuple[int, ...]] = {ROOT: ()}  # node -> the drafted rows it attends to

    def add_rows(self) -> Segment:
        """The frontier nodes' rows, behind those drafted before."""
        first, frontier = self.num_rows, self.growth.frontier
        for i, node in enumerate(frontier):
            self.paths[node] = (*self.paths[self.growth.parent(node)], first + i)
        self.num_rows += len(frontier)
        paths = [self.paths[node] for node in frontier]
        return Segment(self.session.sequence, len(frontier), paths, first)


class EagleDrafter:
    """A draft head with a KV cache for its sessions."""

    def __init__(self, head: DraftHead, max_sessions: int = MAX_SESSIONS, max_len: int = DRAFT_LEN) -> None:
        self._cache = PagedCache(max_sessions, max_len)
        self._head = DraftingHead(head)

    def open(self) -> EagleSession:
        return EagleSession(self._cache.open())

    def close(self, session: EagleSession) -> None:
        self._cache.close(session.sequence)

    @torch.inference_mode()
    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        """Take in every session's news in one forward, then grow all trees level by level."""
        results: dict[DraftJob, ProposalTree | Exception | None] = {job: self._misfit(job) for job in jobs}
        fitting = [job for job in jobs if results[job] is None]
        if fitting:
            results |= zip(fitting, self._grow(fitting), strict=True)
        return [results[job] for job in jobs]

    def _misfit(self, job: DraftJob) -> InvalidAsk | None:
        """Why a job cannot share a forward with others, which it would make fail."""
        delta, ask = job.delta, job.ask
        vocab_size, hidden = self._head.vocab_size, self._head.hidden_size
        if not delta.tokens or not all(0 <= token < vocab_size for token in delta.tokens):
            return InvalidAsk(f"news have tokens, of ids below {vocab_size}")
        news = delta.end - 1 - delta.feature_start
        if not 0 < news <= len(delta.tokens) or delta.features.shape != (news, hidden):
            return InvalidAsk(
                f"news of {len(delta.tokens)} tokens from position {delta.start} have features of shape "
                f"{tuple(delta.features.shape)} from position {delta.feature_start}"
            )
        if min(ask.num_nodes, ask.depth + 1, ask.top_k) < 1 or ask.depth * ask.top_k > RESERVED_ROWS:
            return InvalidAsk(
                f"no tree of {ask.num_nodes} nodes, depth {ask.depth}, top-k {ask.top_k} is grown"
            )
        return None

    def _grow(self, jobs: Sequence[DraftJob]) -> list[ProposalTree]:
        growing = [_Growing(job) for job in jobs]
        self._expand(growing, self._take_in(jobs))
        while active := [g for g in growing if g.growth.frontier]:
            self._expand(active, self._forward_level(active))
        return [g.growth.tree() for g in growing]

    def _take_in(self, jobs: Sequence[DraftJob]) -> Tensor:
        """Append the new pairs to the cache. [jobs, H] predicted features at the roots."""
        tokens: list[int] = []
        features, segments = [], []
        for job in jobs:
            session, delta = job.session, job.delta
            pairs = self._pairs(session, delta)
            tokens += delta.tokens[len(delta.tokens) - pairs :]
            features.append(delta.features[len(delta.features) - pairs :])
            segments.append(Segment(session.sequence, pairs))
            self._cache.reserve(session.sequence, pairs + RESERVED_ROWS)
        step = Step(segments, self._head.device)
        hidden = self._forward(tokens, torch.cat(features), step)
        self._cache.commit([Kept(s.sequence, range(s.num_rows)) for s in segments])
        return hidden[[start - 1 for start in step.starts[1:]]]

    def _pairs(self, session: EagleSession, delta: ContextDelta) -> int:
        """How many of the newest pairs are new; forgets the session's past where the news do not join it.

        The head attends by relative position, so a session may start anywhere in the sequence.
        """
        last = delta.end - 1
        joins = delta.feature_start <= session.next_position < last
        first = session.next_position if joins else delta.feature_start
        if not joins or session.sequence.length + last - first > self.max_tokens:
            self._cache.forget(session.sequence)
            first = max(delta.feature_start, last - self.max_tokens)
        session.next_position = last
        return last - first

    @property
    def max_tokens(self) -> int:
        """Tokens of a session that the cache holds, leaving rows for the drafted levels."""
        return self._cache.max_len - RESERVED_ROWS

    def _forward_level(self, active: Sequence[_Growing]) -> Tensor:
        """Predicted features [rows, H] at the frontier nodes of every tree."""
        tokens = [g.growth.token(node) for g in active for node in g.growth.frontier]
        features = [g.hidden[g.growth.parent(node)] for g in active for node in g.growth.frontier]
        step = Step([g.add_rows() for g in active], self._head.device)
        return self._forward(tokens, torch.stack(features), step)

    def _forward(self, tokens: Sequence[int], features: Tensor, step: Step) -> Tensor:
        device = self._head.device
        inputs = features.to(device, self._head.dtype)
        return self._head(torch.tensor(tokens, device=device), inputs, step, self._cache)

    def _expand(self, active: Sequence[_Growing], hidden: Tensor) -> None:
        """Add the children of every frontier; hidden [rows, H] are the features at the frontier nodes."""
        logits = self._head.logits(hidden).float()
        row = 0
        for g in active:
            n = len(g.growth.frontier)
            for node, feature in zip(g.growth.frontier, hidden[row : row + n], strict=True):
                g.hidden[node] = feature
            rows = logits[row : row + n]
            if g.sampling is not None and not g.sampling.greedy:
                rows = self._coupled(rows, g.sampling, g.position)
            g.position += 1
            logprobs = rows.log_softmax(-1)
            best = logprobs.topk(min(g.growth.ask.top_k, logprobs.shape[-1]))
            entropies = -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(-1)
            tokens = self._head.draft_vocab[best.indices]
            g.growth.extend(tokens.tolist(), best.values.tolist(), entropies.tolist())
            row += n

    def _coupled(self, logits: Tensor, sampling: SamplingParams, position: int) -> Tensor:
        """Logits [n, D] shaped like the target's and tilted by the noise the target will use at `position`.

        They rank the token the target will *sample*, not the likeliest one (theory: Daliri et al.
        2408.07978). Penalties are left out: drafting need not be exact.
        """
        noise = gumbel_noise(sampling.seed, sampling.choice, position, self._head.draft_vocab.long())
        shaped = torch.stack([shape_logits(row, sampling, {}) for row in logits])
        return shaped + noise.float()
