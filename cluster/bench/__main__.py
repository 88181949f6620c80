"""`python -m cluster.bench`: measure, or report on what was measured. Knows arguments and standard output."""

from __future__ import annotations

import sys

from cluster.bench import cli

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
