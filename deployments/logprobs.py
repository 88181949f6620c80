"""Log-probabilities as answers show them: tokens as text and bytes, in the forms of both endpoints.

Knows a tokenizer and numbers; nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from taps.verdict import TokenLogprob

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token of one byte, as SentencePiece writes it
_LEAST = -9999.0  # what JSON has in place of minus infinity


class Shown(NamedTuple):
    """A token and its log-probability."""

    text: str
    bytes: tuple[int, ...]
    logprob: float


class Told(NamedTuple):
    """A delivered token, and the likeliest in its place."""

    own: Shown
    likeliest: Sequence[Shown]

    def in_chat(self) -> dict[str, Any]:
        return {**_as_json(self.own), "top_logprobs": [_as_json(one) for one in self.likeliest]}


class TokenTexts:
    """What a tokenizer's single tokens are."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, tuple[int, ...]]] = {}

    def tell(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[Told]:
        """Args: logprobs: of the tokens and perhaps of more."""
        return [
            Told(self._show(token, one.own), [self._show(*pair) for pair in one.likeliest])
            for token, one in zip(tokens, logprobs, strict=False)
        ]

    def text_of(self, token: int) -> str:
        return self._look(token)[0]

    def _show(self, token: int, logprob: float) -> Shown:
        return Shown(*self._look(token), max(logprob, _LEAST))

    def _look(self, token: int) -> tuple[str, tuple[int, ...]]:
        if token not in self._known:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            self._known[token] = text, tuple(self._bytes(token, text))
        return self._known[token]

    def _bytes(self, token: int, text: str) -> bytes:
        """Of a token that ends or begins inside a character, too, which its text does not say."""
        if _REPLACEMENT not in text:
            return text.encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        if all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        return text.encode()


def in_chat(told: Sequence[Told]) -> dict[str, Any]:
    return {"content": [one.in_chat() for one in told], "refusal": None}


def in_completion(told: Sequence[Told], offset: int) -> dict[str, Any]:
    """Args: offset: of the first token in the answer's text."""
    offsets = [offset]
    for one in told:
        offsets.append(offsets[-1] + len(one.own.text))
    best = [{one.text: one.logprob for one in own.likeliest} for own in told]
    return {
        "tokens": [one.own.text for one in told],
        "token_logprobs": [one.own.logprob for one in told],
        "top_logprobs": best if any(best) else None,
        "text_offset": offsets[:-1],
    }


def _as_json(one: Shown) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}


def _characters_of_bytes() -> dict[str, int]:
    """How byte-level tokenizers write bytes (GPT-2): printable ones as they are, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _characters_of_bytes()
