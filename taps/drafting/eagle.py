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
from taps.models.attention import PackedStep, Segment
from taps.models.cache import SlotCache
from taps.models.draft_head import DraftHead
from taps.models.onednn import pack_linears
from taps.sampling import SamplingParams, gumbel_noise, shape_logits
from taps.tree import ROOT, ProposalTree


@dataclass
class EagleSession:
    """One sequence: its cache slot, and the position whose pair comes next."""

    slot: int
    next_position: int = 0


class _Growing:
    """One job on its way: the tree so far, and what its next level attends to and is fed with."""

    def __init__(self, job: DraftJob) -> None:
        self.session: EagleSession = job.session
        self.growth = Growth(job.delta.root, job.ask)
        self.sampling = job.ask.sampling
        self.position = job.delta.end  # absolute position of the root's children
        self.hidden: dict[int, Tensor] = {}  # node -> [H] predicted feature at the node
        self.row_of: dict[int, int] = {}  # node -> its row among the drafted ones in the cache
        self.seen: dict[int, set[int]] = {ROOT: set()}  # node -> drafted rows it attends to

    def add_rows(self) -> Tensor:
        """Give the frontier nodes their cache rows. [n, drafted + n] bool: which of them each attends to."""
        first = len(self.row_of)
        for i, node in enumerate(self.growth.frontier):
            self.row_of[node] = first + i
            self.seen[node] = self.seen[self.growth.parent(node)] | {first + i}
        visible = torch.zeros(len(self.growth.frontier), len(self.row_of), dtype=torch.bool)
        for i, node in enumerate(self.growth.frontier):
            visible[i, list(self.seen[node])] = True
        return visible


class EagleDrafter:
    """A draft head with a KV cache for its sessions."""

    def __init__(self, head: DraftHead, max_sessions: int = MAX_SESSIONS, max_len: int = DRAFT_LEN) -> None:
        self._cache = SlotCache(max_sessions, max_len)
        self._dtype = head.fc.weight.dtype
        self._device = head.fc.weight.device
        self._head = head.eval()
        pack_linears(head)

    def open(self) -> EagleSession:
        return EagleSession(self._cache.acquire())

    def close(self, session: EagleSession) -> None:
        self._cache.release(session.slot)

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
        vocab_size, hidden = self._head.embeddings.shape
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
        level = 0
        while active := [g for g in growing if g.growth.frontier]:
            level += 1
            self._expand(active, self._forward_level(active, level))
        return [g.growth.tree() for g in growing]

    def _take_in(self, jobs: Sequence[DraftJob]) -> Tensor:
        """Append the new pairs to the cache. [jobs, H] predicted features at the roots."""
        tokens, features, segments, start = [], [], [], 0
        for job in jobs:
            session, delta = job.session, job.delta
            pairs = self._pairs(session, delta)
            tokens.append(delta.tokens[len(delta.tokens) - pairs :])
            features.append(delta.features[len(delta.features) - pairs :])
            segments.append(Segment(session.slot, start, torch.arange(pairs), None))
            start += pairs
        hidden = self._forward([t for part in tokens for t in part], torch.cat(features), segments)
        for segment in segments:
            self._cache.commit(segment.slot, range(segment.num_rows))
        return hidden[[s.start + s.num_rows - 1 for s in segments]]

    def _pairs(self, session: EagleSession, delta: ContextDelta) -> int:
        """How many of the newest pairs are new; forgets the session's past where the news do not join it.

        The head attends by relative position, so a session may start anywhere in the sequence.
        """
        last = delta.end - 1
        joins = delta.feature_start <= session.next_position < last
        first = session.next_position if joins else delta.feature_start
        if not joins or self._cache.length[session.slot] + last - first > self.max_tokens:
            self._cache.length[session.slot] = 0
            first = max(delta.feature_start, last - self.max_tokens)
        session.next_position = last
        return last - first

    @property
    def max_tokens(self) -> int:
        """Tokens of a session that the cache holds, leaving rows for the drafted levels."""
        return self._cache.max_len - RESERVED_ROWS

    def _forward_level(self, active: Sequence[_Growing], level: int) -> Tensor:
        """Predicted features [rows, H] at the frontier nodes of every tree."""
        tokens, features, segments, start = [], [], [], 0
        for g in active:
            drafted = len(g.row_of)
            visible = g.add_rows()
            n = len(g.growth.frontier)
            tokens += [g.growth.token(node) for node in g.growth.frontier]
            features += [g.hidden[g.growth.parent(node)] for node in g.growth.frontier]
            depths = torch.full((n,), level - 1)
            segments.append(Segment(g.session.slot, start, depths, visible, drafted))
            start += n
        return self._forward(tokens, torch.stack(features), segments)

    def _forward(self, tokens: Sequence[int], features: Tensor, segments: Sequence[Segment]) -> Tensor:
        step = PackedStep(self._cache, segments, self._dtype, self._device)
        ids = torch.tensor([tokens], device=self._device)
        inputs = features.to(self._device, self._dtype)[None]
        hidden: Tensor = self._head(ids, inputs, step.positions(), step)[0]
        return hidden

    def _expand(self, active: Sequence[_Growing], hidden: Tensor) -> None:
        """Add the children of every frontier; hidden [rows, H] are the features at the frontier nodes."""
        logits = self._head.lm_head(hidden).float()
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
