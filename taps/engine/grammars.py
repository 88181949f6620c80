"""What a text must be: grammars that say which tokens may come next, along a tree and for the target's own.

`llguidance` does the parsing. Knows tokens, trees and grammars; nothing of logits, sessions or who asked.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from taps.tree import ROOT, ProposalTree
from taps.verdict import InvalidGrammar

_MOST_FORCED = 16  # tokens that are drafted because nothing else may come
_MOST_KNOWN = 64  # grammars that are kept compiled


class Grammars:
    """Those of one target's texts; the latest ones stay compiled. Any thread may call it."""

    def __init__(self, make: Callable[[], LLTokenizer]) -> None:
        """Args: make: the target's tokenizer, with as many tokens as there are logits, and with the end tokens
        of which one comes where a text may end. Called for the first text: it takes a second.
        """
        self._make = make
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """Raises `InvalidGrammar` where `llguidance` does not know the target's kind."""
        try:
            return self._make()
        except ValueError as error:
            raise InvalidGrammar(f"this target's tokenizer knows no grammars: {error}") from error

    def open(self, grammar: str, generated: Sequence[int] = ()) -> TextState:
        """The state of one text that began with these tokens. Raises `InvalidGrammar`."""
        with self._lock:
            known = self._known.get(grammar)
            if known is None:
                known = self._known[grammar] = LLMatcher(self.tokenizer, grammar, log_level=0)
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
            self._known.move_to_end(grammar)
            if known.is_error():
                raise InvalidGrammar(known.get_error())
            state = TextState(known.deep_copy(), self.tokenizer.eos_tokens)
        state.extend(generated)
        return state


class TextState:
    """One text so far. One thread at a time."""

    def __init__(self, matcher: LLMatcher, end_tokens: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_tokens = end_tokens

    @property
    def _has_all(self) -> bool:
        """Whether nothing but an end token may come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these. Raises `InvalidGrammar` where it may not."""
        for token in tokens:
            if self._has_all:
                if token not in self._end_tokens:
                    raise InvalidGrammar("the text goes on behind its end")
            elif not self._matcher.consume_token(token):
                raise InvalidGrammar(self._matcher.get_error())

    def drafts(self, tree: ProposalTree) -> ProposalTree:
        """What is worth checking: the tokens that must come next, where there are any; else what may."""
        forced = [] if self._has_all else self._matcher.compute_ff_tokens()[:_MOST_FORCED]
        if forced:
            n = 1 + len(forced)
            return ProposalTree((tree.tokens[ROOT], *forced), tuple(range(-1, n - 1)), (0.0,) * n, (0,) * n)
        allowed = {ROOT}
        for node in range(1, len(tree)):
            if tree.parents[node] in allowed:
                path = list(tree.token_path(node))
                if self._matcher.validate_tokens(path) == len(path):
                    allowed.add(node)
        return tree.only(sorted(allowed))

    def allowed(self, tree: ProposalTree) -> Tensor:
        """[n, V] uint8: 0 for each token that may not come after a node. The text itself stays where it is.

        Raises `InvalidGrammar` where the parser has reached one of its limits.
        """
        rows = []
        for node in range(len(tree)):
            path = list(tree.token_path(node))
            consumed = self._matcher.try_consume_tokens(path)
            if consumed < len(path):
                raise InvalidGrammar("a tree has tokens that may not come")
            rows.append(self._matcher.compute_logit_bias())
            if self._matcher.is_error() or (consumed and not self._matcher.rollback(consumed)):
                raise InvalidGrammar(self._matcher.get_error())
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(tree), -1)
