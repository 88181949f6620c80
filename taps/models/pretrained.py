"""A target's model, tokenizer and config as transformers loads them, or one sentence that says why it cannot.

Knows transformers' loaders and what they raise; nothing of how a target is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from taps.models.checkpoint_files import in_a_line

# What broken files and configs make the loaders raise.
_BROKEN = (
    OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ImportError, RuntimeError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


class UnservableTarget(ValueError):
    """The model cannot be a target; the message says why."""


@contextmanager
def _refusing(path: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise UnservableTarget(f"cannot load {what} of the target {str(path)!r}: {in_a_line(error)}") from error


def load_model(path: str | Path, dtype: torch.dtype, device_map: str | None = None) -> Any:
    """The causal LM of a local directory or a Hugging Face id. Raises `UnservableTarget`."""
    with _refusing(path, "the causal LM"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map)


def load_tokenizer(path: str | Path) -> Any:
    """Raises `UnservableTarget`."""
    with _refusing(path, "the tokenizer"):
        return AutoTokenizer.from_pretrained(path)


def load_config(path: str | Path) -> Any:
    """Raises `UnservableTarget`."""
    with _refusing(path, "the config.json"):
        return AutoConfig.from_pretrained(path)
