"""Compiles the CPU kernel with the machine's own C++ compiler, once, into the user's cache directory.

A cache may be shared by machines of different processors: each instruction set has a library of its own, named
by a hash of what it is made from. Knows compilers and files; nothing of what the kernel computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from taps.models.embedded import cache_directory

_SOURCE = Path(__file__).parent / "kernel.cpp"
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300
# Bits must not hang on what a compiler chooses: products are fused where the source says so and nowhere else.
_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-exceptions"),
]
# Best first. "amx" is what Intel's servers have since Sapphire Rapids, "avx512bf16" what servers have since
# Cooper Lake and Zen 4, "avx512" since Skylake; "baseline" is what every other machine has.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_LEVELS = {
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": [],
    "neon": [],  # what every 64-bit Arm processor has
}
_LEVEL_VARIABLE = "TAPS_CPU_ISA"


class KernelUnavailable(RuntimeError):
    """The CPU kernel cannot be built or loaded here; the message says why."""


class CompilerRefused(KernelUnavailable):
    """The compiler does not make it, for instance since it is older than the instruction set."""


def machine_levels() -> list[str]:
    """The instruction sets that this processor runs, best first, as far as torch uses them too."""
    import torch  # heavy, and building does not need it

    if platform.machine() in ("aarch64", "arm64"):
        return ["neon"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        best = ["avx512bf16"] if torch.cpu._is_avx512_bf16_supported() else []
        # The system lets a process use tiles once it has asked.
        tiles = ["amx"] if best and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else []
        return [*tiles, *best, "avx512", "avx2", "baseline"]
    return ["avx2", "baseline"] if capability == "AVX2" else ["baseline"]


def chosen_levels() -> list[str]:
    """`$TAPS_CPU_ISA` alone, or what the machine runs, best first.

    Raises `KernelUnavailable` for one that the machine does not run.
    """
    levels = machine_levels()
    level = os.environ.get(_LEVEL_VARIABLE)
    if not level:
        return levels
    if level not in levels:
        raise KernelUnavailable(
            f"{_LEVEL_VARIABLE} is {level}, but this machine runs {', '.join(levels)}; set one, or none"
        )
    return [level]


def load_library(level: str) -> ctypes.CDLL:
    """The kernel for an instruction set, built if it is not in the cache. Raises `KernelUnavailable`.

    Safe to call from many processes: one builds, the others wait. A library in the cache that is damaged, or
    that the system will not load, is built once more.
    """
    compiler = _compiler()
    path = cache_directory() / "kernels" / f"cpu-{level}-{_key(compiler, level)}.so"
    try:
        if not _is_whole(path):
            _build(compiler, level, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            _build(compiler, level, path, anew=True)
            return ctypes.CDLL(str(path))
    except (OSError, Timeout) as error:
        raise KernelUnavailable(f"the CPU kernel in {path.parent} cannot be used: {error}") from error


def _compiler() -> str:
    """Path of the C++ compiler: `$CXX`, or the first usual one that there is."""
    chosen = os.environ.get("CXX")
    names = (chosen,) if chosen else _COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise KernelUnavailable(f"there is no C++ compiler ({', '.join(names)}): install g++, or set CXX to one")


def _key(compiler: str, level: str) -> str:
    """Short hash of all that decides what the library is: source, compiler, flags, architecture."""
    version = _run([compiler, "--version"])
    parts = [platform.machine(), version, *_FLAGS, *_LEVELS[level]]
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update(_SOURCE.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, level: str, path: Path, anew: bool = False) -> None:
    """Put the library at `path`, unless another process has meanwhile. It appears there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=_TIMEOUT_S):
        if not anew and _is_whole(path):
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            made, sealed = Path(work) / "made.so", Path(work) / "sealed.so"
            _run([compiler, *_FLAGS, *_LEVELS[level], str(_SOURCE), "-o", str(made)])
            content = made.read_bytes()
            sealed.write_bytes(content + hashlib.sha256(content).digest())
            sealed.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether the library is there with the digest that `_build` puts after its end, where no loader looks.

    The system checks little of what it maps: a file cut short would end the process, not raise.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run(command: list[str]) -> str:
    """What a command prints. Raises `KernelUnavailable` with its first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{command[0]} cannot build the CPU kernel: {error}") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        said = complaints[0] if complaints else f"exit status {done.returncode}"
        raise CompilerRefused(f"{command[0]} cannot build the CPU kernel: {said}")
    return done.stdout
