"""What every tensor that the kernel reads or writes must be; its dtypes by the numbers they have in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dtype_number(name: str, tensor: Tensor) -> int:
    """Raises ValueError for a dtype that the kernel does not compute in."""
    number = _DTYPES.get(tensor.dtype)
    if number is None:
        raise ValueError(f"{name} is {tensor.dtype}; the CPU kernel computes in {', '.join(map(str, _DTYPES))}")
    return number


def require(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Raises ValueError unless the tensor is dense, on the CPU, and of this dtype and shape."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and tensor.is_contiguous():
        return
    raise ValueError(
        f"{name} is {_described(tensor)}; it must be {dtype} {list(shape)}, contiguous, on the CPU"
    )


def _described(tensor: Tensor) -> str:
    dense = "contiguous" if tensor.is_contiguous() else "not contiguous"
    return f"{tensor.dtype} {list(tensor.shape)}, {dense}, on {tensor.device.type}"
