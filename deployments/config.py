"""The arguments of the applications in serve_config.yaml, typed once. Units are in the names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from taps.adaptive import ADAPTIVE
from taps.composing import STRATEGIES
from taps.drafting.drafter import DRAFT_LEN, MOST_DEPTH, MOST_NODES, MOST_TOP_K, RESERVED_ROWS, Ask
from taps.engine.scheduling import MAX_LEN, MAX_SESSIONS, StepBudget
from taps.models.embedded import EMBEDDED

_PROJECT = Path(__file__).resolve().parent.parent

STRATEGY_NAMES = (ADAPTIVE, *STRATEGIES)
DTypeName = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1)]
NumNodes = Annotated[int, Field(ge=1, le=MOST_NODES)]
Depth = Annotated[int, Field(ge=1, le=MOST_DEPTH)]
PositiveMilliseconds = Annotated[float, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0)]
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/]+)$")]  # as browsers send it: no path


class Args(BaseModel):
    """Unknown names are errors: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TargetArgs(Args):
    """Which target is served, and how it is loaded."""

    path: str = EMBEDDED  # "embedded", a local directory or a Hugging Face id
    dtype: DTypeName = "bfloat16"
    device_map: str | None = None  # accelerate's; "auto" uses all GPUs of the replica


class VerifierArgs(Args):
    max_sessions: PositiveInt = MAX_SESSIONS  # the deployment's max_ongoing_requests must not exceed it
    max_len: PositiveInt = MAX_LEN  # cache positions per session
    prefill_tokens: PositiveInt = StepBudget.prefill_tokens  # prompt tokens per step, over all sessions
    tree_nodes: Annotated[int, Field(ge=0)] = StepBudget.tree_nodes  # drafted nodes per step, over all sessions
    longest_step_ms: PositiveMilliseconds = 1e3 * StepBudget.longest_step_s  # that prompts make others wait
    cache_tokens: PositiveInt | None = None  # positions of all sessions together; None: max_sessions * max_len
    overcommit: Annotated[float, Field(ge=1)] = 1.0  # promised of cache_tokens; above 1 sessions may be paused
    torch_threads: PositiveInt = 2

    @model_validator(mode="after")
    def _holds_a_prompt(self) -> VerifierArgs:
        if self.cache_tokens is not None and self.cache_tokens < self.max_len:
            raise ValueError(f"cache_tokens {self.cache_tokens} holds no session of max_len {self.max_len}")
        if self.max_len <= self.tree_nodes + 1:
            raise ValueError(f"max_len {self.max_len} leaves no room beside tree_nodes {self.tree_nodes}")
        return self


class TreeArgs(Args):
    """The trees the router asks for where a request does not say."""

    strategy: str = ADAPTIVE
    num_nodes: NumNodes = Ask.num_nodes  # with the root
    depth: Depth = Ask.depth  # extensions after the root's children
    top_k: Annotated[int, Field(ge=1, le=MOST_TOP_K)] = Ask.top_k
    coupled: bool = True  # sampled requests: rank drafts by the noise the target will use

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in STRATEGY_NAMES:
            raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGY_NAMES)}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> TreeArgs:
        if self.depth * self.top_k > RESERVED_ROWS:
            raise ValueError(f"depth * top_k is {self.depth * self.top_k}, the most is {RESERVED_ROWS}")
        return self


class NgramArgs(Args):
    """A drafter that needs no model: what followed the newest tokens the last time.

    It drafts in the router, and in the verifier while that decodes plainly.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)] = "ngram"
    max_ngram: Annotated[int, Field(ge=1, le=16)] = 4  # tokens that are looked up, the most of them first
    min_ngram: Annotated[int, Field(ge=1, le=16)] = 2


class RouterArgs(Args):
    model_name: str = "SmolLM2-135M-Instruct"  # what /v1/models and requests call the target
    tree: TreeArgs = TreeArgs()
    drafters: list[str] | None = None  # these first, then all others by name; `single` takes the first
    ngram: NgramArgs | None = None
    feature_window: PositiveInt = 512  # newest features a drafter starts from, positions
    propose_deadline_s: PositiveSeconds = 0.5  # waiting for drafters, per step
    propose_patience: Annotated[float, Field(gt=0)] = 2.0  # the same, in durations of the last verify pass
    verify_deadline_s: PositiveSeconds = 60.0  # without a sign of life of a replica that owes an answer
    lease_deadline_s: PositiveSeconds = 60.0  # waiting for a free session
    request_deadline_s: PositiveSeconds = 600.0
    discovery_interval_s: PositiveSeconds = 2.0
    start_deadline_s: PositiveSeconds = 1800.0  # waiting for the first verifier, which loads the target
    max_body_bytes: PositiveInt = 8 << 20  # of a request; the longest context as escaped text takes about one
    cors_origins: list[Origin] = ["*"]  # whose scripts may call in a browser, without credentials; [] is none


class CoreArgs(Args):
    """The core application: router and verifier."""

    target: TargetArgs = TargetArgs()
    verifier: VerifierArgs = VerifierArgs()
    router: RouterArgs = RouterArgs()


class SpecialistArgs(Args):
    """One specialist application."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    kind: Literal["eagle", "ngram"] = "eagle"  # "eagle" loads EAGLE-2 and HASS heads alike
    head: str | None = None  # a directory (relative ones from the project) or a Hugging Face id
    target: str = EMBEDDED  # the target the head drafts for
    dtype: DTypeName = "bfloat16"
    device: str = "cpu"
    max_sessions: PositiveInt = MAX_SESSIONS
    max_len: Annotated[int, Field(gt=2 * RESERVED_ROWS)] = DRAFT_LEN  # more than the verifier's max_len
    torch_threads: PositiveInt | None = None  # None: 2 where the CPU kernel drafts, else 1

    @model_validator(mode="after")
    def _has_a_head(self) -> SpecialistArgs:
        if (self.head is None) == (self.kind == "eagle"):
            raise ValueError("an eagle specialist needs `head`, an ngram one takes none")
        unused = {"target", "dtype", "device", "max_sessions", "max_len"} & self.model_fields_set
        if self.kind == "ngram" and unused:
            raise ValueError(f"an ngram specialist has no model: leave out {', '.join(sorted(unused))}")
        return self


def torch_dtype(name: DTypeName) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def locate(path_or_id: str) -> str:
    """A relative directory that exists below the project as an absolute one; anything else as it is.

    Serve replicas do not run in the directory `serve run` was called in.
    """
    inside = shipped(path_or_id)
    return str(inside) if inside.is_dir() else path_or_id


def shipped(name: str) -> Path:
    """What comes with the project: beside the code in a checkout, else where it is installed."""
    places = (_PROJECT / name, Path(sys.prefix) / "share" / "taps" / name)
    return next((place for place in places if place.exists()), places[0])
