"""Where two decodings of one prompt part, and by how little: near-ties flip, other differences are bugs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taps.sampling import gumbel_noise
from taps.shaping import SamplingParams, shape_logits


class Divergence(NamedTuple):
    position: int  # index of the first generated token that differs
    margin: float  # how far the two tokens are from changing places, re-scored in float32


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
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
    return margin(logits, len(tokens), generated, a, b, params)


def margin(
    logits: Tensor, position: int, generated: Sequence[int], a: int, b: int, params: SamplingParams
) -> float:
    """By how little logits [V] must move for tokens `a` and `b` to change places at `position`.

    Where both can be sampled, the difference of what sampling maximises: log-weight, plus noise where it is not
    greedy. Where one is excluded, its distance to being kept: in nats below the last of the top k, or as the
    mass by which the tokens before it exceed top-p.
    """
    counts = Counter(generated)
    shaped = shape_logits(logits, params, counts)
    open_ended = shape_logits(logits, replace(params, top_p=1.0, top_k=0), counts)
    excluded = [token for token in (a, b) if not math.isfinite(float(shaped[token]))]
    if excluded:
        return max(_distance_to_the_kept(open_ended, token, params) for token in excluded)
    pair = torch.tensor([a, b])
    scores = open_ended[pair].double()
    if not params.greedy:
        scores = scores + gumbel_noise(params.seed, params.choice, position, pair)
    difference = abs(float(scores[0] - scores[1]))
    return difference if math.isfinite(difference) else math.inf


def _distance_to_the_kept(open_ended: Tensor, token: int, params: SamplingParams) -> float:
    weight = open_ended[token]
    distance = 0.0
    if 0 < params.top_k < open_ended.numel():
        edge = open_ended.topk(params.top_k).values[-1]
        distance = max(0.0, float(edge - weight))
        open_ended = open_ended.masked_fill(open_ended < edge, -math.inf)
    if params.top_p < 1.0:
        probabilities = open_ended.double().softmax(0)
        before = float(probabilities[open_ended > weight].sum())
        distance = max(distance, before - params.top_p)
    return distance
