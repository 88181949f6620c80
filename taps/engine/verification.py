"""Acceptance: which drafted tokens the target agrees with. Pure; knows trees, not logits or caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from taps.tree import ROOT, ProposalTree


class Acceptance(NamedTuple):
    """The outcome of one verify pass."""

    path: tuple[int, ...]  # node indices from the root down, root included: what the cache keeps
    tokens: tuple[int, ...]  # the accepted drafted tokens, then the bonus token: never empty
    owners: tuple[int, ...]  # owner bits of each accepted drafted token


def accept(tree: ProposalTree, decide: Callable[[int, Sequence[int]], int]) -> Acceptance:
    """Walk from the root along the tokens the target decides; the first one not drafted is the bonus.

    `decide(node, tokens)` is the target's own next token after `node`, given the drafted tokens accepted
    on the way there. It is asked on the walked nodes only. Candidates are taken as given (q = 1, as
    EAGLE-2 is released), so this has the same law as sequential rejection. Nodes with the same token path
    (a concatenated merge) are walked as one.
    """
    walked = [ROOT]
    tokens: list[int] = []
    owners: list[int] = []
    while True:
        token = decide(walked[0], tokens)
        matching = [c for node in walked for c in tree.children[node] if tree.tokens[c] == token]
        tokens.append(token)
        if not matching:
            return Acceptance(tree.path(walked[0]), tuple(tokens), tuple(owners))
        owner = 0
        for node in matching:
            owner |= tree.owners[node]
        owners.append(owner)
        walked = matching
