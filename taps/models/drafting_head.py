"""A draft head as drafting runs it: pairs of token and feature in, predicted features and logits out.

On the CPU a Llama head's layer runs through our own decoder; elsewhere through transformers' code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.models.attention import Packed
from taps.models.cache import LayerShape, PagedCache
from taps.models.cpu_kernel.drafting import Grown, TreesAsked
from taps.models.decoder import head_dim_of, is_lean_config, joined, layer_weights, rope_of
from taps.models.draft_head import DraftHead
from taps.models.kernel_operations import KernelDrafts, cpu_best, cpu_operations, kernel_drafts
from taps.models.linear import use_row_linears
from taps.models.operations import Linear, Operations, Rope
from taps.models.step import Step


class DraftingHead:
    """A head over packed rows. It takes the head's linear layers over: they are not trained afterwards."""

    def __init__(self, head: DraftHead, operations: Operations | None = None) -> None:
        self.dtype = head.fc.weight.dtype
        self.device = head.fc.weight.device
        self.draft_vocab = head.draft_vocab
        self.vocab_size, self.hidden_size = head.embeddings.shape
        attention: Any = head.layers[0].self_attn
        dim: int = attention.head_dim
        self.layer_shape = LayerShape(attention.k_proj.out_features // dim, dim, dim, self.device)
        lean = self.device.type == "cpu" and is_lean_config(head.config)
        self.best = cpu_best() if self.device.type == "cpu" else None
        self._run: _Lean | _Transformers
        self._run = _Lean(head.eval(), operations) if lean else _Transformers(head.eval())

    @property
    def in_kernel(self) -> bool:
        """Whether all that is large is computed by the CPU kernel, nothing by torch."""
        return self._run.in_kernel

    def __call__(self, features: Tensor, step: Step, cache: PagedCache) -> Tensor:
        """Predicted features [n, H]. Args: features [n, H]: feature_i, the step's tokens being t_{i+1}."""
        return self._run(features, step, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary]"""
        return self._run.lm_head(hidden)

    @property
    def grows(self) -> bool:
        """Whether it has `grow`."""
        return self._run.drafts is not None

    def grow(self, asked: TreesAsked, roots: Tensor, cache: PagedCache) -> Grown:
        """Whole trees below the predicted features [T, H] at their roots, where the head `grows`."""
        assert self._run.drafts is not None
        self._run.rope.cover(asked.reach)
        return self._run.drafts(asked, roots, cache, self._run.rope)


class _Lean:
    def __init__(self, head: DraftHead, operations: Operations | None) -> None:
        dtype = head.fc.weight.dtype
        operations = operations or cpu_operations(dtype, head_dim_of(head.config))
        self._embeddings = head.embeddings
        self._layers = operations.layers([layer_weights(head.layers[0])])
        self.in_kernel = self._layers.in_kernel
        self.rope = rope_of(head.rotary)
        self._fc, self.lm_head = operations.linear(joined(head.fc)), operations.linear(joined(head.lm_head))
        self.drafts = kernel_drafts(head.embeddings, head.draft_vocab, self._fc, self._layers, self.lm_head)

    def __call__(self, features: Tensor, step: Step, cache: PagedCache) -> Tensor:
        self.rope.cover(step.num_positions)
        tokens = step.on(features.device).tokens
        pairs = torch.cat([F.embedding(tokens, self._embeddings), features], dim=-1)
        return self._layers(self._fc(pairs), step, cache, self.rope)


class _Transformers:
    in_kernel = False
    drafts: KernelDrafts | None = None
    rope: Rope

    def __init__(self, head: DraftHead) -> None:
        use_row_linears(head)
        self._head = head
        self.lm_head: Linear = head.lm_head

    def __call__(self, features: Tensor, step: Step, cache: PagedCache) -> Tensor:
        packed, rows = Packed(step, cache), step.on(features.device)
        hidden: Tensor = self._head(rows.tokens[None], features[None], rows.positions[None], packed)[0]
        return hidden
