"""Where two decodings of one prompt part, and by how little: near-ties flip, other differences are bugs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from taps.sampling import SamplingParams, gumbel_noise, shape_logits


class Divergence(NamedTuple):
    position: int  # index of the first generated token that differs
    margin: float  # how far apart the two tokens' scores are, in nats, re-scored in float32


def first_divergence(
    model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], params: SamplingParams
) -> Divergence | None:
    """None where the two are identical.

    Args: model: the target in float32, through its own attention.
    """
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return Divergence(i, _margin(model, [*prompt, *one[:i]], one[:i], a, b, params))
    return None


def _margin(
    model: Any, tokens: list[int], generated: Sequence[int], a: int, b: int, params: SamplingParams
) -> float:
    """Difference of what sampling maximises: log-weight, plus noise where it is not greedy."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
    shaped = shape_logits(logits, params, Counter(generated))
    open_ended = shape_logits(logits, replace(params, top_p=1.0, top_k=0), Counter(generated))
    pair = torch.tensor([a, b])
    if not bool(shaped[pair].isfinite().all()):
        # One of them lies beyond the top-p or top-k edge: how far from the last token inside it.
        edge = float(shaped[shaped.isfinite()].min())
        return min(abs(float(open_ended[token]) - edge) for token in (a, b))
    scores = open_ended[pair].double()
    if not params.greedy:
        scores = scores + gumbel_noise(params.seed, params.choice, len(tokens), pair)
    margin = abs(float(scores[0] - scores[1]))
    return margin if math.isfinite(margin) else math.inf
