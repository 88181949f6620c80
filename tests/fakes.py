"""A table-driven target, scripted drafters and small builders: logic is tested on these in milliseconds.

The fakes keep the contracts of `taps.decoding.sessions`; they know nothing of models, Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import scipy.stats
import torch
from torch import Tensor

from taps.composing import Compose
from taps.context import Context, ContextDelta
from taps.decoding.loop import decode
from taps.decoding.panel import Panel
from taps.decoding.policy import Fixed, Policy, Question, Step
from taps.decoding.sessions import DrafterSession
from taps.drafting.drafter import Ask
from taps.engine.verification import accept
from taps.lookup import Lookup
from taps.peers import PeerBusy, PeerGone
from taps.sampling import sample
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import PassCost, Verdict

PROMPT = (1, 2, 3, 1, 2)
VOCAB = 6


def random_tree(rng: random.Random, num_nodes: int = 8, root: int = 0, vocab_size: int = 4) -> ProposalTree:
    """A tree of any shape; siblings may carry the same token."""
    nodes = [
        (rng.randrange(vocab_size), rng.randrange(i + 1), -rng.uniform(0, 4), 1) for i in range(num_nodes - 1)
    ]
    return ProposalTree.ordered(root, nodes, num_nodes, [rng.random() for _ in range(num_nodes)])


def chain(*tokens: int, root: int = 0, score: float = -0.1) -> ProposalTree:
    """A chain below `root`; every node costs `score`."""
    nodes = [(token, depth, score * (depth + 1), 1) for depth, token in enumerate(tokens)]
    return ProposalTree.ordered(root, nodes, len(nodes) + 1)


def features_at(positions: Sequence[int]) -> Tensor:
    """[m, 1] features that say which absolute position they belong to."""
    return torch.tensor(positions, dtype=torch.float32)[:, None]


def positions_of(features: Tensor) -> list[int]:
    return [int(position) for position in features.flatten().tolist()]


def make_verdict(
    tokens: Sequence[int],
    positions: Sequence[int] = (),
    owners: Sequence[int] = (),
    num_nodes: int = 0,
    depth: int = 0,
) -> Verdict:
    return Verdict(tuple(tokens), tuple(owners), features_at(positions), num_nodes, depth, 1)


def chi_square_p(observed: Sequence[int], expected: Sequence[float]) -> float:
    """The p-value of counts under probabilities; tokens of probability 0 must not occur at all."""
    assert all(count == 0 for count, p in zip(observed, expected, strict=True) if p == 0)
    cells = [(count, p * sum(observed)) for count, p in zip(observed, expected, strict=True) if p > 0]
    return float(scipy.stats.chisquare(*zip(*cells, strict=True)).pvalue)


class TableTarget:
    """Next-token logits looked up by the last two tokens; a row is drawn when it is first needed."""

    def __init__(self, vocab_size: int = VOCAB, spread: float = 1.5, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self._spread = spread
        self._seed = seed
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def logits(self, history: Sequence[int]) -> Tensor:
        """[V]"""
        key = tuple(history[-2:])
        if key not in self._rows:
            rng = random.Random(f"{self._seed} {key}")
            self._rows[key] = torch.tensor([rng.gauss(0, self._spread) for _ in range(self.vocab_size)])
        return self._rows[key]

    def decide(self, history: Sequence[int], prompt_length: int, params: SamplingParams) -> int:
        """The token after `history`: what plain decoding is by definition."""
        counts = Counter(history[prompt_length:])
        return sample(self.logits(history), params, len(history), counts)

    def continuation(self, prompt: Sequence[int], params: SamplingParams, num_tokens: int) -> list[int]:
        """Plain autoregressive decoding, token by token, without trees or sessions."""
        history = list(prompt)
        for _ in range(num_tokens):
            history.append(self.decide(history, len(prompt), params))
        return history[len(prompt) :]


class TableVerifier:
    """Implements `VerifierSession` over a table; lost after `lives` passes, if that is given."""

    def __init__(
        self, target: TableTarget, tree_nodes: int = 1 << 30, lives: int | None = None,
        ms_of: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        """Args: ms_of: what a pass is said to cost, by its rows."""
        self._target = target
        self._ms_of = ms_of
        self._params = SamplingParams()
        self._tree_nodes = tree_nodes
        self._lives = lives
        self._tokens: list[int] = []
        self._prompt_length = 0
        self._held_back: int | None = None  # the window of features that are told when it stops
        self.numerics = "table"

    async def prefill(self, state: SessionState, feature_window: int, tells: bool = True) -> Verdict:
        await self._live()
        self._held_back = None if tells else feature_window
        tokens, self._params = state.tokens, state.sampling
        self._tokens = list(tokens)
        self._prompt_length = len(tokens) - state.num_generated
        token = self._decide([])
        self._tokens.append(token)
        told = feature_window if tells else 0
        return make_verdict([token], range(max(0, len(tokens) - told), len(tokens)))

    async def verify(self, tree: ProposalTree) -> Verdict:
        await self._live()
        kept = tree.check().prefix(self._tree_nodes + 1)
        assert kept.tokens[0] == self._tokens[-1], "a tree grows from the token decided last"
        root_position = len(self._tokens) - 1
        path, tokens, owners = accept(kept, lambda _, accepted: self._decide(accepted))
        self._tokens += tokens
        positions = range(root_position, root_position + len(path))
        verdict = make_verdict(tokens, positions, owners, len(kept) - 1, max(kept.depths))
        return (
            verdict
            if self._ms_of is None
            else replace(verdict, cost=PassCost(len(kept), self._ms_of(len(kept))))
        )

    async def ahead(self, window: int, lookup: Lookup | None = None) -> list[Verdict]:
        if window:
            verdict = await self.verify(ProposalTree.root_only(self._tokens[-1]))
            return [verdict if self._held_back is None else replace(verdict, features=verdict.features[:0])]
        if self._held_back is None:
            return []
        end, held_back, self._held_back = len(self._tokens) - 1, self._held_back, None
        return [make_verdict([], range(max(0, end - held_back), end))]

    def _decide(self, accepted: Sequence[int]) -> int:
        return self._target.decide([*self._tokens, *accepted], self._prompt_length, self._params)

    async def _live(self) -> None:
        """Let the other tasks run, as a remote verifier would, unless the replica is lost."""
        await asyncio.sleep(0)
        if self._lives is not None:
            self._lives -= 1
            if self._lives < 0:
                raise PeerGone("the verifier was lost")


class VerifierPool:
    """Opens verifier sessions; the i-th is lost after `lives[i]` passes, those after the last live on.

    The opening is refused for want of room where its number is in `busy`.
    """

    def __init__(
        self, target: TableTarget, params: SamplingParams, lives: Sequence[int] = (),
        tree_nodes: int = 1 << 30, busy: Collection[int] = (), ms_of: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        self._target = target
        self._ms_of = ms_of
        self.params = params
        self._lives = iter(lives)
        self._tree_nodes = tree_nodes
        self._busy = busy
        self.num_opened = 0
        self.num_open = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[TableVerifier]:
        self.num_opened += 1
        if self.num_opened - 1 in self._busy:
            raise PeerBusy("no room")
        self.num_open += 1
        try:
            yield TableVerifier(self._target, self._tree_nodes, next(self._lives, None), self._ms_of)
        finally:
            self.num_open -= 1


Draft = Callable[[Sequence[int], Ask], ProposalTree]


class ScriptedDrafter:
    """Implements `DrafterSession`: drafts by a function of all tokens decided so far.

    `wait` is awaited before each answer, which makes a late drafter; call number `dies_at` (from 0) raises.
    """

    def __init__(
        self,
        index: int,
        draft: Draft,
        wait: Callable[[], Awaitable[object]] | None = None,
        dies_at: int | None = None,
        is_at_hand: bool = False,
    ) -> None:
        self.index = index
        self.is_at_hand = is_at_hand
        self.lookup = None
        self.name = f"drafter {index}"
        self.deltas: list[ContextDelta] = []
        self._draft = draft
        self._wait = wait
        self._dies_at = dies_at
        self._tokens: list[int] = []

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        assert delta.start <= len(self._tokens), "the news join what is known"
        self.deltas.append(delta)
        self._tokens[delta.start :] = delta.tokens
        if self._wait is not None:
            await self._wait()
        if self._dies_at is not None and len(self.deltas) > self._dies_at:
            raise PeerGone(f"{self.name} was lost")
        return self._draft(self._tokens, ask)


def foresight(target: TableTarget, params: SamplingParams, prompt_length: int = len(PROMPT)) -> Draft:
    """A perfect drafter: the target's own coming tokens, each beside one wrong sibling."""

    def draft(tokens: Sequence[int], ask: Ask) -> ProposalTree:
        history, parent = list(tokens), 0
        nodes: list[tuple[int, int, float, int]] = []
        for depth in range(1, ask.depth + 2):
            right = target.decide(history, prompt_length, params)
            wrong = (right + 1) % target.vocab_size
            nodes += [(wrong, parent, -0.2 * depth, 0), (right, parent, -0.1 * depth, 0)]
            parent = len(nodes)
            history.append(right)
        return ProposalTree.ordered(tokens[-1], nodes, ask.num_nodes, [0.1] * (len(nodes) + 1))

    return draft


def guesses(seed: int, vocab_size: int = VOCAB) -> Draft:
    """A drafter that knows nothing: random trees, with duplicate siblings among them."""
    rng = random.Random(seed)
    return lambda tokens, ask: random_tree(rng, ask.num_nodes, tokens[-1], vocab_size)


def lies(seed: int, vocab_size: int = VOCAB) -> Draft:
    """Sure of nonsense, more of it than was asked for, and at times for another root."""
    rng = random.Random(seed)

    def draft(tokens: Sequence[int], ask: Ask) -> ProposalTree:
        root = tokens[-1] if rng.random() < 0.7 else rng.randrange(vocab_size)
        tree = random_tree(rng, 3 * ask.num_nodes, root, vocab_size)
        return ProposalTree(
            tree.tokens, tree.parents, (0.0,) * len(tree), (7,) * len(tree), (-1.0,) * len(tree)
        )

    return draft


async def turns(count: int) -> None:
    """Let the other tasks run `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Poll another thread, task or side of a socket, with a bound."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not come true")


async def run_steps(
    pool: VerifierPool,
    panel: Panel,
    compose: Compose | Policy,
    num_tokens: int,
    ask: Ask | None = None,
    context: Context | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Step]:
    """Decode after `PROMPT` until at least `num_tokens` tokens are there. Args: ask: of a way to compose."""
    policy = Fixed(compose, ask or Ask(num_nodes=8, depth=2)) if callable(compose) else compose
    context = context or Context(SessionState(tuple(PROMPT), sampling=pool.params), feature_window=8)
    steps = []
    async with aclosing(decode(context, pool.open, panel, policy, clock)) as decoding:
        async for step in decoding:
            steps.append(step)
            if context.num_generated >= num_tokens:
                break
    await panel.close()
    return steps


async def ask_all(panel: Panel, context: Context, ask: Ask, pass_s: float = math.inf) -> list[ProposalTree]:
    """The same question to all who may be asked."""
    asked = panel.ask(context, {drafter: Question(ask) for drafter in panel.idle()}, pass_s)
    return await panel.answers(asked, context.root)


def tokens_of(steps: Sequence[Step], num_tokens: int) -> list[int]:
    return [token for step in steps for token in step.verdict.tokens][:num_tokens]


def panel_of(*drafters: DrafterSession) -> Panel:
    """A panel that waits for nobody: whoever answers without waiting is in time."""
    return Panel(drafters, deadline_s=0.0)
