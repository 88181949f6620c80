"""What commands take as numbers. Knows text; nothing of commands."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number of at least one."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
