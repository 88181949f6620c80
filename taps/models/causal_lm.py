"""Any Hugging Face causal LM as an `extend` primitive: rows in, features and logits out.

Llama-like ones run through our own decoder on the CPU, all others through transformers' code with our
attention. A target that cannot be served is refused here, with a sentence that says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taps.models.attention import ATTENTION_NAME, Packed
from taps.models.cache import Kept, LayerShape, PagedCache
from taps.models.decoder import Decoder, head_dim_of, is_lean
from taps.models.kernel_operations import cpu_best, cpu_operations, cpu_race
from taps.models.linear import use_row_linears
from taps.models.operations import Operations
from taps.models.pretrained import UnservableTarget, load_model
from taps.models.step import Segment, Step, StepInputs

_PROBE_TOKENS = 8
# How far half of the logits may lie from those of the model's own forward, relative to their spread. Rounding
# alone makes it 1e-5 in float32 and 0.03 in bfloat16, where single logits differ by half of the spread.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


class CausalLM:
    """A loaded target model that appends rows to sequences."""

    def __init__(self, model: PreTrainedModel, operations: Operations | None = None) -> None:
        """Args: operations: those of our own decoder, where the model runs through it."""
        config = model.config.get_text_config()
        if model.dtype not in _PROBE_TOLERANCE:
            raise UnservableTarget(f"the target has dtype {model.dtype}; use float32, bfloat16 or float16")
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 20)
        self.num_layers: int = config.num_hidden_layers
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._inputs = StepInputs(self.device)
        untyped = cast(Any, model)
        untyped.eval()
        self.embeddings: Tensor = untyped.get_input_embeddings().weight.detach()  # [V, H]
        self.race = cpu_race() if model.device.type == "cpu" else None
        self.find_best = cpu_best() if model.device.type == "cpu" else None
        self.layer_shapes: list[LayerShape] = []
        name, own = type(model).__name__, self._own_logits(untyped)
        self._run: _Lean | _Transformers
        if model.device.type == "cpu" and is_lean(untyped):
            self._run = _Lean(untyped, operations or cpu_operations(self.dtype, head_dim_of(config)))
        else:
            self._run = _Transformers(untyped)
        self._refuse_unless_alike(name, own)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, device_map: str | None = None) -> CausalLM:
        """Load a local directory or a Hugging Face id.

        Raises `UnservableTarget` when there is no such model or it cannot be served.
        """
        return cls(load_model(path, dtype, device_map))

    @torch.inference_mode()
    def extend(
        self, segments: Sequence[Segment], tokens: Sequence[int], keep: Sequence[int], cache: PagedCache
    ) -> tuple[Tensor, Tensor]:
        """Append rows of these tokens to the segments' sequences; nothing is committed.

        Returns features [rows, H] (after the final norm) and logits [len(keep), V] of the rows in `keep`.
        """
        return self._run(Step(segments, self._inputs, tokens, keep), cache)

    @property
    def in_kernel(self) -> bool:
        """Whether all that is large is computed by the CPU kernel, nothing by torch."""
        return self._run.in_kernel

    @property
    def bytes_per_position(self) -> int:
        """That a cache takes, the position's feature included."""
        return (sum(shape.numbers for shape in self.layer_shapes) + self.hidden_size) * self.dtype.itemsize

    @property
    def numerics(self) -> str:
        """Names all that decides the bits of what `extend` returns, but for the weights."""
        return self._run.numerics

    @property
    def _probe_tokens(self) -> list[int]:
        return [(7919 * i + 11) % self.vocab_size for i in range(_PROBE_TOKENS)]

    @torch.inference_mode()
    def _own_logits(self, model: Any) -> Tensor:
        """[probe, V] of the model's own forward."""
        ids = torch.tensor([self._probe_tokens], device=self.device)
        logits: Tensor = model(ids, use_cache=False).logits[0].float()
        return logits

    def _refuse_unless_alike(self, name: str, own: Tensor) -> None:
        """Run a few tokens through our attention, in two chunks; compare with the model's own."""
        try:
            ours, seen = self._probe()
        except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
            raise UnservableTarget(f"{name} cannot run with tree attention: {error}") from error
        if seen is not None and sorted(seen) != list(range(self.num_layers)):
            raise UnservableTarget(
                f"{name} does not route each of its {self.num_layers} layers through the attention interface "
                "(state-space, linear-attention and old model families do not); choose another target"
            )
        spread = float(own.std()) or 1.0
        error_size = float((ours - own[-len(ours) :]).abs().median()) / spread
        if not error_size <= _PROBE_TOLERANCE[self.dtype]:
            raise UnservableTarget(
                f"{name} computes other logits with tree attention than with its own (relative difference "
                f"{error_size:.2g}); its output would not be the target's own, so it is not served"
            )

    def _probe(self) -> tuple[Tensor, list[int] | None]:
        """Logits of the probe's second half, extended after the first, and the layers that attended then.

        What the layers keep of a position is learned with it.
        """
        cache, half = PagedCache(1, _PROBE_TOKENS), _PROBE_TOKENS // 2
        sequence = cache.open()
        cache.reserve(sequence, _PROBE_TOKENS)
        for chunk in (self._probe_tokens[:half], self._probe_tokens[half:]):
            _, logits = self.extend([Segment(sequence, len(chunk))], chunk, range(len(chunk)), cache)
            cache.commit([Kept(sequence, range(len(chunk)))])
        self.layer_shapes = cache.shapes
        return logits.float(), self._run.layers_seen


class _Lean:
    """A model through our own decoder; what transformers loaded is given up, layer by layer."""

    layers_seen = None  # all of them, by construction

    def __init__(self, model: Any, operations: Operations) -> None:
        self._decoder = Decoder(model, operations)
        self.numerics = operations.numerics
        self.in_kernel = self._decoder.in_kernel

    def __call__(self, step: Step, cache: PagedCache) -> tuple[Tensor, Tensor]:
        return self._decoder(step, cache)


class _Transformers:
    """A model through transformers' own code with our attention."""

    in_kernel = False

    def __init__(self, model: Any) -> None:
        self.layers_seen: list[int] = []
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            name = type(model).__name__
            raise UnservableTarget(f"{name} cannot run with tree attention: {error}") from error
        use_row_linears(model)
        self._model = model
        dtype = str(model.dtype).removeprefix("torch.")
        self.numerics = f"transformers {model.device.type} torch {torch.__version__} {dtype}"

    def __call__(self, step: Step, cache: PagedCache) -> tuple[Tensor, Tensor]:
        packed, rows = Packed(step, cache), step.on(self._model.device)
        out = self._model(
            input_ids=rows.tokens.long()[None],
            position_ids=rows.positions.long()[None],
            attention_mask=torch.ones(1, step.num_rows, dtype=torch.bool, device=self._model.device),
            use_cache=False,
            packed=packed,
            logits_to_keep=rows.chosen,
            output_hidden_states=[-1],
        )
        self.layers_seen = packed.layers_seen
        return out.hidden_states[-1][0], out.logits[0]


def fingerprint(embeddings: Tensor) -> str:
    """Short hash of a sample of the target's input embeddings [V, H], rounded to bfloat16.

    Heads trained for another target do not fit this one. Taken of the checkpoint's own numbers: those of a
    model loaded in float16 may round elsewhere.
    """
    rows = embeddings[:: max(1, embeddings.shape[0] // 64)].to(torch.bfloat16).contiguous().cpu()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
