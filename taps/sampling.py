"""From logits to a token: sampling by noise that depends on the position alone.

`token = argmax(log p + g)` with Gumbel noise g from a stateless hash of (seed, choice, absolute
position, token id). Whoever computes the same logits at the same position draws the same token, in any
process and on any device: this is what makes speculative output equal plain sampling.

Many rows are decided at once, each as if it were alone: no operation here adds up along a row in an order
that depends on the other rows or on the threads. Knows logits and token counts; nothing of trees, models
or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from taps.shaping import SamplingParams, adjusted, pick, shape_rows, take

_MASK64 = 0xFFFFFFFFFFFFFFFF
_LONG_BLOCK = 512  # whose best alone is looked for, which takes half the time of short ones
_BLOCK = 64  # tokens that are looked at one by one only if the best of them matters
_CACHED = 1 << 17  # elements that a core computes on without waiting for memory
_LOG2_E = 1 / math.log(2)


class InvalidLogits(ArithmeticError):
    """The best of a position's logits is no finite number, so no token can be decided there."""


def _splitmix64(x: int) -> int:
    """One round of SplitMix64 (Steele et al. 2014), on Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    """The int32 with the lowest 32 bits of `x`."""
    return (x & 0x7FFFFFFF) - (x & 0x80000000)


def _fold(x: int) -> int:
    """The lowest 32 bits of `x`, signed, their upper half xored into the lower one."""
    return _signed32(x ^ ((x & 0xFFFFFFFF) >> 16))


def _fold_(x: Tensor) -> Tensor:
    """`_fold` in place on int32; the mask makes the shift a logical one."""
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _halves(params: Sequence[SamplingParams], positions: Sequence[int]) -> list[list[int]]:
    """[2][n] signed 32 bits: what each row's hash starts from, and what it takes in halfway; both folded.

    Args: params [n]; positions [n], absolute.
    """
    keys = [
        _splitmix64(_splitmix64(_splitmix64(p.seed & _MASK64) ^ p.choice) ^ position)
        for p, position in zip(params, positions, strict=True)
    ]
    return [[_fold(key) for key in keys], [_fold(key >> 32) for key in keys]]


def noise_keys(params: Sequence[SamplingParams], positions: Sequence[int], device: torch.device) -> Tensor:
    """`_halves` as [2, n, 1] int32."""
    return torch.tensor(_halves(params, positions), dtype=torch.int32, device=device)[..., None]


def _half_mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """The inner part of a 32-bit finaliser of low bias, in place on int32."""
    x *= 0x7FEB352D
    x ^= torch.bitwise_right_shift(x, 15, out=scratch).bitwise_and_(0x1FFFF)
    x *= _signed32(0x846CA68B)
    return x


def _hash_but_folded(keys: Tensor, token_ids: Tensor) -> Tensor:
    """[n, m] int32: random bits for each row and token; to be folded, then to be read as unsigned.

    The hash is fold, half mix, fold, xor with the second key, fold, half mix, fold. Folding distributes
    over xor and undoes itself: with folded keys and ids two folds are left out here, and the last one
    changes the lower 16 bits alone.

    Args: keys [2, n, 1] of `noise_keys`; token_ids [m]. Or both of one length: pairs, [m].
    """
    start, halfway = keys
    hashed = start ^ _fold_(token_ids.to(torch.int32, copy=True))
    scratch = torch.empty_like(hashed)
    _half_mix_(hashed, scratch)
    hashed ^= halfway
    return _half_mix_(hashed, scratch)


def _gumbel(hashed: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, increasing in the unsigned value of the folded int32 hash."""
    uniform = (hashed.long() & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def gumbel_rows(params: Sequence[SamplingParams], positions: Sequence[int], token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for `token_ids` in every row, of its seed and choice and at its position.

    The integer hash gives the same bits on every device. Args: params [n]; positions [n], absolute;
    token_ids [m], any integers. Returns [n, m] float64.
    """
    keys = noise_keys(params, positions, token_ids.device)
    return _gumbel(_fold_(_hash_but_folded(keys, token_ids)))


def draft_noise(params: Sequence[SamplingParams], positions: Sequence[int], token_ids: Tensor) -> Tensor:
    """`gumbel_rows` in float32, within 1e-5 where it is large: at a fraction of the cost, for drafts."""
    keys = noise_keys(params, positions, token_ids.device)
    # 1 - u, whose digits float32 keeps where noise is large: there u rounds to 1.
    complement = (~_fold_(_hash_but_folded(keys, token_ids))).long().bitwise_and_(0xFFFFFFFF)
    return complement.float().add_(0.5).mul_(-(2.0**-32)).log1p_().neg_().log_().neg_()


def gumbel_noise(seed: int, choice: int, position: int, token_ids: Tensor) -> Tensor:
    """`gumbel_rows` of one row. Args: token_ids [m] int64. Returns [m] float64."""
    return gumbel_rows([SamplingParams(seed=seed, choice=choice)], [position], token_ids)[0]


class Race(Protocol):
    """Decides rows, each by its best logit or by the best sum of logit and noise (`_find_drawn`)."""

    def __call__(
        self, logits: Tensor, temperatures: Sequence[float], keys: Sequence[Sequence[int]], /
    ) -> Sequence[tuple[int, float]]:
        """[n] the token and the best logit over the temperature, which is no finite number where none can be.

        Args: logits [n, V], contiguous; temperatures [n], 0 for no noise; keys [2][n], `_halves`.
        """
        ...


class _Found(NamedTuple):
    """The tokens that may be the ones decided in some rows, by row and id."""

    best: Tensor  # [n] the best shaped logit of each row; no finite number where no token can be decided
    rows: Tensor  # [c]
    ids: Tensor  # [c]
    scores: Tensor  # [c] the first of the highest in its row wins


def _blocks(values: Tensor, size: int = _BLOCK) -> Tensor:
    """[n, V] as [n, blocks, size], or what divides both."""
    return values.reshape(len(values), -1, math.gcd(values.shape[1], size))


def _find_best(shaped: Tensor) -> _Found:
    """The first of the best tokens of each row."""
    blocks, rows = _blocks(shaped, _LONG_BLOCK), torch.arange(len(shaped), device=shaped.device)
    block = blocks.amax(-1).argmax(-1)  # both times the first of equals
    lane = blocks[rows, block].argmax(-1)
    best = blocks[rows, block, lane]
    return _Found(best, rows, block * blocks.shape[2] + lane, best)


def _find_at_least(values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [c] and columns [c], in order, where values [n, V] reach their row's limit [n, 1]."""
    blocks = _blocks(values)
    row, block = (blocks.amax(-1) >= limits).nonzero().unbind(1)
    at, lane = (blocks[row, block] >= limits[row]).nonzero().unbind(1)
    return row[at], block[at] * blocks.shape[2] + lane


def _find_drawn(shaped: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> _Found:
    """The tokens that come near the best sum of log-weight and noise.

    That sum is highest where E / p is lowest, E = -log u the exponential variate of the noise. From the
    upper 16 bits of the hash, single precision gives an E' with E' <= E < 2.07 (E' + 2 ** -15.4), in bits:
    so what has E' / p above 2.2 times the least (E' + 2 ** -15) / p is not the one. About three tokens of
    a row stay, and these are compared exactly.
    """
    best = shaped.amax(-1, keepdim=True)
    keys = noise_keys(params, positions, shaped.device)
    rows, ids = _near_the_lead(shaped, best, keys)
    scores = shaped[rows, ids].double() + _gumbel(_fold_(_hash_but_folded(keys[:, rows, 0], ids)))
    return _Found(best[:, 0], rows, ids, scores)


def _near_the_lead(shaped: Tensor, best: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [c] and ids [c], in order, that may win."""
    token_ids = torch.arange(shaped.shape[1], dtype=torch.int32, device=shaped.device)
    times, limits = torch.empty_like(shaped), torch.empty_like(best)
    few = max(1, _CACHED // shaped.shape[1]) if shaped.device.type == "cpu" else len(shaped)
    for start in range(0, len(shaped), few):
        part = slice(start, start + few)
        hashed = _hash_but_folded(keys[:, part], token_ids)
        negative = (hashed >> 16).bitwise_and_(0xFFFF).float().add_(1).mul_(2.0**-16).log2_()  # -E'
        # 1 / p, p relative to the best; finite, for 0 * inf is not a number.
        rarity = (best[part] - shaped[part]).mul_(_LOG2_E).clamp_(max=127.0).exp2_()
        torch.mul(negative, rarity, out=times[part])
        limits[part] = negative.sub_(2.0**-15).mul_(rarity).amax(-1, keepdim=True).mul_(2.2)
    return _find_at_least(times, limits)


def sample_rows(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    counts: Sequence[Mapping[int, int]],
    race: Race | None = None,
    excluded: Sequence[Collection[int]] | None = None,
) -> list[int | InvalidLogits]:
    """The token the target decides in each row, or why none can be; no row's answer depends on the others.

    Args: logits [n, V], any float type; params [n]; positions [n], absolute, of the tokens decided;
    counts [n] and excluded [n]: as for `shape_rows`, at the place; race: None is torch's way.
    Ties go to the lowest token id.
    """
    rows = _Rows(logits, params, positions, counts, excluded or [()] * len(params))
    decided = _decided(rows) if race is None else _raced(rows, race)
    return [_token(*decided[row], position) for row, position in enumerate(positions)]


class _Rows(NamedTuple):
    """What `sample_rows` is given."""

    logits: Tensor
    params: Sequence[SamplingParams]
    positions: Sequence[int]
    counts: Sequence[Mapping[int, int]]
    excluded: Sequence[Collection[int]]

    def pick(self, chosen: Sequence[int]) -> _Rows:
        return _Rows(
            take(self.logits, chosen),
            pick(self.params, chosen),
            pick(self.positions, chosen),
            pick(self.counts, chosen),
            pick(self.excluded, chosen),
        )

    def adjusted(self) -> Tensor:
        return adjusted(self.logits, self.params, self.counts, self.excluded)

    def shaped(self) -> Tensor:
        return shape_rows(self.logits, self.params, self.counts, self.excluded)


def _decided(rows: _Rows) -> dict[int, tuple[int, float]]:
    """Of each row the token and the best shaped logit."""
    greedy = [row for row, p in enumerate(rows.params) if p.greedy]
    drawn = [row for row, p in enumerate(rows.params) if not p.greedy]
    found = []
    if greedy:
        found.append(_find_best(rows.pick(greedy).adjusted()))
    if drawn:
        own = rows.pick(drawn)
        found.append(_find_drawn(own.shaped(), own.params, own.positions))
    return dict(zip(greedy + drawn, _winners(found), strict=True))


def _raced(rows: _Rows, race: Race) -> dict[int, tuple[int, float]]:
    """As `_decided`. The temperature of rows in which nothing is cut is left to the race."""
    decided: dict[int, tuple[int, float]] = {}
    for cuts in (False, True):
        chosen = [row for row, p in enumerate(rows.params) if p.cuts is cuts]
        if chosen:
            own = rows.pick(chosen)
            shaped = own.shaped() if cuts else own.adjusted()
            temperatures = [1.0 if cuts else p.temperature for p in own.params]
            found = race(shaped.contiguous(), temperatures, _halves(own.params, own.positions))
            decided |= zip(chosen, found, strict=True)
    return decided


def _winners(found: Sequence[_Found]) -> list[tuple[int, float]]:
    """The winning token and the best logit of each row, one `_Found` after the other; reads the device once."""
    parts = [part for one in found for part in one]
    values = iter(torch.cat([part.double() for part in parts]).tolist() if parts else ())
    winners: list[tuple[int, float]] = []
    for one in found:
        best, rows, ids, scores = (list(islice(values, len(part))) for part in one)
        tokens, leads = [0] * len(best), [-math.inf] * len(best)
        for row, token, score in zip(map(int, rows), map(int, ids), scores, strict=True):
            if score > leads[row]:
                tokens[row], leads[row] = token, score
        winners += zip(tokens, best, strict=True)
    return winners


def _token(winner: int, best: float, position: int) -> int | InvalidLogits:
    if math.isfinite(best):
        return winner
    return InvalidLogits(f"the best logit at position {position} is {best:g}: has the target overflowed?")


def sample(logits: Tensor, params: SamplingParams, position: int, counts: Mapping[int, int]) -> int:
    """`sample_rows` of one row. Args: logits [V]. Raises InvalidLogits."""
    (decided,) = sample_rows(logits[None], [params], [position], [counts])
    if isinstance(decided, InvalidLogits):
        raise decided
    return decided
