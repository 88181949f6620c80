"""From logits to a distribution: what a request asks for, and logits shaped by it.

Many rows are shaped at once, each as if it were alone. Knows logits and token counts; nothing of trees, models
or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

# Ids and log-probabilities [n, k] of the k likeliest in rows [n, V], the likeliest first, and something else.
FindBest: TypeAlias = Callable[[Tensor, int], tuple[Tensor, Tensor, Any]]
_FIRST_LOOK = 256  # best tokens, where most nuclei end
_T = TypeVar("_T")
# Below it logits divided by the temperature overflow; such a request means greedy decoding.
LEAST_TEMPERATURE = 1e-3


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
    min_p: float = 0.0  # share of the likeliest token's probability below which tokens are excluded
    repetition_penalty: float = 1.0  # of tokens that were there before, the prompt's included
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id -> what is added to its logit
    seed: int = 0  # unsigned 64 bits
    choice: int = 0  # index among the choices of one request; each has its own noise

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reshapes(self) -> bool:
        """Whether tokens are chosen by other numbers than the logits, whatever came before."""
        return bool(self.logit_bias) or self.cuts or self.temperature not in (0.0, 1.0)

    @property
    def cuts(self) -> bool:
        """Whether only some of the likeliest tokens may be drawn."""
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the distribution."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repeats_cost

    @property
    def repeats_cost(self) -> bool:
        """Whether the prompt's tokens, too, change the distribution."""
        return self.repetition_penalty != 1.0


def shape_rows(
    logits: Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[Mapping[int, int]],
    excluded: Sequence[Collection[int]] | None = None,
) -> Tensor:
    """Bias, penalties, exclusions, temperature, top-k, top-p and min-p, in this order.

    What is excluded or cut gets -inf. At temperature 0 nothing is cut. Tokens that tie with the last one kept
    are kept too, so the result does not depend on a sort's order.

    Args: logits [n, V], any float type; params [n]; counts [n]: how often each token was generated so far, with
    0 for those of the prompt alone where `repeats_cost`; excluded [n]: tokens that may not come here. Returns
    [n, V] float32, unnormalised log-probabilities; the logits are left alone, or returned where nothing changes
    them.
    """
    shaped = adjusted(logits, params, counts, excluded).float()
    temperatures = [p.temperature or 1.0 for p in params]
    if any(temperature != 1.0 for temperature in temperatures):
        shaped = shaped / _column(temperatures, shaped, torch.float32)
    shaped = _cut(shaped, params, [0 < p.top_k < shaped.shape[1] for p in params], _top_k_edges)
    shaped = _cut(shaped, params, [p.top_p < 1.0 for p in params], _nucleus_edges)
    return _cut(shaped, params, [p.min_p > 0.0 for p in params], _min_p_edges)


def shape_logits(logits: Tensor, params: SamplingParams, counts: Mapping[int, int]) -> Tensor:
    """`shape_rows` of one row. Args: logits [V]. Returns [V] float32."""
    return shape_rows(logits[None], [params], [counts])[0]


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, 1] on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def pick(values: Sequence[_T], chosen: Sequence[int]) -> list[_T]:
    return [values[row] for row in chosen]


def take(rows: Tensor, chosen: Sequence[int]) -> Tensor:
    """The chosen rows; no copy where that is all of them."""
    return rows if len(chosen) == len(rows) else rows[torch.tensor(chosen, device=rows.device)]


def logprobs_of(
    shaped: Tensor, tokens: Sequence[int], num_likeliest: Sequence[int], find_best: FindBest | None = None
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each row: the log-probability of a token, and those of so many likeliest; none of excluded tokens.

    Args: shaped [n, V] of `shape_rows`; tokens [n]; num_likeliest [n]; find_best: None is torch's way.
    """
    most = min(max(*num_likeliest, 1), shaped.shape[1])
    ids, logprobs, _ = (find_best or _find_best)(shaped.contiguous(), most)
    best = shaped.gather(1, ids[:, :1].long())[:, 0]
    chosen = shaped.gather(1, torch.tensor(tokens, device=shaped.device)[:, None])[:, 0]
    own = (chosen - best + logprobs[:, 0]).tolist()
    told = zip(ids.tolist(), logprobs.tolist(), strict=True)
    likeliest = [[pair for pair in zip(*row, strict=True) if pair[1] > -math.inf] for row in told]
    return [(one, tuple(row[:most])) for one, row, most in zip(own, likeliest, num_likeliest, strict=True)]


def _find_best(rows: Tensor, number: int) -> tuple[Tensor, Tensor, None]:
    """Implements `FindBest`."""
    values, ids = rows.log_softmax(-1).topk(number)
    return ids, values, None


class _Places:
    """Some tokens of some rows, with a number each."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._numbers: list[float] = []

    def add(self, row: int, numbers: Mapping[int, float]) -> None:
        self._rows += [row] * len(numbers)
        self._tokens += numbers.keys()
        self._numbers += numbers.values()

    def __bool__(self) -> bool:
        return bool(self._rows)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, tokens and numbers, [c] each."""
        rows, tokens = torch.tensor([self._rows, self._tokens], device=device)
        return rows, tokens, torch.tensor(self._numbers, dtype=torch.float32, device=device)


def adjusted(
    logits: Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[Mapping[int, int]],
    excluded: Sequence[Collection[int]] | None,
) -> Tensor:
    """Bias, penalties and exclusions: single tokens of a row. The logits themselves where there are none."""
    biases, repeated, counted, banned = _Places(), _Places(), _Places(), _Places()
    for row, (p, own) in enumerate(zip(params, counts, strict=True)):
        if p.logit_bias:
            biases.add(row, dict(p.logit_bias))
        if p.repeats_cost:
            repeated.add(row, dict.fromkeys(own, p.repetition_penalty))
        if p.presence_penalty or p.frequency_penalty:
            generated = {token: number for token, number in own.items() if number}
            counted.add(row, {t: -(p.frequency_penalty * n + p.presence_penalty) for t, n in generated.items()})
    for row, tokens in enumerate(excluded or ()):
        banned.add(row, dict.fromkeys(tokens, -math.inf))
    logits = _added(logits, biases)
    if repeated:
        rows, tokens, penalty = repeated.on(logits.device)
        values = logits.float()[rows, tokens]
        lower = torch.where(values > 0, values / penalty, values * penalty)
        logits = logits.float().index_put((rows, tokens), lower)
    return _added(_added(logits, counted), banned)


def _added(logits: Tensor, places: _Places) -> Tensor:
    if not places:
        return logits
    rows, tokens, numbers = places.on(logits.device)
    return logits.float().index_put((rows, tokens), numbers, accumulate=True)


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
    rows = take(shaped, chosen)
    rows = torch.where(rows < edges(rows, pick(params, chosen)), -math.inf, rows)
    if len(chosen) == len(shaped):
        return rows
    return shaped.index_copy(0, torch.tensor(chosen, device=shaped.device), rows)


def _top_k_edges(shaped: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1] the smallest of each row's `top_k` best."""
    best = shaped.topk(max(p.top_k for p in params)).values
    return best.gather(1, _column([p.top_k - 1 for p in params], shaped, torch.int64))


def _min_p_edges(shaped: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[n, 1] the least log-weight that is `min_p` of the best."""
    least = _column([p.min_p for p in params], shaped, torch.float64).log()
    return (shaped.amax(-1, keepdim=True).double() + least).float()


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
