"""Linear layers pre-packed in oneDNN's blocked layout: 1.2 to 1.4 times faster small steps on CPU.

The operators are private to torch, so packing is tried once and left out where it does not work.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

_PACKABLE = (torch.bfloat16, torch.float32)
_TYPICAL_ROWS = 16  # a hint for the layout


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` for inference; the plain weight is given up, so it cannot be saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor run packed linears of `dtype` correctly."""
    if dtype not in _PACKABLE:
        return False
    try:
        linear = nn.Linear(32, 16, dtype=dtype)
        x = torch.ones(2, 32, dtype=dtype)
        with torch.inference_mode():
            return bool(torch.allclose(PackedLinear(linear)(x), linear(x), atol=1e-2))
    except (RuntimeError, AttributeError):
        return False


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` on the CPU below `module` in place, where packing works."""
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            pack_linears(child)
        elif child.weight.device.type == "cpu" and can_pack(child.weight.dtype):
            setattr(module, name, PackedLinear(child))
