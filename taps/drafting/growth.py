"""Growing proposal trees level by level (EAGLE-2, Li et al. 2406.16858, section 4), many sessions' at once.

The root's distribution gives `top_k` children; then `depth` times the `top_k` best nodes of the newest level
are extended by their `top_k` children; at the end all nodes are reranked by cumulative log-probability. A node
below which nothing could enter the tree is not extended.

A level is a fixed number of operations on arrays, whatever the number of trees, and waits for the device once:
to read the candidates. They are few, and operations on the host's own arrays cost less than torch's. Letters:
S trees, R rows (nodes that are extended), K children of each.

Knows the candidates' probabilities; nothing of how they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taps.drafting.drafter import Ask
from taps.tree import NO_PARENT, ProposalTree

_Integers: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float64]


class Frontier(NamedTuple):
    """The nodes whose children come next: tree by tree, best first."""

    # [S][rows][level] the rows of its tree that lead to each, itself last; 0 is the first below the root
    paths: list[list[list[int]]]
    tokens: list[int]  # [R]
    parents: list[int]  # [R] each one's parent, as a row of the frontier before


class _Nodes(NamedTuple):
    """All trees' nodes of one level, [S, n] each; a node's number is its column among those of all levels."""

    tokens: _Integers
    parents: _Integers  # numbers
    surprisals: _Floats  # cumulative, nats: the least is best, and infinity is no node


class _Rows(NamedTuple):
    """The nodes that are extended, [R] each."""

    trees: _Integers
    slots: _Integers  # which of its tree's
    numbers: _Integers
    surprisals: _Floats
    paths: _Integers  # [R, level]


class Growth:
    """Trees while they grow, each by its own ask. The first frontier is their roots, one row each."""

    def __init__(self, roots: Sequence[int], asks: Sequence[Ask]) -> None:
        """Args: roots, asks: [S], of at least one node each."""
        self._asks = asks
        self._trees = np.arange(len(asks))
        sizes = [min(ask.num_nodes, 1 + ask.top_k * (1 + ask.depth * ask.top_k)) for ask in asks]
        self._last = np.array(sizes) - 1
        self._depth, self._most = max(ask.depth for ask in asks), max(ask.top_k for ask in asks)
        self._widths = np.array([[ask.top_k * (n < ask.depth) for ask in asks] for n in range(self._depth)])
        none = np.zeros(len(asks), np.int64)
        tokens, column, surprisals = np.array(roots)[:, None], none[:, None], np.zeros((len(asks), 1))
        self._levels = [_Nodes(tokens, column, surprisals)]
        self._extended: list[tuple[_Rows, _Floats]] = []  # with the entropies
        self._rows = _Rows(self._trees, none, none, surprisals[:, 0], np.zeros((len(asks), 0), np.int64))
        self._firsts = self._trees  # [S] where each tree's rows begin
        self._drafted = none  # [S] rows below the root
        # Of the best nodes so far, as many as the largest tree has.
        self._best = np.full((len(asks), max(sizes)), math.inf)
        self._best[:, 0] = 0.0

    def extend(self, tokens: Tensor, logprobs: Tensor, entropies: Tensor) -> Frontier | None:
        """Add the children of every frontier node, best first; the next frontier, or None: all are grown.

        Args: tokens, logprobs: [R, K] candidates and their draft log-probability, nats, -inf for those that
        cannot be sampled or exceed the tree's `top_k`; entropies [R] of the distributions they come from, nats.
        """
        known = _read(torch.cat([tokens.double(), logprobs, entropies[:, None]], 1))
        k = tokens.shape[1]
        self._extended.append((self._rows, known[:, -1]))
        self._add(known[:, :k].astype(np.int64), known[:, k:-1])
        level = len(self._levels) - 2
        return None if level == self._depth else self._advance(level, k)

    def _add(self, tokens: _Integers, logprobs: _Floats) -> None:
        """The new level: its nodes from K r on are the children of a tree's row r."""
        trees, slots, numbers, above, _ = self._rows
        shape, flat = (len(self._trees), int(slots.max()) + 1, tokens.shape[1]), (len(self._trees), -1)
        ids, parents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        surprisals = np.full(shape, math.inf)
        ids[trees, slots] = tokens
        parents[trees, slots] = numbers[:, None]
        below = above[:, None] - np.minimum(logprobs, 0.0)
        surprisals[trees, slots] = np.where(logprobs > -math.inf, below, math.inf)  # no node where it is NaN
        self._levels.append(_Nodes(ids.reshape(flat), parents.reshape(flat), surprisals.reshape(flat)))

    def _advance(self, level: int, num_children: int) -> Frontier | None:
        """Move the frontier to the best nodes of the newest level, but those that need not be extended.

        No child scores above its parent, and of equals the upper one is first. So nothing enters a tree below
        a node that does not score above the last one of a full tree.
        """
        newest = self._levels[-1]
        self._best = np.sort(np.concatenate([self._best, newest.surprisals], 1), 1)[:, : self._best.shape[1]]
        chosen = newest.surprisals.argsort(1, "stable")[:, : self._most]
        surprisals = newest.surprisals[self._trees[:, None], chosen]
        lasts = self._best[self._trees, self._last]
        going = (surprisals < lasts[:, None]) & (np.arange(chosen.shape[1]) < self._widths[level][:, None])
        trees, slots = going.nonzero()
        if not len(trees):
            return None
        chosen = chosen[trees, slots]
        parents = self._firsts[trees] + chosen // num_children
        paths = np.concatenate([self._rows.paths[parents], (self._drafted[trees] + slots)[:, None]], 1)
        first = sum(nodes.tokens.shape[1] for nodes in self._levels[:-1])
        self._rows = _Rows(trees, slots, first + chosen, surprisals[trees, slots], paths)
        ends = going.sum(1).cumsum()
        self._firsts = np.concatenate([[0], ends[:-1]])
        self._drafted = self._drafted + ends - self._firsts
        listed, bounds = paths.tolist(), [0, *ends.tolist()]
        tokens: list[int] = newest.tokens[trees, chosen].tolist()
        return Frontier([listed[a:b] for a, b in pairwise(bounds)], tokens, parents.tolist())

    def trees(self) -> list[ProposalTree]:
        """The best nodes of each, ordered by score, then depth, then number."""
        tokens, parents, surprisals = (np.concatenate(part, 1) for part in zip(*self._levels, strict=True))
        entropies = np.zeros(surprisals.shape)
        for rows, known in self._extended:
            entropies[rows.trees, rows.numbers] = known
        order = surprisals.argsort(1, "stable")[:, : self._best.shape[1]]
        trees, places = self._trees[:, None], np.zeros_like(parents)
        places[trees, order] = np.arange(order.shape[1])
        parents = places[trees, parents[trees, order]]
        found = (tokens[trees, order], parents, 0.0 - surprisals[trees, order], entropies[trees, order])
        lists = [part.tolist() for part in found]
        return [as_tree(ask, *parts) for ask, *parts in zip(self._asks, *lists, strict=True)]


def as_tree(
    ask: Ask, tokens: list[int], parents: list[int], scores: list[float], entropies: list[float]
) -> ProposalTree:
    """Of ranked nodes, the root first; those of -inf are none."""
    n = min(ask.num_nodes, len(scores) - scores.count(-math.inf))
    return ProposalTree(
        tuple(tokens[:n]), (NO_PARENT, *parents[1:n]), tuple(scores[:n]), (0,) * n, tuple(entropies[:n])
    )


def _read(values: Tensor) -> _Floats:
    """The one place where growth waits for the device."""
    found: _Floats = values.cpu().numpy()
    return found
