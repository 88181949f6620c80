"""Delivery: tokens become text piece by piece, and the answer ends where it must."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from taps.decoding.delivery import Delivered, Delivery

END = 10_000


class BytesTokenizer:
    """Tokens stand for byte strings, so a character may be spread over several; the end token has no text.

    With `drops_first_space` a text loses its leading space, as sentencepiece tokenizers do it.
    """

    def __init__(self, drops_first_space: bool = False) -> None:
        self._pieces: list[bytes] = []
        self._drops_first_space = drops_first_space

    def ids(self, *pieces: bytes) -> list[int]:
        self._pieces += pieces
        return list(range(len(self._pieces) - len(pieces), len(self._pieces)))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        text = b"".join(self._pieces[i] for i in token_ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._drops_first_space else text


def deliver(
    pieces: Sequence[bytes], stop: Sequence[str] = (), max_tokens: int = 1000, ended: bool = False
) -> list[Delivered]:
    """What each token of an answer delivers, pushed one by one."""
    tokenizer = BytesTokenizer()
    delivery = Delivery(tokenizer, max_tokens, frozenset({END}), stop)
    return [delivery.push([token]) for token in [*tokenizer.ids(*pieces), *([END] if ended else [])]]


def texts(delivered: Sequence[Delivered]) -> list[str]:
    return [piece.text for piece in delivered]


def random_pieces(rng: random.Random, text: str) -> list[bytes]:
    """The text's bytes, cut anywhere."""
    data, pieces = text.encode(), []
    while data:
        size = rng.randrange(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def test_text_is_delivered_as_it_is_decided() -> None:
    assert texts(deliver([b"Hel", b"lo", b" you"])) == ["Hel", "lo", " you"]


def test_a_character_split_over_tokens_is_delivered_when_it_is_whole() -> None:
    smile = "\N{GRINNING FACE}".encode()
    assert texts(deliver([b"a", smile[:1], smile[1:3], smile[3:] + b"!"])) == [
        "a",
        "",
        "",
        "\N{GRINNING FACE}!",
    ]


def test_a_character_that_never_becomes_whole_is_flushed_as_the_replacement() -> None:
    assert texts(deliver([b"a\xf0\x9f"], ended=True)) == ["", "a\N{REPLACEMENT CHARACTER}"]
    (last,) = deliver([b"a\xf0\x9f"], max_tokens=1)
    assert last == ("a\N{REPLACEMENT CHARACTER}", 1, "length")


@pytest.mark.parametrize("drops_first_space", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_add_up_to_the_whole_text_however_they_are_cut(seed: int, drops_first_space: bool) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab \n\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}") for _ in range(40))
    tokenizer = BytesTokenizer(drops_first_space)
    tokens = tokenizer.ids(*random_pieces(rng, text))
    delivery = Delivery(tokenizer, len(tokens), frozenset({END}))
    delivered = ""
    for start in range(0, len(tokens), 3):
        delivered += delivery.push(tokens[start : start + 3]).text
    assert delivered == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_text_ends_before_the_first_stop_string_however_tokens_are_cut_and_pushed(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("ab\N{LATIN SMALL LETTER E WITH ACUTE}") for _ in range(40))
    stop = "".join(rng.choice("ab\N{LATIN SMALL LETTER E WITH ACUTE}") for _ in range(rng.randrange(1, 5)))
    tokenizer = BytesTokenizer()
    tokens = tokenizer.ids(*random_pieces(rng, text))
    delivery, delivered, start = Delivery(tokenizer, len(tokens), frozenset({END}), [stop]), "", 0
    while True:
        size = rng.randrange(1, 6)
        piece = delivery.push(tokens[start : start + size])
        delivered, start = delivered + piece.text, start + size
        if piece.finish_reason is not None:
            break
    assert delivered == text.split(stop)[0]
    assert piece.finish_reason == ("stop" if stop in text else "length")


def test_what_may_become_a_stop_string_is_held_back_and_nothing_more() -> None:
    assert texts(deliver([b"one EN", b"Dx", b" EN", b"D"], stop=["END."])) == ["one ", "ENDx", " ", ""]


def test_a_stop_string_across_tokens_ends_the_answer_before_it() -> None:
    *_, last = deliver([b"one E", b"N", b"D two"], stop=["END"])
    assert last == ("", 1, "stop")


def test_held_text_is_delivered_when_the_answer_ends_otherwise() -> None:
    assert deliver([b"one EN"], stop=["END"], ended=True)[-1] == ("EN", 1, "stop")
    assert deliver([b"one EN"], stop=["END"], max_tokens=1)[-1] == ("one EN", 1, "length")


def test_the_earliest_of_several_stop_strings_counts() -> None:
    (only,) = deliver([b"a, b; c"], stop=[";", ","])
    assert only == ("a", 1, "stop")


def test_an_empty_stop_string_stops_nothing() -> None:
    assert deliver([b"a"], stop=[""]) == [("a", 1, None)]


def test_a_stop_string_beside_an_unfinished_character_is_found_when_the_answer_ends() -> None:
    assert deliver([b"one END\xf0\x9f"], stop=["END"], max_tokens=1)[-1] == ("one ", 1, "stop")


def test_tokens_after_the_end_are_neither_delivered_nor_counted() -> None:
    tokenizer = BytesTokenizer()
    a, b, c = tokenizer.ids(b"a", b"b", b"c")
    assert Delivery(tokenizer, 99, frozenset({END})).push([a, END, b, c]) == ("a", 2, "stop")
    assert Delivery(tokenizer, 2, frozenset({END})).push([a, b, c]) == ("ab", 2, "length")
    assert Delivery(tokenizer, 99, frozenset({END}), ["b"]).push([a, b, c]) == ("a", 2, "stop")


def test_the_limit_counts_tokens_over_all_pushes() -> None:
    assert [piece.finish_reason for piece in deliver([b"a", b"b", b"c"], max_tokens=3)] == [
        None,
        None,
        "length",
    ]


def test_an_end_token_at_the_limit_is_a_stop() -> None:
    assert deliver([b"a"], max_tokens=2, ended=True)[-1] == ("", 1, "stop")


def test_any_of_the_end_tokens_ends_the_answer() -> None:
    assert Delivery(BytesTokenizer(), 99, frozenset({END, END + 1})).push([END + 1]) == ("", 1, "stop")
