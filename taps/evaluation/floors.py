"""The least time that memory and arithmetic allow a step, at rates measured on this machine in the same run.

Counted: every matrix read once a forward, keys and values of committed positions read once, and two operations
for each row and weight. Left out: embeddings looked up, norms, activations, and attention's own arithmetic. Of
a mixture of experts every expert is counted, though a small step reads few of them. Weights that stay in the
processor's caches from one forward to the next, as a draft head's may, can beat such a floor.

Knows counts and rates; nothing of what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from taps.models.decoder import head_dim_of
from taps.models.linear import RowLinear

SUM_BYTES = 1_000_000_000  # more than any cache holds
_REPEATS = 20
# Rows and width of a product that runs at the peak: on a GPU it must outlast its launch and the wait for it.
_CPU_PRODUCT, _GPU_PRODUCT = (512, 2048), (8192, 8192)


class Rates(NamedTuple):
    """The best this machine did with a number of threads."""

    bytes_per_s: float
    flops_per_s: float


class Cost(NamedTuple):
    """What a step cannot do without."""

    num_bytes: float
    flops: float


class Floor(NamedTuple):
    ms: float
    bound: str  # by memory or compute, whichever takes longer


class TargetSize(NamedTuple):
    """What a target's steps read and multiply."""

    body: int  # weights of all matrices but `lm_head`
    lm_head: int
    position_bytes: int  # keys and values of one position, all layers
    itemsize: int  # bytes of a weight

    @property
    def num_bytes(self) -> int:
        return (self.body + self.lm_head) * self.itemsize

    def cost(self, rows: int, logit_rows: int, positions: int) -> Cost:
        """Of one step. Args: logit_rows: rows that get logits; positions: committed, of all sessions."""
        flops = 2 * (self.body * rows + self.lm_head * logit_rows)
        return Cost(self.num_bytes + self.position_bytes * positions, flops)


def floor_of(cost: Cost, rates: Rates) -> Floor:
    memory, compute = cost.num_bytes / rates.bytes_per_s, cost.flops / rates.flops_per_s
    return Floor(1000 * max(memory, compute), "memory" if memory >= compute else "compute")


def target_size(model: Any) -> TargetSize:
    """Args: model: as transformers loads it; once it is served its matrices are packed."""
    config = model.config.get_text_config()
    lm_head: int = model.get_output_embeddings().weight.numel()
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    itemsize: int = model.dtype.itemsize
    position = config.num_hidden_layers * keys * 2 * head_dim_of(config) * itemsize
    return TargetSize(num_weights(model) - lm_head, lm_head, position, itemsize)


def num_weights(model: nn.Module) -> int:
    """Of all matrices that rows are multiplied with: an embedding table counts where `lm_head` is the same."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    if found is not None:
        tables.discard(id(found().weight))
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)


@torch.inference_mode()
def measured_rates(dtype: torch.dtype, device: str) -> Rates:
    """With the threads that the caller computes with: the best of sums over a gigabyte, and of products.

    On the CPU products in float32 count, too: where there are no instructions for `dtype`, torch multiplies it
    more slowly than what it could be widened to.
    """
    numbers = torch.ones(SUM_BYTES // 4, device=device)
    sums = _best_seconds(lambda: float(numbers.sum()))
    kinds = {dtype, torch.float32} if device == "cpu" else {dtype}
    return Rates(4 * numbers.numel() / sums, max(_product_rate(kind, device) for kind in kinds))


def _product_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second."""
    num_rows, width = _CPU_PRODUCT if device == "cpu" else _GPU_PRODUCT
    weight = torch.randn(width, width, device=device).to(dtype)
    layer = RowLinear(weight) if device == "cpu" else partial(F.linear, weight=weight)
    rows = torch.randn(num_rows, width, device=device).to(dtype)
    products = _best_seconds(lambda: float(layer(rows)[0, 0]))  # a number asked for is waited for on a GPU too
    return 2 * num_rows * width * width / products


def _best_seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
