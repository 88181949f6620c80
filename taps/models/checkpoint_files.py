"""The files of a checkpoint: found, read with clear refusals, written whole or not at all.

Knows directories, JSON and tensors by name; nothing of what a head is made of.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_MESSAGE_LENGTH = 200


class InvalidCheckpoint(ValueError):
    """A head or target that cannot be read or does not fit; the message says what to do."""


def in_a_line(error: Exception) -> str:
    """What an error of another library says, or else its name: without line breaks, and not at length."""
    return textwrap.shorten(str(error), _MESSAGE_LENGTH) or type(error).__name__


def resolve(path_or_id: str | Path, patterns: list[str] | None = None) -> Path:
    """A local directory as it is; anything else as a Hugging Face id, downloaded to its cache."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidCheckpoint(
            f"{str(path_or_id)!r} is neither a directory nor a model that can be downloaded: {in_a_line(error)}"
        ) from error


def read_settings(directory: Path) -> dict[str, Any]:
    """The config.json of a head. Raises `InvalidCheckpoint` where it is not an object of settings."""
    path = directory / "config.json"
    if not path.is_file():
        raise InvalidCheckpoint(f"{directory} has no config.json: it is not a head in the EAGLE layout")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not JSON in UTF-8: {in_a_line(error)}") from error
    if not isinstance(settings, dict):
        raise InvalidCheckpoint(f"{path} holds no settings: it is JSON, but not an object")
    return settings


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. Raises `InvalidCheckpoint` where the weight file holds anything else."""
    path = _weight_file(directory)
    if path is None:
        raise InvalidCheckpoint(f"{directory} has neither {' nor '.join(_WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # what it warns of is refused, or read all the same
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        said = (
            "it holds something else than tensors" if isinstance(error, UnpicklingError) else in_a_line(error)
        )
        raise InvalidCheckpoint(f"{path} cannot be read, perhaps it is not whole: {said}") from error
    if not isinstance(weights, dict):
        raise InvalidCheckpoint(f"{path} holds a {type(weights).__name__}, not tensors by their names")
    for name, tensor in weights.items():
        if not (isinstance(name, str) and _is_plain(tensor)):
            raise InvalidCheckpoint(f"{path} holds {name!r}, which is not the name of a plain tensor")
    return {name: tensor.detach() for name, tensor in weights.items()}


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def _weight_file(directory: Path) -> Path | None:
    return next((path for name in _WEIGHT_FILES if (path := directory / name).is_file()), None)


def weights_digest(path_or_id: str | Path) -> str | None:
    """SHA-256 of a head's weight file, which tells heads of one name apart; None where there is none."""
    path = _weight_file(resolve(path_or_id))
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def write_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write the file under another name and move it into place."""
    partial = path.with_suffix(".partial")
    save(partial)
    partial.rename(path)
