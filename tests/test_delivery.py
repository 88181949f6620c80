"""Delivery: tokens become text piece by piece, and the answer ends where it must."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from taps.decoding.delivery import Delivered, Delivery

END = 10_000


class BytesTokenizer:
    """Tokens stand for byte strings, so a character may be spread over several; the end token has no text.

    With `drops_first_space` a text loses its leading space, as sentencepiece tokenizers do it; pieces in
    `special` are special tokens.
    """

    def __init__(self, drops_first_space: bool = False, special: Sequence[bytes] = ()) -> None:
        self._pieces: list[bytes] = []
        self._drops_first_space = drops_first_space
        self._special = special

    def ids(self, *pieces: bytes) -> list[int]:
        self._pieces += pieces
        return list(range(len(self._pieces) - len(pieces), len(self._pieces)))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        pieces = [self._pieces[i] for i in token_ids]
        written = [piece for piece in pieces if not (skip_special_tokens and piece in self._special)]
        text = b"".join(written).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._drops_first_space else text


def deliver(
    pieces: Sequence[bytes],
    stop: Sequence[str] = (),
    max_tokens: int = 1000,
    ended: bool = False,
    special: Sequence[bytes] = (),
) -> list[Delivered]:
    """What each token of an answer delivers, pushed one by one."""
    tokenizer = BytesTokenizer(special=special)
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


@pytest.mark.parametrize(
    ("least", "delivered"),
    [
        (0, [("one ", 1, "stop")]),
        (1, [("one END", 1, None), (" two ", 1, "stop")]),
        (2, [("one END", 1, None), (" two END", 1, None), (" three ", 1, "stop")]),
        (3, [("one END", 1, None), (" two END", 1, None), (" three END", 1, "length")]),
    ],
)
def test_no_stop_string_is_looked_for_before_there_are_tokens_enough(
    least: int, delivered: list[tuple[str, int, str | None]]
) -> None:
    tokenizer = BytesTokenizer()
    tokens = tokenizer.ids(b"one END", b" two END", b" three END")
    delivery = Delivery(tokenizer, 3, frozenset({END}), ["END"], least)
    assert [delivery.push([token]) for token in tokens[: len(delivered)]] == delivered


def test_any_of_the_end_tokens_ends_the_answer() -> None:
    assert Delivery(BytesTokenizer(), 99, frozenset({END, END + 1})).push([END + 1]) == ("", 1, "stop")


SPECIAL = [b"<s>", b"<u>"]


def test_a_special_token_is_not_delivered() -> None:
    assert texts(deliver([b"a", b"<s>", b"b"], special=SPECIAL)) == ["a", "", "b"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<s>", "Hi\n"),
        ("\n<s>", "Hi"),
        ("<s>user", "Hi\n"),
        ("i\n<s>us", "H"),
        ("<s>usual", "Hi\nuser"),
        ("<u>", "Hi\nuser"),
        ("\nuser", "Hi\nuser"),
    ],
)
def test_a_stop_string_is_looked_for_where_special_tokens_are_written(stop: str, text: str) -> None:
    delivered = deliver([b"Hi", b"\n", b"<s>", b"user"], [stop], special=SPECIAL, max_tokens=4)
    assert "".join(texts(delivered)).startswith(text)
    assert any(piece.finish_reason == "stop" for piece in delivered) == (text in ("Hi\n", "Hi", "H"))


def test_a_special_token_that_begins_a_stop_string_holds_back_what_comes_after_it() -> None:
    pieces = deliver([b"a", b"<s>", b"us", b"e"], ["<s>user"], special=SPECIAL)
    assert texts(pieces) == ["a", "", "", ""]
    assert texts(deliver([b"a", b"<s>", b"us", b"x"], ["<s>user"], special=SPECIAL)) == ["a", "", "", "usx"]


def test_an_end_token_ends_the_answer_before_a_stop_string_with_it() -> None:
    tokenizer = BytesTokenizer(special=[b"<e>"])
    newline, end = tokenizer.ids(b"\n", b"<e>")
    assert Delivery(tokenizer, 99, frozenset({end}), ["\n<e>"]).push([newline, end]) == ("\n", 2, "stop")


@pytest.mark.parametrize("stop", [[], ["never"]])
def test_a_space_after_a_special_token_is_kept(stop: Sequence[str]) -> None:
    """Decoded without its left side the word would lose it."""
    tokenizer = BytesTokenizer(drops_first_space=True, special=SPECIAL)
    tokens = tokenizer.ids(b"a", b"<s>", b"<u>", b" b", b" ", b"c")
    delivery = Delivery(tokenizer, 99, frozenset({END}), stop)
    assert "".join(delivery.push([token]).text for token in tokens) == "a b c"


def sentencepiece_like() -> Any:
    """As Llama-2 has it: words begin with a mark, rare characters are bytes, the first space is dropped."""
    words = ["\u2581", "\u2581the", "\u2581a", "he", "o", "\n", "\u2581\u2581", "x"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in ("<s>", "</s>", "<|turn|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer)


class Answers(NamedTuple):
    """Random answers in the tokens of one kind of tokenizer."""

    tokenizer: Any
    first_word: int  # tokens from here make a text in any order

    def draw(self, count: int) -> Iterator[tuple[random.Random, list[int]]]:
        """Special tokens are among them, also within characters."""
        size, added = len(self.tokenizer), sorted(self.tokenizer.get_added_vocab().values())
        special = [token for token in added if not self.tokenizer.decode([token], skip_special_tokens=True)]
        words = [token for token in range(self.first_word, size) if token not in special]
        smile = self.tokenizer("\N{GRINNING FACE}")["input_ids"]
        for seed in range(count):
            rng = random.Random(seed)
            tokens: list[int] = []
            for _ in range(rng.randrange(1, 15)):
                tokens += [*rng.choice([smile, []]), rng.choice(words)]
            for _ in range(rng.randrange(6)):
                tokens.insert(rng.randrange(len(tokens) + 1), rng.choice(special))
            yield rng, tokens


@pytest.fixture(params=["byte level", "sentencepiece"])
def answers(request: pytest.FixtureRequest) -> Answers:
    if request.param == "byte level":
        return Answers(request.getfixturevalue("tokenizer"), 0)
    return Answers(sentencepiece_like(), 259)


def in_chunks(rng: random.Random, delivery: Delivery, tokens: Sequence[int]) -> tuple[str, str | None]:
    text, start, end = "", 0, None
    while start < len(tokens) and end is None:
        size = rng.randrange(1, 6)
        piece = delivery.push(tokens[start : start + size])
        text, start, end = text + piece.text, start + size, piece.finish_reason
    return text, end


@pytest.mark.parametrize("stop", [[], ["never \N{SNOWMAN}"], ["<|never|>"]])
def test_any_answer_is_delivered_as_it_decodes_as_a_whole(answers: Answers, stop: Sequence[str]) -> None:
    for rng, tokens in answers.draw(200):
        delivery = Delivery(answers.tokenizer, len(tokens), frozenset(), stop)
        whole = answers.tokenizer.decode(tokens, skip_special_tokens=True)
        assert in_chunks(rng, delivery, tokens) == (whole, "length"), tokens


class Written(NamedTuple):
    """A text as the target wrote it: each character, and whether it is delivered."""

    characters: list[tuple[str, bool]]

    @classmethod
    def of(cls, tokenizer: Any, tokens: Sequence[int]) -> Written:
        """Special tokens stand behind what was there when they came, or behind the character that they cut."""
        texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1)]
        whole, characters, begin = texts[-1], [], 0
        for n, token in enumerate(tokens):
            if tokenizer.decode([token], skip_special_tokens=True) == "":
                end = min(map(len, texts[n:]))
                characters += [(c, True) for c in whole[begin:end]]
                characters += [(c, False) for c in tokenizer.decode([token], skip_special_tokens=False)]
                begin = end
        return cls([*characters, *((c, True) for c in whole[begin:])])

    @property
    def text(self) -> str:
        return "".join(c for c, _ in self.characters)

    def delivered(self, count: int) -> str:
        """Of the first `count` characters."""
        return "".join(c for c, shown in self.characters[:count] if shown)


def reference(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, str]:
    """Delivery by definition: after every token, but not within characters, all of the text is searched."""
    for n, token in enumerate(tokens, 1):
        within = tokenizer.decode(tokens[:n], skip_special_tokens=True).endswith("\N{REPLACEMENT CHARACTER}")
        if within and n < len(tokens) and tokenizer.decode([token], skip_special_tokens=True):
            continue
        written = Written.of(tokenizer, tokens[:n])
        found = [at for stop in stops if (at := written.text.find(stop)) >= 0]
        if found:
            return written.delivered(min(found)), "stop"
    return written.delivered(len(written.text)), "length"


def test_any_answer_ends_before_the_first_stop_string_in_what_the_target_wrote(answers: Answers) -> None:
    num_special = 0
    for rng, tokens in answers.draw(300):
        written = Written.of(answers.tokenizer, tokens)
        starts = [rng.randrange(len(written.text) + 1) for _ in range(2)]
        spans = [slice(start, start + rng.randrange(1, 9)) for start in starts]
        stops = [stop for span in spans if (stop := written.text[span])]
        num_special += any(not shown for span in spans for _, shown in written.characters[span])
        delivery = Delivery(answers.tokenizer, len(tokens), frozenset(), stops)
        expected = reference(answers.tokenizer, tokens, stops)
        assert in_chunks(rng, delivery, tokens) == expected, (tokens, stops)
    assert num_special > 30, "this is about special tokens, too"
