"""Rows of data: out of a file of JSON or JSON lines, at will gzipped, or a dataset of the Hugging Face hub.

Knows files, and where in them a row stands; nothing of what a row means.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_GZIP = b"\x1f\x8b"  # how such a file begins, whatever it is called
_BYTE_ORDER_MARK = "\ufeff"
_POOL = 50_000  # rows of a hub dataset that are shuffled together


class InvalidData(ValueError):
    """Data that cannot be read or used; the message says where and what is allowed."""


class Row(NamedTuple):
    value: Any  # JSON
    unit: str  # "line" of a file; "row" of a JSON array or a dataset
    number: int  # from 1
    num_before: int  # rows, blank lines not counted

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"


def file_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON array or of JSON lines; a file that is one JSON object is one row.

    In UTF-8, with a byte order mark or without, gzipped or not. Raises `InvalidData`.
    """
    text = _text(path)
    try:
        document = _parsed(text)
    except ValueError as error:
        yield from _lines(path, text, error)
        return
    if isinstance(document, list):
        yield from (Row(value, "row", index + 1, index) for index, value in enumerate(document))
    else:
        blank = text[: len(text) - len(text.lstrip())]
        yield Row(document, "line", 1 + blank.count("\n"), 0)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not a text file in UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidData(f"{path} is a gzip file that is not whole: {error}") from error


def _parsed(text: str) -> Any:
    """A JSON document. Raises `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deep") from error


def _lines(path: Path, text: str, not_whole: ValueError) -> Iterator[Row]:
    """Args: not_whole: why the text is no JSON document."""
    lines = enumerate(text.split("\n"), 1)
    for index, (number, line) in enumerate((number, line) for number, line in lines if line.strip()):
        try:
            # Others may have been put together to this file, each with its mark.
            yield Row(_parsed(line.removeprefix(_BYTE_ORDER_MARK)), "line", number, index)
        except ValueError as error:
            if text.lstrip().startswith("["):
                raise InvalidData(f"{path} is neither JSON nor JSON lines: {not_whole}") from error
            raise InvalidData(
                f"{path}, line {number}: {error}; expected one row of JSON a line, or a JSON array of rows"
            ) from error


def hub_rows(name: str, split: str, *configuration: str | None, seed: int | None = None) -> Iterator[Row]:
    """Rows of a dataset, streamed: only what is used is downloaded.

    Args: seed: shuffles them, a pool at a time. Raises `InvalidData`.
    """
    try:
        import datasets
    except ImportError as error:
        raise InvalidData(
            f"{name} is not a file; to read datasets from the Hugging Face hub, pip install datasets"
        ) from error
    try:
        stream: Any = datasets.load_dataset(name, *configuration, split=split, streaming=True)
    except Exception as error:  # the hub, the network and the dataset all have errors of their own
        raise InvalidData(f"{name} is neither a file nor a dataset that can be read: {error}") from error
    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=_POOL)
    return (Row(value, "row", index + 1, index) for index, value in enumerate(stream))
