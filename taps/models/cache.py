"""The KV cache: a fixed number of slots, one per session, each up to `max_len` positions.

Knows keys, values and slots; nothing of trees or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taps.peers import PeerBusy


class CacheFull(PeerBusy):
    """Every slot is taken; the caller should wait or turn the session away."""


class SlotCache:
    """Keys and values of many sessions. Buffers are allocated on a layer's first use.

    A slot holds `length` committed positions; rows beyond it are scratch that the next step overwrites.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.max_len = max_len
        self.length = [0] * num_slots
        self._free = list(reversed(range(num_slots)))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def acquire(self) -> int:
        """An empty slot; raises `CacheFull` when there is none."""
        if not self._free:
            raise CacheFull(f"all {len(self.length)} session slots are in use")
        slot = self._free.pop()
        self.length[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers [slots, kv_heads, max_len, head_dim] of one layer, shaped after its first rows.

        Args: keys, values: [kv_heads, rows, head_dim], only looked at for shape, type and device.
        """
        if index not in self._layers:
            self._layers[index] = (self._buffer(keys), self._buffer(values))
        return self._layers[index]

    def _buffer(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(len(self.length), rows.shape[0], self.max_len, rows.shape[-1])

    @torch.inference_mode()
    def commit(self, slot: int, path: Sequence[int]) -> None:
        """Keep the rows at offsets `path` after the committed ones, in that order; drop the rest."""
        start, kept = self.length[slot], len(path)
        if any(offset != i for i, offset in enumerate(path)):
            for keys, values in self._layers.values():
                rows = torch.tensor(path, device=keys.device) + start
                keys[slot, :, start : start + kept] = keys[slot][:, rows]
                values[slot, :, start : start + kept] = values[slot][:, rows]
        self.length[slot] = start + kept
