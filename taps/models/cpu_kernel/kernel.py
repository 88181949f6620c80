"""The CPU kernel as functions of tensors: their shapes are checked here, their numbers computed in C++.

What a row gets depends on its own sequence alone, bit for bit, at one `numerics`. Results are written into
tensors that the caller gives. Knows tensors and the shared library; nothing of models or how a cache is kept.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from taps.models.cpu_kernel.build import chosen_level, load_library
from taps.models.cpu_kernel.paged import FAULTS, AttentionLayer, AttentionStep
from taps.models.cpu_kernel.tensors import dtype_number, require

_VERSION = "cpu-kernel-1"  # changes with the order or the roundings of any sum
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_log = logging.getLogger(__name__)


class CpuKernel:
    """The kernel at one instruction set. A call computes with the calling thread's `torch.get_num_threads()`.

    It releases the interpreter's lock. For tensors that do not fit it raises ValueError and touches nothing.
    """

    def __init__(self, level: str) -> None:
        """Raises `KernelUnavailable`. Args: level: one of `machine_levels()`."""
        library = load_library(level)
        self.numerics = f"{_VERSION}/{level}"
        self._rms_norm = library.taps_rms_norm
        self._rms_norm.argtypes = [_POINTER] * 4 + [_LONG, _LONG, _FLOAT, _INT, _INT]
        self._rms_norm.restype = None
        self._swiglu = library.taps_swiglu
        self._swiglu.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _INT, _INT]
        self._swiglu.restype = None
        self._attend = library.taps_attend
        self._attend.argtypes = [_POINTER] * 4 + [_INT]
        self._attend.restype = _INT
        library.taps_use_threads.argtypes = [_POINTER]
        library.taps_use_threads.restype = None
        library.taps_use_threads(_parallel_region())

    def rms_norm(
        self, x: Tensor, weight: Tensor, out: Tensor, eps: float, residual: Tensor | None = None
    ) -> None:
        """out = RMSNorm(x) * weight, in the roundings of transformers' Llama. A residual is added to x first.

        Args: x, out, residual: [R, H]. weight: [H]. All of one dtype.
        """
        rows, width = _rows("x", x)
        dtype, shape, number = x.dtype, (rows, width), dtype_number("x", x)
        require("x", x, dtype, shape)
        require("out", out, dtype, shape)
        require("weight", weight, dtype, (width,))
        added = None
        if residual is not None:
            require("residual", residual, dtype, shape)
            added = residual.data_ptr()
        threads = torch.get_num_threads()
        pointers = (x.data_ptr(), added, weight.data_ptr(), out.data_ptr())
        self._rms_norm(*pointers, rows, width, eps, number, threads)

    def swiglu(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up, with silu(gate) rounded to the dtype first as torch's is.

        Args: gate_up: [R, 2 * I], gate first. out: [R, I].
        """
        rows, width = _rows("out", out)
        number = dtype_number("out", out)
        require("out", out, out.dtype, (rows, width))
        require("gate_up", gate_up, out.dtype, (rows, 2 * width))
        threads = torch.get_num_threads()
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width, number, threads)

    def attend(self, layer: AttentionLayer, step: AttentionStep, qkv: Tensor, out: Tensor) -> None:
        """Rope, cache write and attention of one layer: a row sees the committed prefix and its own path.

        Args: qkv: [R, (heads + 2 * kv_heads) * d]: queries, keys, values. out: [R, heads * d].
        """
        require("qkv", qkv, layer.dtype, (step.rows, layer.qkv_width))
        require("out", out, layer.dtype, (step.rows, layer.out_width))
        threads = torch.get_num_threads()
        fault = self._attend(step.address, layer.address, qkv.data_ptr(), out.data_ptr(), threads)
        if fault:
            raise ValueError(FAULTS[fault])


@functools.cache
def cpu_kernel() -> CpuKernel:
    """The kernel at `$TAPS_CPU_ISA` or the machine's best instruction set. Raises `KernelUnavailable`."""
    return CpuKernel(chosen_level())


def _rows(name: str, tensor: Tensor) -> tuple[int, int]:
    shape = tensor.shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{name} is {list(shape)}; it must be rows of at least one element each")
    return shape[0], shape[1]


def _parallel_region() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself is linked to, by whatever name."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, _POINTER).value
    except (OSError, AttributeError) as error:
        _log.warning("the CPU kernel computes with one thread: torch's OpenMP runtime is not found: %s", error)
        return None
