"""What goes over a link: frames of entries in msgpack, with a version. Knows fields alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import msgpack
import torch
from torch import Tensor

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, InvalidAsk
from taps.lookup import Lookup
from taps.models.cache import CacheFull
from taps.peers import PeerGone
from taps.sampling import InvalidLogits
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import InvalidGrammar, PassCost, PromptTooLong, TokenLogprob, Verdict

VERSION = 8
_DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
# Errors that travel by name: the far side raises the same type.
_ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (CacheFull, PromptTooLong, InvalidTree, InvalidLogits, InvalidAsk, InvalidGrammar)
}
_TREE = tuple(f.name for f in fields(ProposalTree))

Message = dict[str, Any]
# What a session's entry is: to a replica the first three, from it the others.
Kind = Literal["open", "ask", "end", "opened", "answer", "error", "ended", "at work"]
Entry = tuple[int, Kind, Message | None]  # session 0 is all of a link


class VersionMismatch(PeerGone):
    """The two ends of a link run different versions of this protocol."""


class BrokenFrame(PeerGone):
    """What came is no frame of this protocol."""


class RemoteError(PeerGone):
    """The far side failed in a way that has no type of its own here."""


def encode(entries: Sequence[Entry]) -> bytes:
    """A frame of these."""
    packed: bytes = msgpack.packb([VERSION, entries])
    return packed


def decode(frame: bytes) -> Sequence[Entry]:
    """Raises `VersionMismatch`, or `BrokenFrame` for what is none."""
    try:
        version, entries = msgpack.unpackb(frame, use_list=False)
    except (ValueError, TypeError) as error:
        raise BrokenFrame(f"a frame cannot be read: {error}") from error
    if version != VERSION:
        raise VersionMismatch(
            f"this process speaks version {VERSION} of the session protocol, the other one {version}: "
            "redeploy the older application"
        )
    found: Sequence[Entry] = entries
    return found


def is_expected(error: Exception) -> bool:
    """Whether the far side knows this kind of error."""
    return type(error) in _ERRORS.values()


def error_message(error: Exception) -> Message:
    return {"type": type(error).__name__, "text": str(error)}


def error_of(message: Mapping[str, str]) -> Exception:
    """The error that the far side had."""
    kind = _ERRORS.get(message["type"])
    return RemoteError(f"{message['type']}: {message['text']}") if kind is None else kind(message["text"])


def from_tensor(tensor: Tensor) -> Message:
    data = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "data": data}


def to_tensor(message: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES[message["dtype"]]
    if not message["data"]:
        return torch.empty(message["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(message["data"]), dtype=dtype).reshape(message["shape"])


def from_verdict(verdict: Verdict) -> Message:
    checked = None if verdict.checked is None else from_tree(verdict.checked)
    return {**vars(verdict), "features": from_tensor(verdict.features), "checked": checked}


def to_verdict(message: Mapping[str, Any]) -> Verdict:
    return Verdict(
        tokens=tuple(message["tokens"]),
        owners=tuple(message["owners"]),
        features=to_tensor(message["features"]),
        num_nodes=message["num_nodes"],
        depth=message["depth"],
        batch_size=message["batch_size"],
        num_passes=message["num_passes"],
        cost=None if message["cost"] is None else PassCost(*message["cost"]),
        num_reused=message["num_reused"],
        logprobs=tuple(TokenLogprob(own, tuple(likeliest)) for own, likeliest in message["logprobs"]),
        checked=None if message["checked"] is None else to_tree(message["checked"]),
    )


def from_prefill(state: SessionState, feature_window: int, tells: bool) -> Message:
    return {"state": asdict(state), "feature_window": feature_window, "tells": tells}


def to_prefill(message: Mapping[str, Any]) -> tuple[SessionState, int, bool]:
    state = dict(message["state"])
    for name in ("tokens", "end_tokens"):
        state[name] = tuple(state[name])
    state["bad_words"] = tuple(map(tuple, state["bad_words"]))
    state["sampling"] = _to_sampling(state["sampling"])
    return SessionState(**state), message["feature_window"], message["tells"]


def from_ahead(window: int, lookup: Lookup | None) -> Message:
    return {"ahead": window, "lookup": None if lookup is None else asdict(lookup)}


def to_ahead(message: Mapping[str, Any]) -> tuple[int, Lookup | None]:
    return message["ahead"], None if message["lookup"] is None else Lookup(**message["lookup"])


def from_propose(delta: ContextDelta, ask: Ask) -> Message:
    return {
        "start": delta.start,
        "tokens": delta.tokens,
        "feature_start": delta.feature_start,
        "features": from_tensor(delta.features),
        "ask": asdict(ask),
    }


def to_propose(message: Mapping[str, Any]) -> tuple[ContextDelta, Ask]:
    delta = ContextDelta(
        message["start"], tuple(message["tokens"]), message["feature_start"], to_tensor(message["features"])
    )
    ask = dict(message["ask"])
    sampling = ask.pop("sampling")
    return delta, Ask(**ask, sampling=None if sampling is None else _to_sampling(sampling))


def _to_sampling(fields: Mapping[str, Any]) -> SamplingParams:
    bias = tuple((token, by) for token, by in fields["logit_bias"])
    return SamplingParams(**{**fields, "logit_bias": bias})


def from_tree(tree: ProposalTree) -> Message:
    return {name: getattr(tree, name) for name in _TREE}


def to_tree(message: Mapping[str, Any]) -> ProposalTree:
    """The tree of a message, checked: it comes from another process."""
    fields = {name: tuple(message[name]) for name in _TREE if name != "calibrated"}
    return ProposalTree(**fields, calibrated=bool(message["calibrated"])).check()
