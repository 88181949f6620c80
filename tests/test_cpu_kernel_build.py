"""The CPU kernel is built once, whoever asks; what cannot be used says why; its threads are torch's own."""

from __future__ import annotations

import ctypes
import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from taps.engine.threads import computing_with
from taps.models.cpu_kernel import build, kernel
from taps.models.cpu_kernel.build import KernelUnavailable, chosen_levels, load_library, machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel, cpu_kernel
from tests.conftest import PROJECT

# Compiles in a fraction of the time, and notes each time that it does.
_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "a compiler for tests" ;; *) echo "$*" >> "{log}"; exec g++ "$@" -O0 ;; esac
"""
_LOAD = "from taps.models.cpu_kernel.build import load_library; load_library('baseline'); print('loaded')"


class Cache:
    """A cache directory of its own, and how often its compiler was called."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "log"
        self.compiler = directory / "compiler"
        self.compiler.write_text(_COMPILER.format(log=self._log))
        self.compiler.chmod(0o755)
        self.kernels = directory / "kernels"

    @property
    def builds(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    @property
    def libraries(self) -> list[Path]:
        return sorted(self.kernels.glob("*.so"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    cache = Cache(tmp_path)
    monkeypatch.setenv("TAPS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(cache.compiler))
    cpu_kernel.cache_clear()
    yield cache
    cpu_kernel.cache_clear()


def _runs(library: ctypes.CDLL) -> bool:
    """Whether it computes: SwiGLU of no rows, after which nothing has happened."""
    library.taps_swiglu.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int32] * 2
    library.taps_swiglu(None, None, 0, 1, 0, 1)
    return True


def test_five_processes_at_once_build_one_library(cache: Cache) -> None:
    command = [sys.executable, "-c", _LOAD]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == ["loaded"] * 5
    assert cache.builds == 1
    assert len(cache.libraries) == 1
    assert [path.suffix for path in cache.kernels.iterdir() if path not in cache.libraries] == [".lock"]


def test_a_library_in_the_cache_is_used_as_it_is(cache: Cache) -> None:
    assert _runs(load_library("baseline"))
    assert _runs(load_library("baseline"))
    assert cache.builds == 1


@pytest.mark.parametrize("damage", ["empty", "cut short", "one byte", "not a library"])
def test_a_damaged_library_is_built_once_more(cache: Cache, damage: str) -> None:
    """In a process that has not mapped it: an open library does not change."""
    subprocess.run([sys.executable, "-c", _LOAD], check=True)
    (path,) = cache.libraries
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "one byte": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "not a library": b"a file of another kind",
    }[damage]
    path.unlink()
    path.write_bytes(damaged)
    assert _runs(load_library("baseline"))
    assert cache.builds == 2


def test_a_whole_file_that_does_not_load_is_built_once_more_and_then_given_up(cache: Cache) -> None:
    """A machine that shares the cache may have an older system library than the one that built."""
    cache.compiler.write_text(cache.compiler.read_text().replace("exec g++", "exec g++ -c"))
    with pytest.raises(KernelUnavailable, match=r"cannot be used: .*\.so"):
        load_library("baseline")
    assert cache.builds == 2


def test_sources_compiler_and_flags_name_the_library(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build._key(str(cache.compiler), "baseline")}
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-g"])
    names.add(build._key(str(cache.compiler), "baseline"))
    cache.compiler.write_text(cache.compiler.read_text().replace("for tests", "of another version"))
    names.add(build._key(str(cache.compiler), "baseline"))
    other = cache.kernels.parent / "kernel.cpp"
    other.write_text("int x;")
    monkeypatch.setattr(build, "_SOURCE", other)
    names.add(build._key(str(cache.compiler), "baseline"))
    assert len(names) == 4


def test_without_a_compiler_the_reason_is_said(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        KernelUnavailable, match=r"there is no C\+\+ compiler \(no-such-compiler\): install g\+\+"
    ):
        cpu_kernel()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(cache.kernels))
    with pytest.raises(KernelUnavailable, match=r"there is no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\)"):
        cpu_kernel()


def test_a_compiler_that_fails_is_quoted(cache: Cache) -> None:
    cache.compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: no such luck' >&2\nexit 1\n")
    with pytest.raises(
        KernelUnavailable, match=r"cannot build the CPU kernel: kernel.cpp:1: error: no such luck"
    ):
        cpu_kernel()
    cache.compiler.write_text("no program")
    with pytest.raises(KernelUnavailable, match=r"cannot build the CPU kernel: .*Exec format error"):
        cpu_kernel()


def test_a_cache_that_cannot_be_written_is_said(cache: Cache) -> None:
    cache.kernels.write_text("a file where a directory should be")
    with pytest.raises(KernelUnavailable, match="cannot be used"):
        cpu_kernel()


def test_the_instruction_set_can_be_chosen_among_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAPS_CPU_ISA", raising=False)
    assert chosen_levels() == machine_levels()
    for level in machine_levels():
        monkeypatch.setenv("TAPS_CPU_ISA", level)
        assert chosen_levels() == [level]
        assert CpuKernel(level).numerics == f"cpu-kernel-2/{level}"
    monkeypatch.setenv("TAPS_CPU_ISA", "mmx")
    with pytest.raises(
        KernelUnavailable, match=f"TAPS_CPU_ISA is mmx, but this machine runs .*{machine_levels()[-1]}"
    ):
        chosen_levels()


def test_a_lesser_processor_is_given_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, capability, bfloat16, tiles, allowed, levels in (
        ("x86_64", "AVX512", True, True, True, ["amx", "avx512bf16", "avx512", "avx2", "baseline"]),
        ("x86_64", "AVX512", True, True, False, ["avx512bf16", "avx512", "avx2", "baseline"]),
        ("x86_64", "AVX512", True, False, False, ["avx512bf16", "avx512", "avx2", "baseline"]),
        ("x86_64", "AVX512", False, False, False, ["avx512", "avx2", "baseline"]),
        ("x86_64", "AVX2", False, True, True, ["avx2", "baseline"]),
        ("x86_64", "DEFAULT", False, False, False, ["baseline"]),
        ("aarch64", "SVE256", False, False, False, ["neon"]),
    ):
        for name, said in (
            ("_is_avx512_bf16_supported", bfloat16), ("_is_amx_tile_supported", tiles), ("_init_amx", allowed)
        ):  # fmt: skip
            monkeypatch.setattr(torch.cpu, name, lambda said=said: said)
        monkeypatch.setattr(platform, "machine", lambda said=machine: said)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=capability: said)
        assert machine_levels() == levels


def test_a_compiler_that_is_older_than_the_processor_makes_what_it_knows(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.compiler.write_text(
        cache.compiler.read_text().replace(
            "exec g++",
            'case "$*" in *-mavx512f*) echo "error: unrecognized option" >&2; exit 1;; esac\nexec g++',
        )
    )
    monkeypatch.setattr(kernel, "chosen_levels", lambda: ["avx512bf16", "avx512", "baseline"])
    assert cpu_kernel().numerics == "cpu-kernel-2/baseline"


def test_the_sources_are_part_of_the_package() -> None:
    setup = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["taps.models.cpu_kernel"]
    assert any(fnmatch(build._SOURCE.name, pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "level",
    [
        level if i == 0 else pytest.param(level, marks=pytest.mark.slow)
        for i, level in enumerate(machine_levels())
    ],
)
def test_the_compiler_warns_of_nothing(level: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-Wall", "-Wextra", "-Werror"])
    assert _runs(load_library(level))


_THREADS = """
import json, os, sys, torch
from taps.models.cpu_kernel.kernel import cpu_kernel

def runtimes():
    paths = {line.split()[-1] for line in open("/proc/self/maps")}
    return sorted(path for path in paths if "omp" in path.rsplit("/", 1)[-1])

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
gate_up, out = torch.ones(512, 2048), torch.empty(512, 1024)
kernel, found, counts = cpu_kernel(), [runtimes()], [threads()]
for _ in range(2):
    kernel.swiglu(gate_up, out)
    counts.append(threads())
found.append(runtimes())
print(json.dumps([found, counts]))
"""


def test_it_brings_a_team_of_threads_and_no_second_openmp() -> None:
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True)
    found, (before, first, second) = json.loads(done.stdout)
    assert found[0] == found[1]
    assert len(found[0]) == 1
    assert first == second == before + 2


_FORK = """
import os, torch
from taps.models.cpu_kernel.kernel import cpu_kernel

torch.set_num_threads(3)
gate_up, out, again = torch.randn(512, 2048), torch.empty(512, 1024), torch.empty(512, 1024)
cpu_kernel().swiglu(gate_up, out)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
cpu_kernel().swiglu(gate_up, again)
os._exit(0 if torch.equal(out, again) else 1)
"""


def test_a_team_whose_others_never_come_is_not_waited_for() -> None:
    """Threads that the system has set aside hold nothing up: here they are not even there, after a fork."""
    subprocess.run([sys.executable, "-c", _FORK], capture_output=True, check=True, timeout=60)


def test_callers_at_once_get_what_each_gets_alone() -> None:
    kernel = CpuKernel(machine_levels()[0])
    inputs = [torch.randn(256, 2048, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        out = torch.empty(256, 1024)
        with computing_with(2):
            for _ in range(20):
                kernel.swiglu(gate_up, out)
        return out

    alone = [gated(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gated, inputs))
    assert all(map(torch.equal, alone, together))
