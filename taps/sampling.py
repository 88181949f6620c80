"""From logits to a token: shaping, and sampling by noise that depends on the position alone.

`token = argmax(log p + g)` with Gumbel noise g from a stateless hash of (seed, choice, absolute
position, token id). Whoever computes the same logits at the same position draws the same token, in any
process and on any device: this is what makes speculative output equal plain sampling.

Many rows are decided at once, each as if it were alone: no operation here adds up along a row in an order
that depends on the other rows or on the threads. Knows logits and token counts; nothing of trees, models
or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

_MASK64 = 0xFFFFFFFFFFFFFFFF
_FIRST_LOOK = 256  # best tokens, where most nuclei end
_LONG_BLOCK = 512  # whose best alone is looked for, which takes half the time of short ones
_BLOCK = 64  # tokens that are looked at one by one only if the best of them matters
_CACHED = 1 << 17  # elements that a core computes on without waiting for memory
_T = TypeVar("_T")
_LOG2_E = 1 / math.log(2)
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


def _fold(x: int) -> int:
    """The lowest 32 bits of `x`, signed, their upper half xored into the lower one."""
    return _signed32(x ^ ((x & 0xFFFFFFFF) >> 16))


def _fold_(x: Tensor) -> Tensor:
    """`_fold` in place on int32; the mask makes the shift a logical one."""
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def noise_keys(params: Sequence[SamplingParams], positions: Sequence[int], device: torch.device) -> Tensor:
    """[2, n, 1] int32: what each row's hash starts from, and what it takes in halfway; both folded.

    Args: params [n]; positions [n], absolute.
    """
    keys = [
        _splitmix64(_splitmix64(_splitmix64(p.seed & _MASK64) ^ p.choice) ^ position)
        for p, position in zip(params, positions, strict=True)
    ]
    halves = [[_fold(key) for key in keys], [_fold(key >> 32) for key in keys]]
    return torch.tensor(halves, dtype=torch.int32, device=device)[..., None]


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


def shape_rows(logits: Tensor, params: Sequence[SamplingParams], counts: Sequence[Mapping[int, int]]) -> Tensor:
    """Penalties, temperature, top-k and top-p, in this order; excluded tokens get -inf.

    Args: logits [n, V], any float type; params [n]; counts [n]: how often each token was generated so far
    (the prompt does not count). Returns [n, V] float32, unnormalised log-probabilities; the logits are left
    alone, or returned where nothing changes them. At temperature 0 only penalties apply. Tokens that tie
    with the last one kept are kept too, so the result does not depend on a sort's order.
    """
    shaped = _penalised(logits, params, counts).float()
    temperatures = [p.temperature or 1.0 for p in params]
    if any(temperature != 1.0 for temperature in temperatures):
        shaped = shaped / _column(temperatures, shaped, torch.float32)
    shaped = _cut(shaped, params, [0 < p.top_k < shaped.shape[1] for p in params], _top_k_edges)
    return _cut(shaped, params, [p.top_p < 1.0 for p in params], _nucleus_edges)


def shape_logits(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> Tensor:
    """`shape_rows` of one row. Args: logits [V]. Returns [V] float32."""
    return shape_rows(logits[None], [params], [counts])[0]


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, 1] on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _pick(values: Sequence[_T], chosen: Sequence[int]) -> list[_T]:
    return [values[row] for row in chosen]


def _take(rows: Tensor, chosen: Sequence[int]) -> Tensor:
    """The chosen rows; no copy where that is all of them."""
    return rows if len(chosen) == len(rows) else rows[torch.tensor(chosen, device=rows.device)]


def _penalised(logits: Tensor, params: Sequence[SamplingParams], counts: Sequence[Mapping[int, int]]) -> Tensor:
    rows: list[int] = []
    tokens: list[int] = []
    times: list[int] = []
    for row, (p, counted) in enumerate(zip(params, counts, strict=True)):
        if p.penalised:
            rows += [row] * len(counted)
            tokens += counted.keys()
            times += counted.values()
    if not rows:
        return logits
    row, token, number = torch.tensor([rows, tokens, times], device=logits.device)
    frequency = _column([p.frequency_penalty for p in params], logits, torch.float32)[row, 0]
    presence = _column([p.presence_penalty for p in params], logits, torch.float32)[row, 0]
    return logits.float().index_put((row, token), -(frequency * number + presence), accumulate=True)


def _cut(
    shaped: Tensor,
    params: Sequence[SamplingParams],
    wanted: Sequence[bool],
    edges: Callable[[Tensor, Sequence[SamplingParams]], Tensor],
) -> Tensor:
    """Exclude what is below its row's edge, in the rows that want it and are not greedy."""
    chosen = [row for row, p in enumerate(params) if wanted[row] and not p.greedy]
    if not chosen:
        return shaped
    rows = _take(shaped, chosen)
    rows = torch.where(rows < edges(rows, _pick(params, chosen)), -math.inf, rows)
    if len(chosen) == len(shaped):
        return rows
    return shaped.index_copy(0, torch.tensor(chosen, device=shaped.device), rows)


def _top_k_edges(shaped: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1] the smallest of each row's `top_k` best."""
    best = shaped.topk(max(p.top_k for p in params)).values
    return best.gather(1, _column([p.top_k - 1 for p in params], shaped, torch.int64))


def _nucleus_edges(shaped: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1] the smallest log-weight in each nucleus: the fewest best tokens whose mass reaches `top_p`."""
    top_p = _column([p.top_p for p in params], shaped, torch.float64)
    best = shaped.amax(-1, keepdim=True)
    weights = (shaped.double() - best).exp_()  # in float64, or an ulp of an exponential decides
    total = weights.cumsum(-1)[:, -1:]
    look = min(_FIRST_LOOK, shaped.shape[1])
    edges, reached = _edges_among(shaped.topk(look).values, best, top_p * total, look)
    if look == shaped.shape[1] or not len(short := (~reached).nonzero()[:, 0]):
        return edges
    # All tokens lighter than this together are less than the nucleus may lack.
    least = total[short] * (1.0 - top_p[short]) / (2 * shaped.shape[1])
    num_heavy = (weights[short] >= least).sum(-1, keepdim=True).clamp_(min=1)
    heaviest = shaped[short].topk(int(num_heavy.max())).values
    found, _ = _edges_among(heaviest, best[short], (top_p * total)[short], num_heavy)
    return edges.index_copy(0, short, found)


def _edges_among(heaviest: Tensor, best: Tensor, wanted: Tensor, limit: Tensor | int) -> tuple[Tensor, Tensor]:
    """Where the mass of the tokens [n, m], heaviest first, reaches the wanted one [n, 1]; and whether, [n].

    Where it does not, the edge is the last of the row's first `limit`.
    """
    inside = ((heaviest.double() - best).exp_().cumsum(-1) < wanted).sum(-1, keepdim=True)
    edges = heaviest.gather(1, torch.clamp(inside, max=limit - 1))
    return edges, (inside < heaviest.shape[1])[:, 0]


class Race(Protocol):
    """Leaves out the tokens that cannot win; see `_find_drawn`."""

    def __call__(self, shaped: Tensor, best: Tensor, keys: Tensor, /) -> tuple[Tensor, Tensor] | None:
        """Rows [c] and ids [c], in order; None to have it done in torch.

        Args: shaped [n, V] float32; best [n]; keys [2, n] int32, the halves of each row's hash.
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


def _find_drawn(
    shaped: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], race: Race | None
) -> _Found:
    """The tokens that come near the best sum of log-weight and noise.

    That sum is highest where E / p is lowest, E = -log u the exponential variate of the noise. From the
    upper 16 bits of the hash, single precision gives an E' with E' <= E < 2.07 (E' + 2 ** -15.4), in bits:
    so what has E' / p above 2.2 times the least (E' + 2 ** -15) / p is not the one. About three tokens of
    a row stay, and these are compared exactly.
    """
    best = shaped.amax(-1, keepdim=True)
    keys = noise_keys(params, positions, shaped.device)
    found = None if race is None else race(shaped, best[:, 0], keys[..., 0])
    rows, ids = _near_the_lead(shaped, best, keys) if found is None else found
    scores = shaped[rows, ids].double() + _gumbel(_fold_(_hash_but_folded(keys[:, rows, 0], ids)))
    return _Found(best[:, 0], rows, ids, scores)


def _near_the_lead(shaped: Tensor, best: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [c] and ids [c] that may win: implements `Race` in torch."""
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
) -> list[int | InvalidLogits]:
    """The token the target decides in each row, or why none can be; no row's answer depends on the others.

    Args: logits [n, V], any float type; params [n]; positions [n], absolute, of the tokens decided;
    counts [n]: generated tokens on the way there; race: a faster way to leave tokens out. Ties go to the
    lowest token id.
    """
    greedy = [row for row, p in enumerate(params) if p.greedy]
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    found = []
    if greedy:
        shaped = _penalised(_take(logits, greedy), _pick(params, greedy), _pick(counts, greedy))
        found.append(_find_best(shaped))
    if drawn:
        shaped = shape_rows(_take(logits, drawn), _pick(params, drawn), _pick(counts, drawn))
        found.append(_find_drawn(shaped, _pick(params, drawn), _pick(positions, drawn), race))
    decided = dict(zip(greedy + drawn, _winners(found), strict=True))
    return [_token(*decided[row], position) for row, position in enumerate(positions)]


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
