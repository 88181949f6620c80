"""Files of rows: every way one is written reads the same, and what is broken is said in one sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from taps.recording.rows import InvalidData, file_rows

ROWS = [{"question": "Café?"}, {"question": "\u2028 and 😀"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def read(path: Path, data: bytes) -> list[Any]:
    path.write_bytes(data)
    return [row.value for row in file_rows(path)]


@pytest.mark.parametrize(
    "text",
    [
        LINES, LINES + "\n", "\n \n" + LINES.replace("\n", "\n\n"), LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"), LINES.replace("\n", "\n\ufeff"), json.dumps(ROWS),
        json.dumps(ROWS, indent=2), "\n" + json.dumps(ROWS).replace(", ", ",\n"),
    ],
    ids=["lines", "ended", "blank lines", "CRLF", "CR", "joined files", "array", "indented", "array in lines"],
)  # fmt: skip
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.gz", "rows"])
def test_a_file_reads_the_same_however_it_is_written(text: str, mark: str, name: str, tmp_path: Path) -> None:
    data = (mark + text).encode()
    assert read(tmp_path / name, data) == ROWS
    assert read(tmp_path / name, gzip.compress(data)) == ROWS, "by what is in it, not by its name"


def test_rows_are_known_by_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n1\n\n2\n")
    assert [(row.place, row.num_before) for row in file_rows(path)] == [("line 3", 0), ("line 5", 1)]
    path.write_text("\n\n[1,\n2]")
    assert [(row.place, row.num_before) for row in file_rows(path)] == [("row 1", 0), ("row 2", 1)]
    path.write_text("\n{\n}")
    assert [(row.place, row.num_before) for row in file_rows(path)] == [("line 2", 0)]


def test_lines_that_are_arrays_are_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "rows.jsonl", b"[1]\n[2]") == [[1], [2]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"question": "café"}'.encode("latin-1"), "is not a text file in UTF-8"),
        (LINES.encode("utf-16"), "is not a text file in UTF-8"),
        (gzip.compress(LINES.encode(), mtime=0)[:-9], "is a gzip file that is not whole"),
        (b"\x1f\x8bnothing", "is a gzip file that is not whole"),
        (gzip.compress(LINES.encode("utf-16"), mtime=0), "is not a text file in UTF-8"),
        (b'[{"messages": ', "is neither JSON nor JSON lines: .*line 1 column 15"),
        (b'[\n{"a": 1},\n{"a": ]', "is neither JSON nor JSON lines: .*line 3"),
        (b'{"a": 1}\n\n{"a": ', r"rows\.gz, line 3: "),
        (b'{"a": 1}{"a": 2}', r"rows\.gz, line 1: "),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": 1}\n' + b'{"a":' * 100_000, r"rows\.gz, line 2: .*nested too deep"),
        (b'{"id": ' + b"9" * 5000 + b"}", r"rows\.gz, line 1: .*digits"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_its_line(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=message):
        read(tmp_path / "rows.gz", data)
