"""Drafting with an EAGLE-2 or HASS head: many sessions' trees grown together.

Knows the head, its cache and growth; nothing of asyncio, Ray or the verifier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.context import ContextDelta
from taps.drafting.drafter import DRAFT_LEN, RESERVED_ROWS, Ask, DraftJob, InvalidAsk
from taps.drafting.growth import Frontier, Growth, as_tree
from taps.engine.scheduling import MAX_SESSIONS
from taps.models.cache import PAGE, CachedSequence, Kept, PagedCache
from taps.models.cpu_kernel.drafting import TreesAsked
from taps.models.draft_head import DraftHead
from taps.models.drafting_head import DraftingHead
from taps.models.memory import require_memory
from taps.models.step import Segment, Step, StepInputs
from taps.sampling import draft_noise, noise_keys
from taps.shaping import SamplingParams, shape_rows
from taps.tree import ProposalTree

_AS_IT_IS = SamplingParams()
_PROFILED = (1, 4, 16)  # sessions


@dataclass(eq=False)
class EagleSession:
    """One sequence: its pages, and the position whose pair comes next."""

    sequence: CachedSequence
    next_position: int = 0


class EagleDrafter:
    """A draft head with a KV cache for its sessions."""

    def __init__(self, head: DraftHead, max_sessions: int = MAX_SESSIONS, max_len: int = DRAFT_LEN) -> None:
        """Raises ValueError where the cache is too large for the memory that is left."""
        self._head = DraftingHead(head)
        self._inputs = StepInputs(self._head.device)
        self._tokens = self._head.draft_vocab.int()
        self._places: dict[int, int] | None = None  # of tokens in the draft vocabulary, once they are asked for
        self._max_sessions = max_sessions
        self._cache = PagedCache(max_sessions, max_len, layers=[self._head.layer_shape])
        positions = self._cache.num_pages * PAGE
        needed = positions * self._head.layer_shape.numbers * self._head.dtype.itemsize
        require_memory(needed, self._head.device, f"a cache of {positions} tokens", "max_sessions or max_len")

    def profile(self) -> dict[int, float]:
        """Seconds of a usual draft by sessions that ask; of these none is left."""
        profiled, measured = [n for n in _PROFILED if n <= self._max_sessions], {}
        sessions = [self.open() for _ in range(profiled[-1])]
        feature = torch.zeros(1, self._head.hidden_size)
        news = {session: ContextDelta(0, (0, 0), 0, feature) for session in sessions}
        for number in profiled:
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                self.step([DraftJob(session, news[session], Ask()) for session in sessions[:number]])
                seconds.append(time.perf_counter() - began)
                for session in sessions[:number]:
                    news[session] = ContextDelta(news[session].end, (0,), news[session].end - 1, feature)
            measured[number] = min(seconds)
        for session in sessions:
            self.close(session)
        return measured

    def open(self) -> EagleSession:
        return EagleSession(self._cache.open())

    def close(self, session: EagleSession) -> None:
        self._cache.close(session.sequence)

    @torch.inference_mode()
    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        """Take in every session's news in one forward, then grow all trees level by level."""
        results: dict[DraftJob, ProposalTree | Exception | None] = {job: self._misfit(job) for job in jobs}
        fitting = [job for job in jobs if results[job] is None]
        fitting.sort(key=lambda job: job.ask.top_k)  # see `_best`
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
        roots = self._take_in(jobs)
        if self._head.grows and not any(map(_is_shaped, jobs)):
            return self._grow_in_kernel(jobs, roots)
        return self._grow_by_levels(jobs, roots)

    def _grow_in_kernel(self, jobs: Sequence[DraftJob], roots: Tensor) -> list[ProposalTree]:
        """The same trees in one call."""
        sequences, asks = [job.session.sequence for job in jobs], [job.ask for job in jobs]
        depth = max(ask.depth for ask in asks)
        widest = max(len(sequence.pages) for sequence in sequences)
        table = [sequence.pages + [0] * (widest - len(sequence.pages)) for sequence in sequences]
        keys = [key for level in range(1 + depth) if (key := _keys(jobs, level)) is not None]
        asked = TreesAsked(
            table=_integers(table),
            committed=_integers([sequence.length for sequence in sequences]),
            tokens=_integers([job.delta.root for job in jobs]),
            nodes=_integers([ask.num_nodes for ask in asks]),
            depths=_integers([ask.depth for ask in asks]),
            children=_integers([ask.top_k for ask in asks]),
            keys=torch.stack(keys) if keys else None,
        )
        grown = self._head.grow(asked, roots.contiguous(), self._cache)
        parts = (grown.tokens, grown.parents, 0.0 - grown.surprisals, grown.entropies)
        return [
            as_tree(ask, *(part[tree, :count].tolist() for part in parts))
            for tree, (ask, count) in enumerate(zip(asks, grown.counts, strict=True))
        ]

    def _grow_by_levels(self, jobs: Sequence[DraftJob], hidden: Tensor) -> list[ProposalTree]:
        """Args: hidden [jobs, H]: predicted features at the roots."""
        growth = Growth([job.delta.root for job in jobs], [job.ask for job in jobs])
        counts, level = [1] * len(jobs), 0
        while (frontier := growth.extend(*self._candidates(jobs, hidden, counts, level))) is not None:
            hidden = self._forward_level(jobs, hidden, frontier)
            counts, level = [len(paths) for paths in frontier.paths], level + 1
        return growth.trees()

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
        newest = [end - 1 for end in accumulate(segment.num_rows for segment in segments)]
        step = Step(segments, self._inputs, tokens, newest)
        device = self._head.device
        hidden = self._head(torch.cat(features).to(device, self._head.dtype), step, self._cache)
        self._cache.commit([Kept(s.sequence, range(s.num_rows)) for s in segments])
        return hidden[step.on(device).chosen]

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
    def in_kernel(self) -> bool:
        """Whether all that is large is computed by the CPU kernel, nothing by torch."""
        return self._head.in_kernel

    @property
    def max_tokens(self) -> int:
        """Tokens of a session that the cache holds, leaving rows for the drafted levels."""
        return self._cache.max_len - RESERVED_ROWS

    def _forward_level(self, jobs: Sequence[DraftJob], hidden: Tensor, frontier: Frontier) -> Tensor:
        """Predicted features [R, H] at the frontier nodes. Args: hidden: those of the frontier before."""
        segments = [
            Segment(job.session.sequence, len(paths), paths, drafted=paths[0][-1])
            for job, paths in zip(jobs, frontier.paths, strict=True)
            if paths
        ]
        step = Step(segments, self._inputs, frontier.tokens, frontier.parents)
        return self._head(hidden[step.on(hidden.device).chosen], step, self._cache)

    def _in_draft_vocab(self, sampling: SamplingParams) -> SamplingParams:
        """The same for logits of the draft vocabulary, without what takes more than logits to know."""
        if not sampling.logit_bias and not sampling.penalised:
            return sampling
        if self._places is None:
            self._places = {token: place for place, token in enumerate(self._head.draft_vocab.tolist())}
        bias = ((self._places[token], by) for token, by in sampling.logit_bias if token in self._places)
        return replace(sampling, logit_bias=tuple(bias), repetition_penalty=1.0)

    def _candidates(
        self, jobs: Sequence[DraftJob], hidden: Tensor, counts: Sequence[int], level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `Growth.extend` takes. Args: hidden [R, H]; counts [jobs]: how many of the rows each has."""
        logits, ids = self._head.logits(hidden), self._head.draft_vocab
        owners = [job for job, count in zip(jobs, counts, strict=True) for _ in range(count)]
        if any(map(_is_shaped, owners)):
            known = [self._in_draft_vocab(job.ask.sampling or _AS_IT_IS) for job in owners]
            logits = shape_rows(logits, known, [{}] * len(owners))
        if self._head.best is None:
            logprobs = _tilted(logits.float(), owners, level, ids).log_softmax(-1)
            places, best = _best(logprobs, jobs, counts)
            return ids[places], best, _entropies(logprobs)
        most = min(max(job.ask.top_k for job in jobs), logits.shape[1])
        keys = _keys(owners, level)
        places, best, entropies = self._head.best(logits, most, None if keys is None else (keys, self._tokens))
        return ids[places], _cut(best, jobs, counts), entropies


def _integers(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Coupled drafts rank the token the target will *sample*, not the likeliest one (theory: Daliri et al.
# 2408.07978): logits are shaped like the target's and tilted by the noise it will use. Penalties are left out:
# drafting need not be exact.


def _is_shaped(job: DraftJob) -> bool:
    """Whether the job's logits are shaped before they are ranked."""
    return job.ask.sampling is not None and job.ask.sampling.reshapes


def _keys(owners: Sequence[DraftJob], level: int) -> Tensor | None:
    """[3, R] int32: the rows' keys, and whether they are coupled; None where none is."""
    params = [_sampling(job.ask) for job in owners]
    if not any(params):
        return None
    positions = [job.delta.end + level for job in owners]
    keys = noise_keys([p or _AS_IT_IS for p in params], positions, torch.device("cpu"))[..., 0]
    return torch.cat([keys, torch.tensor([[int(p is not None) for p in params]], dtype=torch.int32)])


def _tilted(logits: Tensor, owners: Sequence[DraftJob], level: int, ids: Tensor) -> Tensor:
    """Logits [R, D] float32 of rows that belong to these jobs, tilted by the noise where they ask for it."""
    coupled = [row for row, job in enumerate(owners) if _sampling(job.ask) is not None]
    if not coupled:
        return logits.float()
    params = [_sampling(owners[row].ask) or _AS_IT_IS for row in coupled]
    noise = draft_noise(params, [owners[row].delta.end + level for row in coupled], ids)
    return logits.index_add(0, torch.tensor(coupled, device=ids.device), noise)


def _sampling(ask: Ask) -> SamplingParams | None:
    """What the drafts are coupled to; greedy decoding has no noise."""
    return None if ask.sampling is None or ask.sampling.greedy else ask.sampling


def _entropies(logprobs: Tensor) -> Tensor:
    """[R] nats. Args: logprobs [R, D], overwritten: fresh memory costs more than the arithmetic."""
    terms = logprobs.exp().mul_(logprobs.clamp_min_(-1e4))
    # Several threads sum one long row alone in another order than among others.
    return terms.expand(max(len(terms), 2), -1).sum(-1)[: len(terms)].neg_()


def _cut(best: Tensor, jobs: Sequence[DraftJob], counts: Sequence[int]) -> Tensor:
    """The best [R, K] with -inf beyond as many as each row's job asks for."""
    if all(job.ask.top_k >= best.shape[1] for job in jobs):
        return best
    most = [job.ask.top_k for job, count in zip(jobs, counts, strict=True) for _ in range(count)]
    return best.masked_fill(torch.arange(best.shape[1]) >= torch.tensor(most)[:, None], -math.inf)


def _best(logprobs: Tensor, jobs: Sequence[DraftJob], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Places and log-probabilities [R, K] of each row's best, as many as its job asks for, then -inf.

    Which of equals are the best depends on how many are taken, so jobs are sorted by that and it is done once
    for each number. Args: logprobs [R, D]; counts [jobs]: how many of the rows each has.
    """
    rows: dict[int, int] = {}
    for job, count in zip(jobs, counts, strict=True):
        top_k = min(job.ask.top_k, logprobs.shape[1])
        rows[top_k] = rows.get(top_k, 0) + count
    found = [part.topk(k) for k, part in zip(rows, logprobs.split_with_sizes(list(rows.values())), strict=True)]
    if len(found) == 1:
        return found[0].indices, found[0].values
    most = max(rows)
    places = [F.pad(part.indices, (0, most - k)) for k, part in zip(rows, found, strict=True)]
    values = [F.pad(part.values, (0, most - k), value=-math.inf) for k, part in zip(rows, found, strict=True)]
    return torch.cat(places), torch.cat(values)
