"""A tiny target with random weights and heads for it: real code paths in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from taps.models.draft_head import DraftHead, draft_config

VOCAB, HIDDEN = 97, 32


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


def tiny_target() -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(tiny_config(), dtype=torch.float32).eval()


def saved_target(directory: Path) -> Path:
    tiny_target().save_pretrained(directory)
    return directory


def tiny_head(seed: int = 1, draft_vocab: torch.Tensor | None = None) -> DraftHead:
    """A head that agrees with the tiny target now and then: nearly passes the feature on."""
    model = tiny_target()
    torch.manual_seed(seed)
    head = DraftHead(
        draft_config(tiny_config()),
        model.get_input_embeddings().weight.detach(),
        model.get_output_embeddings().weight.detach(),
        draft_vocab,
    )
    return head.eval()
