"""The CPU kernel as functions of tensors: their shapes are checked here, their numbers computed in C++.

What a row gets depends on its own sequence alone, bit for bit, at one `numerics`. Results are written into
tensors that the caller gives. Knows tensors and the shared library; nothing of models or how a cache is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from taps.models.cpu_kernel.build import CompilerRefused, chosen_levels, load_library
from taps.models.cpu_kernel.drafting import Grown, PackedDraftHead, TreesAsked
from taps.models.cpu_kernel.layers import PackedLayers, PackedLinear
from taps.models.cpu_kernel.paged import FAULTS, AttentionLayer, AttentionStep
from taps.models.cpu_kernel.team import num_threads
from taps.models.cpu_kernel.tensors import dtype_number, require
from taps.models.memory import HugePages

_VERSION = "cpu-kernel-2"  # changes with the order or the roundings of any sum
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class CpuKernel:
    """The kernel at one instruction set. A call computes with the calling thread's `num_threads()`.

    It releases the interpreter's lock. For tensors that do not fit it raises ValueError and touches nothing.
    """

    def __init__(self, level: str) -> None:
        """Raises `KernelUnavailable`. Args: level: one of `machine_levels()`, which asks the system for what it
        needs: instructions that were not asked for end the process.
        """
        library = load_library(level)
        self.numerics = f"{_VERSION}/{level}"
        self._memory = HugePages()
        self._rms_norm = library.taps_rms_norm
        self._rms_norm.argtypes = [_POINTER] * 4 + [_LONG, _LONG, _FLOAT, _INT, _INT]
        self._rms_norm.restype = None
        self._swiglu = library.taps_swiglu
        self._swiglu.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _INT, _INT]
        self._swiglu.restype = None
        self._attend = library.taps_attend
        self._attend.argtypes = [_POINTER] * 4 + [_INT]
        self._attend.restype = _INT
        self._linear = library.taps_linear
        self._linear.argtypes = [_POINTER] * 3 + [_LONG, _INT]
        self._linear.restype = None
        self._layers = library.taps_layers
        self._layers.argtypes = [_POINTER, _POINTER, _INT, _POINTER, _INT]
        self._layers.restype = _INT
        self._decide = library.taps_decide
        self._decide.argtypes = [_POINTER, _LONG, _LONG, *[_POINTER] * 5, _INT, _INT]
        self._decide.restype = None
        self._find_best = library.taps_find_best
        self._find_best.argtypes = [*[_POINTER] * 3, _LONG, _LONG, _INT, *[_POINTER] * 3, _INT, _INT]
        self._find_best.restype = None
        self._grow = library.taps_grow
        self._grow.argtypes = [_POINTER] * 9 + [_INT]
        self._grow.restype = _INT
        for asked in (library.taps_linear_columns, library.taps_linear_inputs):
            asked.restype = _LONG
        self._block: tuple[int, int] = library.taps_linear_columns(), library.taps_linear_inputs()

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
        threads = num_threads()
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
        threads = num_threads()
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width, number, threads)

    def packs(self, weight: Tensor) -> bool:
        """Whether it has linear layers of such a weight [out, in], and with them whole decoder layers."""
        return weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """A weight [out, in] that it `packs`, and its bias [out], as `linear` reads them."""
        return PackedLinear(weight, bias, *self._block, self._memory)

    def linear(self, x: Tensor, layer: PackedLinear, out: Tensor) -> None:
        """out = x W^T + b, each output summed in order of the inputs. Args: x: [R, in]. out: [R, out]."""
        rows = len(x)
        require("x", x, torch.bfloat16, (rows, layer.inputs))
        require("out", out, torch.bfloat16, (rows, layer.outputs))
        self._linear(layer.address, x.data_ptr(), out.data_ptr(), rows, num_threads())

    def layers(self, layers: PackedLayers, step: AttentionStep, x: Tensor) -> None:
        """All of the layers, x [R, H] in place: what the operations give one by one."""
        require("x", x, torch.bfloat16, (step.rows, layers.hidden))
        threads = num_threads()
        fault = self._layers(step.address, layers.address, layers.count, x.data_ptr(), threads)
        if fault:
            raise ValueError(FAULTS[fault])

    def decide(
        self, logits: Tensor, temperatures: Sequence[float], keys: Sequence[Sequence[int]]
    ) -> list[tuple[int, float]]:
        """Each row's token and its best logit over the temperature: implements `taps.sampling.Race`."""
        rows, width = _rows("logits", logits)
        number = dtype_number("logits", logits)
        require("logits", logits, logits.dtype, (rows, width))
        if not len(temperatures) == len(keys[0]) == len(keys[1]) == rows:
            raise ValueError(f"there are {rows} rows; each has one temperature and two keys")
        tokens, best = (_INT * rows)(), (_FLOAT * rows)()
        given = (_FLOAT * rows)(*temperatures), (_INT * (2 * rows))(*keys[0], *keys[1]), _variates().data_ptr()
        self._decide(logits.data_ptr(), rows, width, *given, tokens, best, number, num_threads())
        return list(zip(tokens, best, strict=True))

    def find_best(
        self, logits: Tensor, k: int, noise: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [R, k] int32 and log-probabilities [R, k] of each row's best, and the entropies [R] of all, nats.

        Of equals the first are the best.

        Args: logits: [R, V], V at least k. noise: that rows are tilted by: keys [3, R] int32, those of
        `taps.sampling.noise_keys` and 1 for rows that are; the tokens [V] int32 that the logits are of.
        """
        rows, width = _rows("logits", logits)
        number = dtype_number("logits", logits)
        require("logits", logits, logits.dtype, (rows, width))
        if not 0 < k <= width:
            raise ValueError(f"the best {k} of {width} are wanted; 1 to {width} can be had")
        ids, logprobs = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k)
        entropies = torch.empty(rows)
        tilts: list[int | None] = [None, None]
        if noise is not None:
            require("keys", noise[0], torch.int32, (3, rows))
            require("tokens", noise[1], torch.int32, (width,))
            tilts = [tensor.data_ptr() for tensor in noise]
        out = (tensor.data_ptr() for tensor in (ids, logprobs, entropies))
        self._find_best(logits.data_ptr(), *tilts, rows, width, k, *out, number, num_threads())
        return ids, logprobs, entropies

    def grow(self, head: PackedDraftHead, asked: TreesAsked, roots: Tensor, cos: Tensor, sin: Tensor) -> Grown:
        """Trees grown level by level, as `taps.drafting.growth` says; the sessions' regions are overwritten.

        Args: roots [T, H] bfloat16: predicted features at the roots; cos, sin [n, rotary / 2] float32 of as
        many positions as the trees `reach`.
        """
        require("roots", roots, torch.bfloat16, (len(asked.tokens), head.hidden))
        if len(cos) < asked.reach:
            raise ValueError(f"there are angles of {len(cos)} positions; the trees reach {asked.reach}")
        one, all_of_them = head.struct(cos, sin), asked.struct()
        grown = Grown(all_of_them.trees, all_of_them.most_nodes)
        given = ctypes.addressof(one), ctypes.addressof(all_of_them), roots.data_ptr(), asked.tokens.data_ptr()
        fault = self._grow(*given, *grown.addresses, num_threads())
        if fault:
            raise ValueError(FAULTS[fault])
        return grown

    def attend(self, layer: AttentionLayer, step: AttentionStep, qkv: Tensor, out: Tensor) -> None:
        """Rope, cache write and attention of one layer: a row sees the committed prefix and its own path.

        Args: qkv: [R, (heads + 2 * kv_heads) * d]: queries, keys, values. out: [R, heads * d].
        """
        require("qkv", qkv, layer.dtype, (step.rows, layer.qkv_width))
        require("out", out, layer.dtype, (step.rows, layer.out_width))
        threads = num_threads()
        fault = self._attend(step.address, layer.address, qkv.data_ptr(), out.data_ptr(), threads)
        if fault:
            raise ValueError(FAULTS[fault])


@functools.cache
def cpu_kernel() -> CpuKernel:
    """The kernel at `$TAPS_CPU_ISA`, or at the machine's best instruction set that the compiler knows.

    Raises `KernelUnavailable`.
    """
    *better, last = chosen_levels()
    for level in better:
        with contextlib.suppress(CompilerRefused):
            return CpuKernel(level)
    return CpuKernel(last)


@functools.cache
def _variates() -> Tensor:
    """[65536] lower bounds, in bits, of the exponential variates with these upper halves of a hash."""
    return (torch.arange(1 << 16).float() + 1).mul_(2.0**-16).log2_().neg_()


def _rows(name: str, tensor: Tensor) -> tuple[int, int]:
    shape = tensor.shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"{name} is {list(shape)}; it must be rows of at least one element each")
    return shape[0], shape[1]
