"""From logits to a token: shaping, and sampling by noise that depends on the position alone.

`token = argmax(log p + g)` with Gumbel noise g from a stateless hash of (seed, choice, absolute
position, token id). Whoever computes the same logits at the same position draws the same token, in any
process and on any device: this is what makes speculative output equal plain sampling.

Knows logits and token counts; nothing of trees, models or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SIGN32 = -(1 << 31)
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Tokens this close to the best, nats, are the first to be given noise.
_NEAR = 5.0
_NUCLEUS_CANDIDATES = 1024
# Below it logits divided by the temperature overflow; such a request means greedy decoding.
LEAST_TEMPERATURE = 1e-3


class InvalidLogits(ArithmeticError):
    """The best of a position's logits is no finite number, so no token can be decided there."""


@dataclass(frozen=True)
class SamplingParams:
    """How the target's next token is chosen.

    Temperature 0 is greedy decoding; other values begin at `LEAST_TEMPERATURE`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # unsigned 64 bits
    choice: int = 0  # index among the choices of one request; each has its own noise

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the history of generated tokens changes the distribution."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _splitmix64(x: int) -> int:
    """One round of SplitMix64 (Steele et al. 2014), on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    """The int32 with the lowest 32 bits of `x`."""
    return (x & 0x7FFFFFFF) - (x & 0x80000000)


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser with low bias, in place on int32; a mask makes each shift a logical one."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _hash32(seed: int, choice: int, position: int, token_ids: Tensor) -> Tensor:
    """[n] int32, to be read as unsigned: 32 random bits for each of `token_ids` [n]."""
    key = _splitmix64(_splitmix64(_splitmix64(seed & _MASK64) ^ choice) ^ position)
    hashed = _mix32(token_ids.to(torch.int32) ^ _signed32(key))
    hashed ^= _signed32(key >> 32)
    return _mix32(hashed)


def _gumbel(hashed: Tensor) -> Tensor:
    """Standard Gumbel noise [n] float64, increasing in the unsigned value of `hashed`."""
    uniform = (hashed.long() & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def _may_exceed(hashed: Tensor, noise: float) -> Tensor:
    """[n] bool: false where the noise of `hashed` is certainly below `noise`."""
    uniform = math.exp(-math.exp(-noise))
    least = min(max(math.floor(uniform * 2.0**32) - 2, 0), (1 << 32) - 1)
    return (hashed ^ _SIGN32) >= least + _SIGN32


def gumbel_noise(seed: int, choice: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for `token_ids` at one absolute position.

    The integer hash gives the same bits on every device. Args: token_ids [n] int64. Returns [n] float64.
    """
    return _gumbel(_hash32(seed, choice, position, token_ids))


def shape_logits(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> Tensor:
    """Penalties, temperature, top-k and top-p, in this order; excluded tokens get -inf.

    Args: logits [V], any float type; counts: how often each token was generated so far (the prompt does
    not count). Returns [V] float32, unnormalised log-probabilities. At temperature 0 only penalties apply.
    Tokens that tie with the last one kept are kept too, so the result does not depend on a sort's order.
    """
    shaped = logits.float()
    if params.penalised and counts:
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=torch.float32)
        penalty = params.frequency_penalty * times + params.presence_penalty
        shaped = shaped.index_add(0, ids, penalty, alpha=-1.0)
    if params.greedy:
        return shaped
    shaped = shaped / params.temperature
    if 0 < params.top_k < shaped.numel():
        edge = shaped.topk(params.top_k).values[-1]
        shaped = shaped.masked_fill(shaped < edge, -math.inf)
    if params.top_p < 1.0:
        shaped = shaped.masked_fill(shaped < _nucleus_edge(shaped, params.top_p), -math.inf)
    return shaped


def _nucleus_edge(shaped: Tensor, top_p: float) -> Tensor:
    """The smallest log-weight in the nucleus: the fewest best tokens whose mass reaches `top_p`."""
    total = shaped.logsumexp(0)
    for candidates in (min(_NUCLEUS_CANDIDATES, shaped.numel()), shaped.numel()):
        best = shaped.topk(candidates).values
        mass = (best - total).exp().cumsum(0)
        if candidates == shaped.numel() or mass[-1] >= top_p:
            break
    inside = int((mass < top_p).sum())
    return best[min(inside, candidates - 1)]


def first_argmax(values: Tensor, largest: Tensor | None = None) -> int:
    """Index of the largest value, if known already; the lowest index among equals, on every device."""
    largest = values.max() if largest is None else largest
    return int((values == largest).nonzero()[0, 0])


def sample(logits: Tensor, params: SamplingParams, position: int, counts: Mapping[int, int]) -> int:
    """The token the target decides at absolute `position`.

    Args: logits [V]; counts: generated tokens on the way here. Ties go to the lowest token id.
    Raises InvalidLogits.
    """
    shaped = shape_logits(logits, params, counts)
    best = shaped.max()  # NaN if any logit is
    if not math.isfinite(best):
        raise InvalidLogits(f"the best logit at position {position} is {best:g}: has the target overflowed?")
    if params.greedy:
        return first_argmax(shaped, best)
    hashed = _hash32(
        params.seed,
        params.choice,
        position,
        torch.arange(shaped.numel(), dtype=torch.int32, device=shaped.device),
    )
    likely = shaped >= (edge := best - _NEAR)
    near = likely.nonzero()[:, 0]
    lead = (shaped[near].double() + _gumbel(hashed[near])).max()
    # Of the others few have noise enough to pass the leader; leaving the rest out changes nothing.
    candidates = (likely | _may_exceed(hashed, float(lead - edge))).nonzero()[:, 0]
    return int(candidates[first_argmax(shaped[candidates].double() + _gumbel(hashed[candidates]))])
