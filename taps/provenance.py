"""Where a result comes from: code, versions, machine and heads; and how it is written, whole or not at all.

Knows git, files and heads' cards; nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from taps import __version__
from taps.models.checkpoints import weights_digest

_GIT_TIMEOUT_S = 10


def commit() -> str | None:
    """The commit of the code that runs, if it runs in a checkout. Ask before measuring: others may commit."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def made_with() -> dict[str, Any]:
    """Versions and machine, for a result. Ask before measuring, as for `commit`."""
    return {
        "taps": __version__, "torch": torch.__version__, "commit": commit(), "cores": os.cpu_count(),
        "machine": platform.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }  # fmt: skip


def refuse_unwritable(path: Path) -> None:
    """Raise `OSError` where no result can be written to `path`, before anything is measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written; name another file for the result")


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)


def heads_made(heads: Sequence[Path]) -> dict[str, Any]:
    """How heads came to be, by name, as their configs say."""
    made = {}
    for head in heads:
        settings = json.loads((head / "config.json").read_text()) if (head / "config.json").is_file() else {}
        made[head.name] = settings.get("taps", {"path": str(head)})
        made[head.name]["weights_sha256"] = weights_digest(head)
    return made


def unlike_names(heads: Sequence[Path]) -> list[str]:
    """What results call heads: the names of their directories. Raises `ValueError` where two have the same."""
    names = [head.name for head in heads]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"two heads are called {twice[0]}: results could not tell them apart; rename a directory"
        )
    return names
