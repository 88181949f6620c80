"""From decided tokens to delivered text: detokenization piece by piece, and where the answer ends.

Acceptance is cut at the first end token, stop string or token limit. Knows a tokenizer and strings; nothing
of how tokens were decided.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self, tokenizer: Decoder, max_tokens: int, end_tokens: frozenset[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._left = max_tokens
        self._end_tokens = end_tokens
        self._stop = tuple(s for s in stop if s)
        self._tokens: list[int] = []
        self._window_start = 0  # tokens from here are decoded together: a piece's text depends on its left
        self._window_end = 0  # tokens before here are in the text already
        self._held = ""  # decided text that may be the beginning of a stop string

    def push(self, tokens: Sequence[int]) -> Delivered:
        """Take in decided tokens; tokens after the end of the answer are not delivered."""
        text = ""
        for count, token in enumerate(tokens, 1):
            self._left -= 1
            ended = token in self._end_tokens
            if not ended:
                self._tokens.append(token)
                self._held += self._new_text()
                cut = self._find_stop()
                if cut is not None:
                    return Delivered(text + self._held[:cut], count, "stop")
                text += self._release()
            if ended or self._left <= 0:
                return self._end(text, count, "stop" if ended else "length")
        return Delivered(text, len(tokens), None)

    def _new_text(self) -> str:
        """The text the newest tokens add; none while they end inside a character."""
        before = self._decode(self._window_start, self._window_end)
        now = self._decode(self._window_start, len(self._tokens))
        if now.endswith(_REPLACEMENT):
            return ""
        self._window_start, self._window_end = self._window_end, len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the held text."""
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        return min(found, default=None)

    def _release(self) -> str:
        """The held text without the longest end that may begin a stop string."""
        held = self._held
        begun = (n for s in self._stop for n in range(1, min(len(s), len(held) + 1)) if held.endswith(s[:n]))
        keep = max(begun, default=0)
        released, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return released

    def _end(self, text: str, count: int, reason: FinishReason) -> Delivered:
        """Everything decided, also an incomplete character, up to a stop string."""
        before = self._decode(self._window_start, self._window_end)
        self._held += self._decode(self._window_start, len(self._tokens))[len(before) :]
        cut = self._find_stop()
        if cut is None:
            return Delivered(text + self._held, count, reason)
        return Delivered(text + self._held[:cut], count, "stop")
