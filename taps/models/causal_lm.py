"""Any Hugging Face causal LM as an `extend` primitive: rows in, features and logits out.

A target that cannot be served exactly is refused here, with a sentence that says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taps.models.attention import ATTENTION_NAME, PackedStep, Segment
from taps.models.cache import SlotCache
from taps.models.onednn import pack_linears
from taps.models.pretrained import UnservableTarget, load_model

_PROBE_TOKENS = 8
# Largest difference to the model's own forward, relative to the logits' spread.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class CausalLM:
    """A loaded target model driven through the registered tree attention."""

    def __init__(self, model: PreTrainedModel, pack: bool = True) -> None:
        config = model.config.get_text_config()
        if model.dtype not in _PROBE_TOLERANCE:
            raise UnservableTarget(f"the target has dtype {model.dtype}; use float32, bfloat16 or float16")
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 20)
        self.num_layers: int = config.num_hidden_layers
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._model = untyped = cast(Any, model)
        untyped.eval()
        self._refuse_unless_exact()
        self.lm_head: Tensor = untyped.get_output_embeddings().weight.detach()  # [V, H]
        self.embeddings: Tensor = untyped.get_input_embeddings().weight.detach()  # [V, H]
        if pack:
            pack_linears(model)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, device_map: str | None = None) -> CausalLM:
        """Load a local directory or a Hugging Face id.

        Raises `UnservableTarget` when there is no such model or it cannot be served.
        """
        return cls(load_model(path, dtype, device_map))

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], step: PackedStep, keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Append `tokens` to the step's segments; nothing is committed.

        Returns features [rows, H] (after the final norm) and logits [len(keep), V] of the rows in `keep`.
        """
        rows = torch.tensor(keep or [0])  # on the CPU: the last layer may be on another device than the first
        out = self._model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=step.positions(),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.bool, device=self.device),
            use_cache=False,
            packed=step,
            logits_to_keep=rows,
            output_hidden_states=[-1],
        )
        return out.hidden_states[-1][0], out.logits[0]

    def _refuse_unless_exact(self) -> None:
        """Run a few tokens through the model's own attention and through ours, in two chunks; compare."""
        name = type(self._model).__name__
        tokens = [(7919 * i + 11) % self.vocab_size for i in range(_PROBE_TOKENS)]
        with torch.inference_mode():
            own = self._model(torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()
        try:
            self._model.set_attn_implementation(ATTENTION_NAME)
            ours, seen = self._probe(tokens)
        except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
            raise UnservableTarget(f"{name} cannot run with tree attention: {error}") from error
        if sorted(seen) != list(range(self.num_layers)):
            raise UnservableTarget(
                f"{name} does not route each of its {self.num_layers} layers through the attention interface "
                "(state-space, linear-attention and old model families do not); choose another target"
            )
        spread = float(own.std()) or 1.0
        error_size = float((ours - own[-ours.shape[0] :]).abs().max()) / spread
        if not error_size <= _PROBE_TOLERANCE[self.dtype] * 4:
            raise UnservableTarget(
                f"{name} computes other logits with tree attention than with its own (relative difference "
                f"{error_size:.2g}); its output would not be the target's own, so it is not served"
            )

    def _probe(self, tokens: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Logits of the second half of `tokens`, extended after the first, and the layers that attended."""
        cache, half = SlotCache(1, len(tokens)), len(tokens) // 2
        slot = cache.acquire()
        for chunk in (tokens[:half], tokens[half:]):
            segment = Segment(slot, 0, torch.arange(len(chunk)), None)
            step = PackedStep(cache, [segment], self.dtype, self.device)
            _, logits = self.extend(chunk, step, range(len(chunk)))
            cache.commit(slot, range(len(chunk)))
        return logits.float(), step.layers_seen


def fingerprint(embeddings: Tensor) -> str:
    """Short hash of a sample of the target's input embeddings [V, H], rounded to bfloat16.

    Heads trained for another target do not fit this one. Taken of the checkpoint's own numbers: those of a
    model loaded in float16 may round elsewhere.
    """
    rows = embeddings[:: max(1, embeddings.shape[0] // 64)].to(torch.bfloat16).contiguous().cpu()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
