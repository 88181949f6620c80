"""Prompts from files and hubs: which conversations the target is asked to answer.

Reads `messages` rows, ShareGPT rows ("conversations") and MathInstruct-style rows ("instruction", "output"),
as JSON or JSONL files or from a Hugging Face dataset. Reference answers are dropped: a drafter learns from
the target's own. Knows formats; nothing of tokens or models.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}]}, {"conversations": [{"from": "human", '
    '"value": "..."}]} or {"instruction": "..."}'
)
_ASSISTANTS = ("assistant", "gpt", "chatgpt", "bing", "bard")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    _ASSISTANTS, "assistant"
)
_POOL = 50_000  # rows of a hub dataset that are shuffled together
# Between a prompt's id and the number of a further answer to it.
ANSWER_MARK = "#"


class InvalidData(ValueError):
    """Training prompts that cannot be read; the message says which row and what is allowed."""


@dataclass(frozen=True)
class Prompt:
    id: str  # unlike any other's of what was loaded with it
    messages: tuple[dict[str, str], ...]  # up to and including the last user message


def load_prompts(sources: str | Path, seed: int = 0) -> list[Prompt]:
    """Prompts of one source or a mixture, shuffled by `seed`.

    Args: sources: a file or the id of a Hugging Face dataset, at will with a count, `math.jsonl:35000`;
    several of them joined by `+`. Conversations in which no user says anything are left out, and counted on
    standard output. Raises `InvalidData`.
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
    if not path.is_file():
        rows = ((row, f"row {number}") for number, row in enumerate(_hub_rows(name, seed), 1))
        return list(itertools.islice(_prompts(rows, name, name), count))
    # Ids name the file without its folder: answers stay known when it is called by another path.
    prompts = _told_apart(_prompts(_file_rows(path), name, path.name))
    if not prompts:
        raise InvalidData(f"{name} holds no prompts")
    if count is not None:
        random.Random(seed).shuffle(prompts)
    return prompts[:count]


def _prompts(rows: Iterable[tuple[Any, str]], source: str, called: str) -> Iterator[Prompt]:
    """The prompts of rows that ask something. Args: called: the source's name in ids."""
    left_out = 0
    try:
        for row, at in rows:
            prompt = _parse(row, f"{source}, {at}", f"{called}, {at}")
            if prompt is None:
                left_out += 1
            else:
                yield prompt
    finally:
        if left_out:
            print(f"{source}: {left_out:,} rows in which no user says anything were left out", flush=True)


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a JSON array or of JSON lines, each with where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not a text file in UTF-8: {error}") from error
    if text.lstrip().startswith("["):
        try:
            rows: Iterable[Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidData(f"{path} is neither JSON nor JSON lines: {error}") from error
        yield from ((row, f"row {number}") for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"line {number}"
            except json.JSONDecodeError as error:
                raise InvalidData(f"{path}, line {number}: {error}; {_EXPECTED}") from error


def _hub_rows(name: str, seed: int) -> Iterable[Any]:
    """Rows of a dataset's train split, streamed: only what is used is downloaded."""
    try:
        import datasets
    except ImportError as error:
        raise InvalidData(
            f"{name} is not a file; to read datasets from the Hugging Face hub, pip install datasets"
        ) from error
    try:
        stream: Any = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub, the network and the dataset all have errors of their own
        raise InvalidData(f"{name} is neither a file nor a dataset that can be read: {error}") from error
    rows: Iterable[Any] = stream.shuffle(seed=seed, buffer_size=_POOL)
    return rows


def _parse(row: Any, where: str, place: str) -> Prompt | None:
    """One prompt, up to the last thing a user says; None where none does.

    Args: where: for errors; place: its id when it has none of its own.
    """
    try:
        messages = _messages(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidData(f"{where}: {error!r}; {_EXPECTED}") from error
    if not all(isinstance(v, str) for m in messages for v in m.values()):
        raise InvalidData(f"{where}: a role or content is not text; {_EXPECTED}")
    # A conversation cut out of a longer one may begin with the answer to something that is not there.
    said = list(itertools.dropwhile(lambda m: m["role"] == "assistant", messages))
    users = [i for i, m in enumerate(said) if m["role"] == "user" and m["content"].strip()]
    own = row.get("id")
    return Prompt(place if own is None else str(own), tuple(said[: users[-1] + 1])) if users else None


def _messages(row: Any) -> list[dict[str, str]]:
    if "messages" in row:
        return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    if "conversations" in row:
        return [{"role": _SHAREGPT_ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]]
    extra = row.get("input") or ""
    return [{"role": "user", "content": row["instruction"] + ("\n\n" + extra if extra else "")}]
