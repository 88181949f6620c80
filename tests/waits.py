"""Counting the operations for whose result the host would wait, were the tensors on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


def counting_waits() -> Any:
    """A context whose `count` is how many operations there were for whose result the host would wait."""

    def dispatch(mode: Any, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        mode.count += name in WAITS or masks
        return operation(*args, **(kwargs or {}))

    return type("Waits", (TorchDispatchMode,), {"__torch_dispatch__": dispatch, "count": 0})()
