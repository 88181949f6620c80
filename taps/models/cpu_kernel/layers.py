"""Linear layers and whole decoder layers as the kernel reads them: weights packed, shapes checked once.

Knows tensors and their layout; nothing of models or of who computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.models.cpu_kernel.paged import AttentionLayer
from taps.models.cpu_kernel.tensors import require
from taps.models.memory import HugePages


class Linear(ctypes.Structure):
    """`Linear` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _DecoderLayer(ctypes.Structure):
    """`DecoderLayer` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention", "input_norm", "mlp_norm")),
        *((name, ctypes.c_float) for name in ("input_eps", "mlp_eps")),
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
    )


class PackedLinear:
    """A linear layer: blocks of outputs, in them pairs of inputs side by side."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, columns: int, together: int, memory: HugePages
    ) -> None:
        """Args: weight [out, in] bfloat16, in even; bias [out]; columns: outputs of a block; together: inputs
        are filled up with zeros to a multiple of it, which is even.
        """
        self.outputs, self.inputs = weight.shape
        missing = -self.outputs % columns
        filled = F.pad(weight.detach(), (0, -self.inputs % together, 0, missing))
        blocks = filled.view(-1, columns, filled.shape[1] // 2, 2).transpose(1, 2)
        packed = memory.zeros(blocks.shape, torch.bfloat16).copy_(blocks)
        added = weight.new_zeros(self.outputs) if bias is None else bias.detach()
        self._kept = packed, F.pad(added.float(), (0, missing)).contiguous()
        self.struct = Linear(*(tensor.data_ptr() for tensor in self._kept), self.inputs, self.outputs)
        self.address = ctypes.addressof(self.struct)


class PackedLayer:
    """One decoder layer's weights. Norms are (weight [H], epsilon), the first None where there is none."""

    def __init__(
        self, input_norm: tuple[Tensor, float] | None, mlp_norm: tuple[Tensor, float], qkv: PackedLinear,
        out: PackedLinear, gate_up: PackedLinear, down: PackedLinear,
    ) -> None:  # fmt: skip
        """Raises ValueError for weights that do not join to a layer."""
        hidden, width = qkv.inputs, down.inputs
        if not hidden == out.outputs == gate_up.inputs == down.outputs or gate_up.outputs != 2 * width:
            raise ValueError("the linear layers do not join: H to qkv, heads to H, H to 2 * I, I to H")
        for norm in (input_norm, mlp_norm):
            if norm is not None:
                require("norm", norm[0], torch.bfloat16, (hidden,))
        self.hidden = hidden
        self.widths = hidden, qkv.outputs, out.inputs, width
        self._kept = input_norm, mlp_norm, qkv, out, gate_up, down

    def struct(self, attention: AttentionLayer) -> _DecoderLayer:
        """With a cache's part of the layer. Raises ValueError where it has other heads."""
        if (attention.qkv_width, attention.out_width) != self.widths[1:3]:
            raise ValueError(f"attention of {attention.qkv_width} wide rows has weights for {self.widths[1]}")
        if attention.dtype is not torch.bfloat16:
            raise ValueError(f"the cache is {attention.dtype}; layers are computed in bfloat16")
        input_norm, mlp_norm, *linears = self._kept
        weight, eps = (None, 0.0) if input_norm is None else (input_norm[0].data_ptr(), input_norm[1])
        structs = (linear.struct for linear in linears)
        return _DecoderLayer(attention.address, weight, mlp_norm[0].data_ptr(), eps, mlp_norm[1], *structs)


class PackedLayers:
    """Decoder layers over one cache, in order."""

    def __init__(self, layers: Sequence[PackedLayer], attentions: Sequence[AttentionLayer]) -> None:
        """Raises ValueError for layers that do not fit one another."""
        self.hidden = layers[0].hidden
        if any(layer.widths != layers[0].widths for layer in layers):
            raise ValueError("layers of one forward have the same shapes")
        self.count = len(layers)
        self._kept = list(layers), list(attentions)
        structs = [layer.struct(attention) for layer, attention in zip(layers, attentions, strict=True)]
        self._structs = (_DecoderLayer * self.count)(*structs)
        self.address = ctypes.addressof(self._structs)
