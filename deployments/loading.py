"""From arguments to engine objects. Replicas import this when they start; nothing else needs the engine."""

from __future__ import annotations

from typing import Any

from deployments.config import SpecialistArgs, TargetArgs, VerifierArgs, locate, torch_dtype
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Drafter
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.threads import compute_with
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM, fingerprint
from taps.models.checkpoints import InvalidCheckpoint, load_head, target_fingerprint
from taps.models.embedded import target_path


def load_verifier(target: TargetArgs, args: VerifierArgs) -> tuple[BatchedVerifier, dict[str, Any]]:
    """The verifier, and what the router and its drafters must know of the target."""
    compute_with(1)  # this thread loads, and must not have workers of its own
    path = target_path(locate(target.path))
    model = CausalLM.load(path, torch_dtype(target.dtype), target.device_map)
    budget = StepBudget(args.prefill_tokens, args.tree_nodes)
    verifier = BatchedVerifier(Target(model, args.max_sessions, args.max_len, budget), args.torch_threads)
    return verifier, {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "fingerprint": _fingerprint_of(path, model),
        "max_tokens": verifier.target.max_tokens,
    }


def _fingerprint_of(path: str, model: CausalLM) -> str:
    try:
        return target_fingerprint(path)
    except InvalidCheckpoint:  # no safetensors: no head fits it, but it can be served
        return fingerprint(model.embeddings)


def load_drafter(args: SpecialistArgs) -> tuple[BatchedDrafter, dict[str, Any]]:
    """The drafter; its name and kind, and the fingerprint of the target a head was made for."""
    compute_with(1)
    description: dict[str, Any] = {"name": args.name, "kind": args.kind}
    drafter: Drafter
    if args.head is None:
        drafter = NgramDrafter()
    else:
        target = target_path(locate(args.target))
        head = load_head(locate(args.head), target, torch_dtype(args.dtype))
        description["fingerprint"] = target_fingerprint(target)
        drafter = EagleDrafter(head.to(args.device), args.max_sessions, args.max_len)
    return BatchedDrafter(args.name, drafter, args.torch_threads), description
