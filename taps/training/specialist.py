"""From prompts to a specialist directory: answers, training, checkpoint. What `taps train` does."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from taps import __version__
from taps.engine.threads import computing_with
from taps.models.checkpoint_files import in_a_line
from taps.models.checkpoints import (
    InvalidCheckpoint,
    load_head,
    load_target_ends,
    save_head,
    target_fingerprint,
    weights_digest,
)
from taps.models.draft_head import DraftHead, draft_config
from taps.models.embedded import target_path
from taps.models.pretrained import load_config
from taps.recording.answers import Answers, refuse_other_target
from taps.recording.features import TargetFeatures
from taps.recording.recorder import load_target
from taps.training.data import RecordedData, draft_vocabulary
from taps.training.trainer import Trainer, TrainRecipe
from taps.training.validation import Validation

_PAIRS_PER_INPUT = 50  # that the line a fresh head begins with is drawn through


@dataclass(frozen=True)
class SpecialistPlan:
    """A specialist to train."""

    domain: str
    target: str  # "embedded", a local directory or a Hugging Face id
    out: Path  # where the head goes
    state: Path  # where training is resumed from
    training: TrainRecipe
    init: str | None = None  # a head to start from


def refuse_unfit_start(plan: SpecialistPlan) -> None:
    """Raise `InvalidCheckpoint` where a head cannot be started as planned, before answers are generated."""
    target = target_path(plan.target)
    with computing_with(1):
        if plan.init is None:
            _fresh_config(target)
        else:
            load_head(plan.init, target, torch.float32)


def train_specialist(plan: SpecialistPlan, answers: Sequence[Answers], provenance: Mapping[str, Any]) -> None:
    """Train a head on recorded answers and write it, with its card, to `plan.out`.

    Raises `InvalidData`, `InvalidState`, `InvalidCheckpoint`, `UnservableTarget`.
    """
    path = target_path(plan.target)
    made_by = target_fingerprint(path)
    for part in answers:
        refuse_other_target(part.directory, made_by)
    rows = [row for part in answers for row in part.rows()]
    kept = all(row.has_features for row in rows)
    data = RecordedData(answers, None if kept else TargetFeatures(load_target(path)))
    vocab_size = load_target_ends(path)[0].shape[0]
    head = _new_head(plan, path, draft_vocabulary(rows, plan.training.draft_vocab, vocab_size), data)
    weights = sum(p.numel() for p in head.parameters() if p.requires_grad)
    print(f"training {plan.domain}: {weights:,} weights, {data.num_answer_tokens:,} answer tokens", flush=True)
    identity = {
        "target": made_by,
        "init": plan.init and weights_digest(plan.init),
        "draft_vocab": zlib.crc32(head.draft_vocab.numpy().tobytes()),
    }
    measured = Trainer(head, data, plan.training, plan.state, identity).run()
    if PartialState().is_main_process:
        made = _provenance(plan, data, measured) | dict(provenance)
        save_head(head, plan.out, made, torch.bfloat16)
        (plan.out / "README.md").write_text(card(made))
        print(_next_steps(plan), flush=True)


def _fresh_config(target: str) -> LlamaConfig:
    config = load_config(target)
    try:
        return draft_config(config)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise InvalidCheckpoint(
            f"no head can be made for the target {target!r}, by its config.json: {in_a_line(error)}"
        ) from error


def _new_head(
    plan: SpecialistPlan, target: str, vocabulary: torch.Tensor | None, data: RecordedData
) -> DraftHead:
    """A head with fresh weights, or with those of `plan.init`, that drafts from `vocabulary`."""
    torch.manual_seed(plan.training.seed)
    embeddings, lm_head = load_target_ends(target)
    if plan.init is None:
        head = DraftHead(_fresh_config(target), embeddings.float(), lm_head.float(), vocabulary)
        head.fit_inputs(data.pairs(_PAIRS_PER_INPUT * head.fc.in_features))
        return head
    start = load_head(plan.init, target, torch.float32)
    return start.remade(start.trained(), lm_head.float(), vocabulary)


def _provenance(plan: SpecialistPlan, data: RecordedData, measured: Validation | None) -> dict[str, Any]:
    return {
        "domain": plan.domain,
        "target": plan.target,
        "init": plan.init,
        "conversations": len(data.training),
        "answer_tokens": data.num_answer_tokens,
        "training": asdict(plan.training),
        "held_out": None if measured is None else measured._asdict(),
        "made_with": {"taps": __version__, "torch": torch.__version__, "machine": platform.machine()},
    }


def _next_steps(plan: SpecialistPlan) -> str:
    target = "" if plan.target == "embedded" else f", target: {plan.target}"
    return (
        f"saved {plan.out}. To serve it, add this to the applications of serve_config.yaml and run "
        "`RAY_AUTH_MODE=token serve deploy serve_config.yaml`:\n\n"
        f"  - name: {plan.domain}\n"
        "    route_prefix: null\n"
        "    import_path: deployments.app:specialist\n"
        f"    args: {{name: {plan.domain}, head: {plan.out}{target}}}\n"
        "    deployments:\n"
        "      - name: Drafter\n"
        "        max_ongoing_requests: 16\n"
        "        ray_actor_options: {num_cpus: 0.2}\n"
    )


def card(provenance: Mapping[str, Any]) -> str:
    """A specialist's card: what it was trained on, how, and what that came to, in Markdown."""
    training, measured = provenance["training"], provenance["held_out"]
    rows = {
        "target": f"`{provenance['target']}`",
        "prompts": provenance.get("prompts"),
        "answers": f"the target's own, {provenance['answer_tokens']:,} tokens, "
        f"{provenance['conversations']:,} conversations",
        "recipe": f"{training['method']}, {training['epochs']} epochs"
        + (f", from `{provenance['init']}`" if provenance["init"] else ""),
        "optimizer": f"AdamW, learning rate {training['learning_rate']:g}, "
        f"batch {training['batch_size'] * training['accumulation']}",
        "held-out accuracy by depth": measured and ", ".join(f"{a:.3f}" for a in measured["accuracy"]),
        "held-out acceptance length, chains": measured and f"{measured['acceptance_length']:.2f}",
        "made with": f"taps {provenance['made_with']['taps']}, torch {provenance['made_with']['torch']}",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    title = f"# Specialist: {provenance['domain']}"
    return f"{title}\n\nA draft head in the EAGLE layout.\n\n| | |\n|---|---|\n{table}"
