"""From arguments to engine objects. Replicas import this when they start; nothing else needs the engine."""

from __future__ import annotations

from typing import Any

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from deployments.config import SpecialistArgs, TargetArgs, VerifierArgs, locate, torch_dtype
from deployments.descriptions import SpecialistDescription, TargetDescription
from taps.adaptive.lookups import Lookups
from taps.decoding.delivery import end_tokens
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Drafter
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.engine.grammars import Grammars
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.threads import compute_with
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM, fingerprint
from taps.models.checkpoints import InvalidCheckpoint, load_head, target_fingerprint
from taps.models.embedded import target_path

_KERNEL_THREADS = 2


def load_verifier(target: TargetArgs, args: VerifierArgs) -> tuple[BatchedVerifier, TargetDescription]:
    """The verifier, and what the router and its drafters must know of the target."""
    compute_with(1)  # this thread loads, and must not have workers of its own
    path = target_path(locate(target.path))
    model = CausalLM.load(path, torch_dtype(target.dtype), target.device_map)
    budget = StepBudget(args.prefill_tokens, args.tree_nodes, args.longest_step_ms / 1e3)
    served = Target(model, args.max_sessions, args.max_len, budget, args.cache_tokens, args.overcommit)
    made_of = _fingerprint_of(path, model)
    description = TargetDescription(model.vocab_size, made_of, served.max_tokens)

    def make() -> LLTokenizer:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        return from_tokenizer(tokenizer, model.vocab_size, sorted(end_tokens(path, tokenizer)))

    return BatchedVerifier(served, args.torch_threads, Lookups(), Grammars(make)), description


def _fingerprint_of(path: str, model: CausalLM) -> str:
    try:
        return target_fingerprint(path)
    except InvalidCheckpoint:  # no safetensors: no head fits it, but it can be served
        return fingerprint(model.embeddings)


def load_drafter(args: SpecialistArgs) -> tuple[BatchedDrafter, SpecialistDescription]:
    """The drafter, and what the router must know of it."""
    compute_with(1)
    drafter: Drafter = NgramDrafter()
    description = SpecialistDescription(args.name)
    if args.head is not None:
        target = target_path(locate(args.target))
        head = load_head(locate(args.head), target, torch_dtype(args.dtype))
        drafter = eagle = EagleDrafter(head.to(args.device), args.max_sessions, args.max_len)
        description = SpecialistDescription(args.name, target_fingerprint(target), eagle.max_tokens)
    # Drafters that torch computes have one: the teams of several processes would stand in each other's way.
    num_threads = args.torch_threads or (_KERNEL_THREADS if drafter.in_kernel else 1)
    return BatchedDrafter(args.name, drafter, num_threads), description
