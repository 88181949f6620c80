"""Prompts from files and hubs: which conversations the target is asked to answer.

Reference answers are dropped: a drafter learns from the target's own. Knows sources and how they are mixed;
nothing of tokens or models.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from taps.recording.conversations import EXPECTED, Conversation, Unusable, refuse_half_characters, used_rows
from taps.recording.rows import InvalidData as InvalidData
from taps.recording.rows import Row, file_rows, hub_rows

_PATIENCE = 1_000  # rows of a hub dataset none of which can be used
# Between a prompt's id and the number of a further answer to it.
ANSWER_MARK = "#"


@dataclass(frozen=True)
class Prompt:
    id: str  # unlike any other's of what was loaded with it
    messages: tuple[dict[str, str], ...]  # up to and including the last user message


def load_prompts(sources: str | Path, seed: int = 0) -> list[Prompt]:
    """Prompts of one source or a mixture, shuffled by `seed`.

    Args: sources: a file or the id of a Hugging Face dataset, at will with a count, `math.jsonl:35000`;
    several of them joined by `+`. Rows that cannot be used are left out, and counted on standard output.
    Raises `InvalidData`.
    """
    alone = Path(_split_count(str(sources))[0]).is_file()  # a `+` may be part of its name
    parts = [str(sources)] if alone else [part.strip() for part in str(sources).split("+")]
    prompts: list[Prompt] = []
    for part in parts:
        name, count = _split_count(part)
        found = _load_source(name, count, seed)
        if count is not None and len(found) < count:
            raise InvalidData(f"{name} holds {len(found)} prompts, {count} were asked for")
        prompts += [Prompt(f"{Path(name).stem}/{p.id}", p.messages) for p in found] if len(parts) > 1 else found
    prompts = _told_apart(prompts)
    random.Random(seed).shuffle(prompts)
    return prompts


def _told_apart(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts; ids that came before, or that end like a further answer's, are marked."""
    seen: dict[str, int] = {}
    found = []
    for prompt in prompts:
        name = f"{prompt.id}~" if re.search(rf"{ANSWER_MARK}\d+$", prompt.id) else prompt.id
        while seen.setdefault(name, 0):
            seen[name] += 1
            name = f"{name}~{seen[name]}"
        seen[name] += 1
        found.append(Prompt(name, prompt.messages))
    return found


def _split_count(part: str) -> tuple[str, int | None]:
    name, colon, count = part.rpartition(":")
    return (name, int(count)) if colon and count.isdecimal() else (part, None)


def _load_source(name: str, count: int | None, seed: int) -> list[Prompt]:
    path = Path(name)
    if path.is_file():
        # Ids name the file without its folder: answers stay known when it is called by another path.
        prompts = _told_apart(_prompts(file_rows(path), name, path.name))
        if count is not None:
            random.Random(seed).shuffle(prompts)
    else:
        rows = hub_rows(name, "train", seed=seed)
        prompts = list(itertools.islice(_prompts(rows, name, name, _PATIENCE), count))
    if not prompts:
        raise InvalidData(f"{name} holds no prompts; {EXPECTED}")
    return prompts[:count]


def _prompts(rows: Iterable[Row], source: str, called: str, patience: int | None = None) -> Iterator[Prompt]:
    """The prompts of rows that can be used. Args: called: the source's name in ids."""

    def prompt(row: Row, asked: Conversation) -> Prompt:
        if asked.is_open:
            raise Unusable("several turns whose answers are not in the row")
        own = row.value.get("id")
        name = f"{called}, {row.place}" if own is None else str(own)
        refuse_half_characters(name, *(message["content"] for message in asked.messages))
        return Prompt(name, asked.messages)

    return used_rows(rows, source, prompt, patience)
