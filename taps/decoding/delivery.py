"""From decided tokens to delivered text: detokenization piece by piece, and where the answer ends.

Acceptance is cut at the first end token, stop string or token limit. Stop strings are looked for in the text as
the target wrote it; special tokens, which are part of that, are not delivered. Knows a tokenizer and strings;
nothing of how tokens were decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import compress
from typing import Any, Literal, NamedTuple, Protocol

from transformers import GenerationConfig

FinishReason = Literal["stop", "length"]
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def end_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer of the target at `path`: its generation config's, and the tokenizer's own."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


class Decoder(Protocol):
    """The part of a tokenizer that delivery needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


class Delivered(NamedTuple):
    text: str  # may be empty while a character or a possible stop string is incomplete
    num_tokens: int  # tokens that count as delivered, of those pushed
    finish_reason: FinishReason | None


class Delivery:
    """The text of one answer."""

    def __init__(
        self,
        tokenizer: Decoder,
        max_tokens: int,
        end_tokens: frozenset[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        """Args: min_tokens: in whose text no stop string is looked for."""
        self._tokenizer = tokenizer
        self._least_left = max_tokens - min_tokens
        self._left = max_tokens
        self._end_tokens = end_tokens
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._window_start = 0  # tokens from here are decoded together: a piece's text depends on its left
        self._window_end = 0  # tokens before here are in the text already
        self._held = ""  # written text that may be the beginning of a stop string
        self._shown: tuple[bool, ...] = ()  # which of its characters are delivered
        self._specials: list[tuple[int, str]] = []  # special tokens in what is not held yet: where, what

    def push(self, tokens: Sequence[int]) -> Delivered:
        """Take in decided tokens; tokens after the end of the answer are not delivered."""
        text = ""
        for count, token in enumerate(tokens, 1):
            self._left -= 1
            ended = token in self._end_tokens
            if not ended:
                self._write(token)
                if self._is_too_short:
                    text += self._take(len(self._held))
                cut = self._find_stop()
                if cut is not None:
                    return Delivered(text + self._take(cut), count, "stop")
                text += self._take(self._num_safe())
            if ended or self._left <= 0:
                return self._end(text, count, "stop" if ended else "length")
        return Delivered(text, len(tokens), None)

    @property
    def _is_too_short(self) -> bool:
        """Whether the text so far is too short to end."""
        return self._left >= self._least_left

    def _write(self, token: int) -> None:
        self._tokens.append(token)
        rest = self._rest()
        special = self._special_text(token) if self._stop else ""
        if special:
            self._specials.append((len(rest), special))
        if not rest.endswith(_REPLACEMENT) or (special and self._would_stop(rest)):
            self._hold_rest(rest)

    def _rest(self) -> str:
        """What the newest tokens add to the text; its end changes while they end inside a character."""
        before = self._decode(self._window_start, self._window_end)
        return self._decode(self._window_start, len(self._tokens))[len(before) :]

    def _hold_rest(self, rest: str) -> None:
        """Hold the rest, with the special tokens in it where they were written."""
        begin = 0
        for end, special in self._specials:
            self._hold(rest[begin:end], shown=True)
            self._hold(special, shown=False)
            begin = end
        self._hold(rest[begin:], shown=True)
        self._specials = []
        if rest:
            self._window_start, self._window_end = self._window_end, len(self._tokens)

    def _would_stop(self, rest: str) -> bool:
        """Whether there is a stop string before or in the special token that cuts the character at hand."""
        trial = copy(self)
        trial._hold_rest(rest)
        return not self._is_too_short and trial._find_stop() is not None

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _special_text(self, token: int) -> str:
        """What a special token is written as; nothing for any other token."""
        if self._tokenizer.decode([token], skip_special_tokens=True):
            return ""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _hold(self, text: str, shown: bool) -> None:
        self._held += text
        self._shown += (shown,) * len(text)

    def _take(self, count: int) -> str:
        """The first `count` characters leave the held text; those that are delivered are returned."""
        taken = "".join(compress(self._held[:count], self._shown))
        self._held, self._shown = self._held[count:], self._shown[count:]
        return taken

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the held text."""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        return min(found, default=None)

    def _num_safe(self) -> int:
        """How long the held text is without the longest end that may begin a stop string."""
        held = self._held
        begun = (n for s in self._stop for n in range(1, min(len(s), len(held) + 1)) if held.endswith(s[:n]))
        return len(held) - max(begun, default=0)

    def _end(self, text: str, count: int, reason: FinishReason) -> Delivered:
        """Everything decided, also an incomplete character, up to a stop string."""
        self._hold_rest(self._rest())
        if self._is_too_short:
            text += self._take(len(self._held))
        cut = self._find_stop()
        if cut is None:
            return Delivered(text + self._take(len(self._held)), count, reason)
        return Delivered(text + self._take(cut), count, "stop")
