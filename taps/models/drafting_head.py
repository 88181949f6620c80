"""A draft head as drafting runs it: pairs of token and feature in, predicted features and logits out.

On the CPU a Llama head's layer runs through our own decoder; elsewhere through transformers' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.models.attention import Packed
from taps.models.cache import PagedCache
from taps.models.decoder import DecoderLayer, head_dim_of, is_lean_config, rope_of
from taps.models.draft_head import DraftHead
from taps.models.kernel_operations import cpu_operations
from taps.models.linear import use_row_linears
from taps.models.operations import Operations
from taps.models.step import Step


class DraftingHead:
    """A head over packed rows. It takes the head's linear layers over: they are not trained afterwards."""

    def __init__(self, head: DraftHead, operations: Operations | None = None) -> None:
        self.dtype = head.fc.weight.dtype
        self.device = head.fc.weight.device
        self.draft_vocab = head.draft_vocab
        self.vocab_size, self.hidden_size = head.embeddings.shape
        self._head = head.eval()
        self._layer: DecoderLayer | None = None
        if self.device.type == "cpu" and is_lean_config(head.config):
            self._layer = DecoderLayer(
                head.layers[0], 0, operations or cpu_operations(self.dtype, head_dim_of(head.config))
            )
            self._rope = rope_of(head.rotary)
        use_row_linears(head)

    def __call__(self, tokens: Tensor, features: Tensor, step: Step, cache: PagedCache) -> Tensor:
        """Predicted features [n, H]. Args: tokens [n]: t_{i+1}; features [n, H]: feature_i."""
        if self._layer is None:
            packed = Packed(step, cache)
            hidden: Tensor = self._head(tokens[None], features[None], step.positions[None], packed)[0]
            return hidden
        self._rope.cover(step.num_positions)
        pairs = torch.cat([F.embedding(tokens, self._head.embeddings), features], dim=-1)
        return self._layer(self._head.fc(pairs), step, cache, self._rope)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary]"""
        found: Tensor = self._head.lm_head(hidden)
        return found
