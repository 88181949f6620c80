"""What a verifier looks up in its sessions' own texts while they decode plainly, with what it is worth.

It costs no round trip, so it pays where drafting does not; the goodput rule leaves out what does not pay in a
pass (`taps.engine.scheduling`).

Knows tokens and trees; nothing of passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from taps.adaptive.calibration import Calibration
from taps.adaptive.judging import Judge
from taps.lookup import Lookup, NgramIndex, guess
from taps.tree import ProposalTree


class Lookups:
    """What all sessions of one verifier learn together. Implements `taps.engine.ahead.Guesser`."""

    def __init__(self) -> None:
        self._calibrations = {True: Calibration(), False: Calibration()}  # by whether text is greedy

    def open(self, is_greedy: bool) -> SessionLookups:
        return SessionLookups(Judge(self._calibrations[is_greedy]))


class SessionLookups:
    """Implements `taps.engine.ahead.Guesses`."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._index: NgramIndex | None = None
        self._guessed: list[tuple[int, ProposalTree]] = []  # tokens decided then, and what was found

    def tree(self, tokens: Sequence[int], lookup: Lookup) -> ProposalTree:
        """What may come next, calibrated. Args: tokens: all that are decided, those of the last call first."""
        if self._index is None:
            self._index = NgramIndex(lookup.max_ngram, lookup.min_ngram)
        self._index.extend(tokens[len(self._index.tokens) :])
        self._learn(tokens)
        found = guess(self._index, lookup.num_tokens)
        if len(found) == 1:
            return found
        self._guessed.append((len(tokens), found))
        worth = self._judge.worth(found)
        scored = replace(found, scores=(0.0, *(log for _, log in worth), *found.scores[1 + len(worth) :]))
        return replace(scored.prefix(1 + len(worth)).owned_by(lookup.drafter), calibrated=True)

    def _learn(self, tokens: Sequence[int]) -> None:
        """Compare what was found with the text, once that has passed it."""
        waiting, self._guessed = self._guessed, []
        for end, tree in waiting:
            if len(tokens) - end >= len(tree) - 1:
                self._judge.learn(tree, tokens[end:])
            else:
                self._guessed.append((end, tree))
