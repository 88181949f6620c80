"""What attention over a paged cache is given: a layer's pools and sizes, and the rows of one forward.

Both are checked and laid out for the kernel once, a layer when it is made and a step before its first layer, so
that a call passes two addresses. What a step's integers say is checked in each call, by the kernel.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from taps.models.cpu_kernel.tensors import dtype_number, require

BLOCK = 64  # positions of a block
MAX_HEAD_DIM = 256
_HEAD_STEP = 16

# What is wrong, by the numbers of `Fault` in sequences.h.
FAULTS = (
    "",
    "rope turns more elements than a head has",
    "starts must begin with 0, never fall, and end with the number of rows",
    "committed and region count positions; one of them is negative",
    "a session has more positions than its row of the table has room for",
    "the table names a block that is not in the pools",
    "a row's path must ascend through the region's offsets and end with the row's own",
)


class _Layer(ctypes.Structure):
    """`Layer` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "q_norm", "k_norm")),
        *((name, ctypes.c_int32) for name in ("dtype", "blocks", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    )


class _Step(ctypes.Structure):
    """`Step` of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "committed", "region", "starts")),
        *((name, ctypes.c_void_p) for name in ("path_ptr", "path_idx", "chain", "cos", "sin")),
        *((name, ctypes.c_int32) for name in ("sessions", "max_blocks", "rows", "paths", "rotary")),
    )


class AttentionLayer:
    """One layer's part of the pools, its head counts, and the norms of queries and keys where it has them."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        heads: int,
        scale: float | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        """Raises ValueError for what the kernel does not compute.

        Args:
            keys: [blocks, kv_heads, d, 64]; d a multiple of 16 up to 256.
            values: [blocks, kv_heads, 64, d].
            heads: query heads, a multiple of kv_heads.
            scale: of the scores; d ** -0.5 by default.
            q_norm, k_norm: [d] weights of an RMSNorm over each head before rope (qwen3), with its `eps`.
        """
        if keys.dim() != 4:
            raise ValueError(f"keys are {list(keys.shape)}; they must be [blocks, kv_heads, head_dim, {BLOCK}]")
        blocks, kv_heads, head_dim, _ = keys.shape
        if head_dim % _HEAD_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"heads have {head_dim} elements; a multiple of {_HEAD_STEP} up to {MAX_HEAD_DIM} is computed"
            )
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
        require("keys", keys, keys.dtype, (blocks, kv_heads, head_dim, BLOCK))
        require("values", values, keys.dtype, (blocks, kv_heads, BLOCK, head_dim))
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                require(name, norm, keys.dtype, (head_dim,))
        self.dtype = keys.dtype
        self.qkv_width = (heads + 2 * kv_heads) * head_dim
        self.out_width = heads * head_dim
        self._kept = (keys, values, q_norm, k_norm)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self._kept)
        scale = head_dim**-0.5 if scale is None else scale
        sizes = (dtype_number("keys", keys), blocks, heads, kv_heads, head_dim)
        self._struct = _Layer(*pointers, *sizes, scale, eps)
        self.address = ctypes.addressof(self._struct)


class AttentionStep:
    """The rows of one forward, packed by session, and where each sequence lies. Serves all layers."""

    def __init__(
        self,
        table: Tensor,
        committed: Tensor,
        region: Tensor,
        starts: Tensor,
        path_ptr: Tensor,
        path_idx: Tensor,
        chain: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        """Raises ValueError for tensors of other shapes; integers are int32, cos and sin float32.

        A session's new rows follow those of its region that are there already: row r lies at place
        committed + region + r - start of its table, and its position is committed + its path's length - 1.

        Args:
            table: [S, max_blocks] blocks of each sequence in the pools.
            committed: [S] positions before the region.
            region: [S] rows of the region from earlier steps (levels of a growing draft); else 0.
            starts: [S + 1] the rows of session s are starts[s] to starts[s + 1].
            path_ptr, path_idx: [R + 1] and [P]; the path of row r is path_idx[path_ptr[r] : path_ptr[r + 1]],
                offsets in the region, ascending, the row itself last.
            chain: [S] 1 where each region row follows the one before; paths are not looked at then.
            cos, sin: [R, rotary / 2] at each row's position. None: queries and keys come turned already.
        """
        sessions, rows = committed.numel(), path_ptr.numel() - 1
        if (cos is None) != (sin is None):
            raise ValueError("rope needs both cos and sin")
        if table.dim() != 2 or (cos is not None and cos.dim() != 2):
            raise ValueError("table is [sessions, max_blocks]; cos and sin are [rows, rotary / 2]")
        half = 0 if cos is None else cos.shape[1]
        integers = {
            "table": (table, (sessions, table.shape[1])),
            "committed": (committed, (sessions,)),
            "region": (region, (sessions,)),
            "starts": (starts, (sessions + 1,)),
            "path_ptr": (path_ptr, (rows + 1,)),
            "path_idx": (path_idx, (path_idx.numel(),)),
            "chain": (chain, (sessions,)),
        }
        for name, (tensor, shape) in integers.items():
            require(name, tensor, torch.int32, shape)
        for name, turn in (("cos", cos), ("sin", sin)):
            if turn is not None:
                require(name, turn, torch.float32, (rows, half))
        self.rows = rows
        self._kept = (table, committed, region, starts, path_ptr, path_idx, chain, cos, sin)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in self._kept)
        sizes = (sessions, table.shape[1], rows, path_idx.numel(), 2 * half)
        self._struct = _Step(*pointers, *sizes)
        self.address = ctypes.addressof(self._struct)
