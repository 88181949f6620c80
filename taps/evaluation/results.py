"""Result files of `taps eval`: which there are, and their rows. Knows files; nothing of models or claims."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from taps.evaluation.statistics import QuestionCounts

Row = dict[str, Any]
_ORDER = ("mt_bench", "gsm8k", "humaneval", "math_500", "svamp")
# How heads were trained, as their names end; without it they name a row of the study.
ADAPTED = "adapted"  # by HASS, from the mixed head
_RECIPES = ("eagle-2", "hass", ADAPTED)


class InvalidResults(ValueError):
    """Result files that cannot be reported on; the message says which and why."""


class Key(NamedTuple):
    """One result file: a recipe's heads on a benchmark at a temperature."""

    recipe: str
    benchmark: str
    temperature: float


Results = Mapping[Key, dict[str, Any]]


def load_results(directory: Path) -> dict[Key, dict[str, Any]]:
    """Every evaluation in `directory`, in the order tables have. Raises `InvalidResults`."""
    found = _load(directory, "eval")
    if not found:
        raise InvalidResults(f"{directory} holds no eval-*.json; make some with `taps eval --out`")
    return found


def load_live(directory: Path) -> dict[Key, dict[str, Any]]:
    """Every measurement of speed in `directory`; there may be none. Raises `InvalidResults`."""
    return _load(directory, "live")


def _load(directory: Path, kind: str) -> dict[Key, dict[str, Any]]:
    """The files `kind`-*.json, whose trees and lengths of answers have to be the same."""
    found: dict[Key, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Path] = {}
    for path in sorted(directory.glob(f"{kind}-*.json")):
        try:
            result = json.loads(path.read_text())
            plan = result["plan"]
            key = Key(_recipe(result), plan["benchmark"], plan["temperature"])
            shapes[tuple(plan[name] for name in ("num_nodes", "depth", "top_k", "new_tokens"))] = path
            heads = Counter(plain_name(name) for name in result["heads"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidResults(f"{path} is not a result of `taps eval` or `taps bench`: {error!r}") from error
        if twice := [name for name, count in heads.items() if count > 1]:
            raise InvalidResults(f"{path} measures two heads that are both reported as {twice[0]}")
        if key in found:
            raise InvalidResults(f"{path} measures {key} a second time")
        found[key] = result
    if len(shapes) > 1:
        one, other = list(shapes.values())[:2]
        raise InvalidResults(f"{one} and {other} differ in their trees or new tokens: report on them apart")
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _recipe(result: dict[str, Any]) -> str:
    """How the heads that are combined were trained, by their names or else by the method."""
    merged = row_of(result, "merged")
    combined = result["heads"] if merged is None else merged["drafters"]
    ends = {next((r for r in _RECIPES if name.endswith(f"-{r}")), None) for name in combined}
    made = {head["training"]["method"] for head in result["heads"].values() if "training" in head}
    named = sorted(end for end in ends if end is not None)
    return "+".join(named if len(named) == len(ends) else sorted(made))


def _place(key: Key) -> tuple[int, str, float, int, str]:
    recipe, benchmark = _rank(_RECIPES, key.recipe), _rank(_ORDER, key.benchmark)
    return recipe, key.recipe, key.temperature, benchmark, key.benchmark


def _rank(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def row_of(
    result: dict[str, Any], strategy: str, coupled: bool = False, num_nodes: int | None = None
) -> Row | None:
    """The row of a strategy; heads go by their names without the recipe.

    Args: num_nodes: the size of its trees; None is the largest, which comes first in a result.
    """
    for row in result["rows"]:
        wanted = num_nodes is None or row["num_nodes"] == num_nodes
        if plain_name(row["strategy"]) == strategy and row["coupled"] == coupled and wanted:
            found: Row = row
            return found
    return None


def plain_name(strategy: str) -> str:
    for recipe in _RECIPES:
        strategy = strategy.removesuffix(f"-{recipe}")
    return strategy


def counts(row: Row) -> list[QuestionCounts]:
    return [QuestionCounts(*question) for question in row["questions"]]


class Blend(NamedTuple):
    """An average of two heads' weights as it was measured; the heads themselves are its ends."""

    heads: tuple[str, str]
    weight: float  # λ, of the first head
    row: Row


def blends(result: dict[str, Any], coupled: bool = False) -> list[Blend]:
    """Every average in the result, with its two ends where they were measured, by λ."""
    averages = {name: made["averaged"] for name, made in result["heads"].items() if "averaged" in made}
    found: dict[tuple[tuple[str, str], float], Row] = {}
    for name, parts in averages.items():
        first, second = (plain_name(Path(head).name) for head in parts)
        measured = ((plain_name(name), next(iter(parts.values()))), (first, 1.0), (second, 0.0))
        for strategy, weight in measured:
            if (row := row_of(result, strategy, coupled)) is not None:
                found[(first, second), weight] = row
    return [Blend(heads, weight, row) for (heads, weight), row in sorted(found.items(), key=lambda kv: kv[0])]
