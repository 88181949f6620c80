"""Linear layers that give a row the same bits for any number of rows, on the CPU in oneDNN's blocked layout.

Blocked weights make small steps 1.2 to 1.4 times faster. One row alone goes another way through the
libraries and is summed in another order, so it is computed as two; more rows than were found to agree go in
pieces.

The operators are private to torch, so blocking is tried once and left out where it does not work.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCKED = (torch.bfloat16, torch.float32)
_TYPICAL_ROWS = 16  # a hint for the layout
_HAS_TILES = torch.cpu._is_amx_tile_supported()  # with them oneDNN sums 33 rows and more in another order
# Rows whose bits do not depend on how many they are, by type: what the probe at load checks.
MOST_ROWS = {torch.float32: 512, torch.bfloat16: 32 if _HAS_TILES else 512, torch.float16: 320}


class RowLinear(nn.Module):
    """A frozen linear layer over rows [n, in]; a blocked weight is given up, so it cannot be saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Args: weight [out, in]; bias [out]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = None if bias is None else bias.detach()
        weight = weight.detach().contiguous()
        self._blocked = weight.device.type == "cpu" and can_block(weight.dtype)
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS) if self._blocked else weight
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1:
            out = self._product(rows.expand(2, -1))[:1]
        elif len(rows) <= MOST_ROWS[self.dtype]:
            out = self._product(rows)
        else:
            out = torch.cat([self._pieces(part) for part in torch.split(rows, MOST_ROWS[self.dtype])])
        return out.view(*x.shape[:-1], self.out_features)

    def _pieces(self, rows: Tensor) -> Tensor:
        return self._product(rows) if len(rows) > 1 else self._product(rows.expand(2, -1))[:1]

    def _product(self, rows: Tensor) -> Tensor:
        if not self._blocked:
            return F.linear(rows, self._weight, self._bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return out


@functools.cache
def can_block(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor run blocked linears of `dtype` correctly."""
    if dtype not in _BLOCKED:
        return False
    try:
        weight, x = torch.ones(16, 32, dtype=dtype), torch.ones(2, 32, dtype=dtype)
        with torch.inference_mode():
            blocked = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
            ours = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
            return bool(torch.allclose(ours, F.linear(x, weight), atol=1e-2))
    except (RuntimeError, AttributeError):
        return False


def use_row_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` on the CPU below `module` in place."""
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            use_row_linears(child)
        elif child.weight.device.type == "cpu":
            setattr(module, name, RowLinear(child.weight, child.bias))
