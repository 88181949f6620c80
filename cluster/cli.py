"""The `taps` command: what `taps.cli` does, and what starts a cluster or asks one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cluster import serving, status
from taps import cli

_HERE = {"serve": serving.main, "status": status.main}


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else [*arguments]
    if given and given[0] in _HERE:
        return _HERE[given[0]](given[1:])
    return cli.main(given)
