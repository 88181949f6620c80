"""The `taps` command: what `taps.cli` does in this process, and what asks a running cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster import status
from taps import cli

_ASKING = {"status": status.main}


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else [*arguments]
    if given and given[0] in _ASKING:
        return _ASKING[given[0]](given[1:])
    return cli.main(given)
