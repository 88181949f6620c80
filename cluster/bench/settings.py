"""What is compared: ways to ask a server of ours, and other servers. Knows URLs and request bodies.

A setting is a name, a URL and more fields of the request's body, such as {"taps": {"strategy": "off"}}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import httpx

from cluster.bench.load import Ask, Client, minds_proxies
from cluster.bench.streams import Json
from taps.composing import STRATEGIES

PLAIN, ADAPTIVE = "off", "adaptive"
STRATEGY_NAMES = (*STRATEGIES, *(() if ADAPTIVE in STRATEGIES else (ADAPTIVE,)))
_UNKNOWN = (400, 422)  # what servers answer to a field or a value they do not know
_SHORT_S = 30.0  # for a question that costs nothing
Kind = Literal["plain", "fixed", "adaptive", "default", "peer"]


class Unmeasurable(ValueError):
    """A server that cannot be measured; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Setting:
    name: str
    url: str  # without /v1
    kind: Kind
    body: Json = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Server(NamedTuple):
    """What a server says of itself."""

    model: str
    is_ours: bool
    health: Json


class Contender(NamedTuple):
    """A setting that answers, and its client."""

    setting: Setting
    client: Client


def plain_url(url: str) -> str:
    """Without a slash at its end or /v1. Raises `Unmeasurable`."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise Unmeasurable(f"{url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise Unmeasurable(f"{url!r} is not a URL; give one such as http://127.0.0.1:8100")
    return url.rstrip("/").removesuffix("/v1")


async def server_at(url: str, headers: Mapping[str, str] | None = None) -> Server:
    """Raises `httpx.HTTPError` where nothing answers, and `Unmeasurable` of anything but an OpenAI endpoint."""
    async with httpx.AsyncClient(headers=headers, timeout=_SHORT_S, trust_env=minds_proxies(url)) as http:
        answer = await http.get(f"{url}/v1/models")
        try:
            card = answer.json()["data"][0]
            model, is_ours = str(card["id"]), card.get("owned_by") == "taps"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unmeasurable(f"{url}/v1/models names no model (HTTP {answer.status_code})") from error
        return Server(model, is_ours, (await http.get(f"{url}/health")).json() if is_ours else {})


def own_settings(url: str, strategies: Sequence[str], drafters: Sequence[str]) -> list[Setting]:
    """A setting for each strategy; `single` once with each drafter, where there are several."""
    bodies: dict[str, Json] = {}
    for strategy in strategies:
        if strategy == "single" and len(drafters) > 1:
            bodies |= {f"single-{name}": {"strategy": strategy, "drafters": [name]} for name in drafters}
        else:
            bodies[strategy] = {"strategy": strategy}
    return [own_setting(name, url, taps) for name, taps in bodies.items()]


def own_setting(name: str, url: str, taps: Json) -> Setting:
    """Args: taps: the request's `taps`; without a strategy it is the server's own, whichever that is."""
    kinds: dict[str | None, Kind] = {PLAIN: "plain", ADAPTIVE: "adaptive", None: "default"}
    return Setting(name, url, kinds.get(taps.get("strategy"), "fixed"), {"taps": taps})


async def contenders(
    settings: Sequence[Setting], models: Mapping[str, str], timeout_s: float
) -> tuple[list[Contender], dict[str, str]]:
    """Those that answer one token, and what our own server said of those that it does not know.

    Args: models: by setting. Raises `Unmeasurable` of every other failure.
    """
    found, left_out = [], {}
    for setting in settings:
        client = Client(setting.url, models[setting.name], setting.body, setting.headers, timeout_s)
        error, is_unknown = await _probe(client)
        if error is None:
            found.append(Contender(setting, client))
            continue
        await client.close()
        if not is_unknown or setting.kind in ("plain", "peer"):
            for contender in found:
                await contender.client.close()
            raise Unmeasurable(f"{setting.name} at {setting.url} does not answer: {error}")
        left_out[setting.name] = error
    return found, left_out


async def _probe(client: Client) -> tuple[str | None, bool]:
    """What is wrong, if anything is, and whether the server does not know what it is asked for."""
    answer = await client.ask(Ask("probe", [{"role": "user", "content": "Say hello."}], 1, 0.0, 0, "probe"))
    return answer.error, answer.status in _UNKNOWN
