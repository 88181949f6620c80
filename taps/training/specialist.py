"""From prompts to a specialist directory: answers, training, checkpoint. What `taps train` does."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer

from taps import __version__
from taps.delivery import end_tokens
from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.local import in_process
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_head, load_target_ends, save_head, target_fingerprint, weights_digest
from taps.models.draft_head import DraftHead, draft_config
from taps.models.embedded import target_path
from taps.scheduling import StepBudget
from taps.target import Target
from taps.threads import computing_with
from taps.training.answers import (
    AnswerRecipe,
    AnswerRecorder,
    is_complete,
    refuse_other_answers,
    refuse_other_target,
)
from taps.training.batches import Answers, RecordedData, draft_vocabulary
from taps.training.features import TargetFeatures
from taps.training.sources import Prompt, load_prompts
from taps.training.trainer import Trainer, TrainRecipe
from taps.training.validation import Validation

_GENERATION_TIMEOUT = timedelta(days=7)
_TREE = Ask(num_nodes=8, depth=3, top_k=3)  # of speculative generation
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


def answer_sources(
    sources: str, target: str, work: Path, recipe: AnswerRecipe, heads: Sequence[str] = ()
) -> list[Answers]:
    """The target's answers to the prompts of `sources`, kept in `work`; those there are not generated again.

    Args: heads: draft heads to generate with, directories or Hugging Face ids; none is plain decoding.
    """
    prompts = load_prompts(sources, recipe.seed)
    # The other processes wait while the first one generates.
    state = PartialState(timeout=_GENERATION_TIMEOUT)
    with state.main_process_first():
        if state.is_main_process:
            answer_prompts(target_path(target), prompts, work, recipe, heads)
    return [Answers(work, recipe.answer_tokens, tuple(prompt.id for prompt in prompts))]


def refuse_unfit_start(plan: SpecialistPlan) -> None:
    """Raise `InvalidCheckpoint` where `plan.init` cannot be started from, before answers are generated."""
    if plan.init is not None:
        with computing_with(1):
            load_head(plan.init, target_path(plan.target), torch.float32)


def answer_prompts(
    target: str, prompts: Sequence[Prompt], work: Path, recipe: AnswerRecipe, heads: Sequence[str] = ()
) -> None:
    """Record the target's answers to `prompts` into `work`, up to `recipe.answer_tokens` in all.

    Raises `InvalidData` when `work` holds answers of another target, made otherwise, or to other prompts with
    the same ids. Answers to prompts with other ids may be there, and do not count.
    """
    with computing_with(1) as num_threads:
        tokenizer = AutoTokenizer.from_pretrained(target)
        made_by = target_fingerprint(target)
        refuse_other_answers(work, made_by, tokenizer, prompts, recipe)
        if is_complete(work, tokenizer, prompts, recipe):
            return
        model = _load_target(target)
        budget = StepBudget(prefill_tokens=512, tree_nodes=recipe.sessions * _TREE.num_nodes if heads else 0)
        longest = recipe.max_prompt_tokens + recipe.max_new_tokens + budget.tree_nodes + 1
        loaded = [load_head(name, target, model.dtype).to(model.device) for name in heads]
        named = zip(heads, (EagleDrafter(head, recipe.sessions) for head in loaded), strict=True)
        engine = Target(model, recipe.sessions, longest, budget)
        with in_process(engine, named, num_threads) as (verifier, drafters):
            ends = end_tokens(target, tokenizer)
            AnswerRecorder(verifier, tokenizer, work, recipe, ends, drafters, _TREE, made_by).run(prompts)


def _load_target(target: str) -> CausalLM:
    """On a GPU where there is one, in its precision; else on the CPU."""
    if torch.cuda.is_available():
        return CausalLM.load(target, torch.bfloat16, str(PartialState().device))
    return CausalLM.load(target, torch.float32)


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
    data = RecordedData(answers, None if kept else TargetFeatures(_load_target(path)))
    head = _new_head(plan, path, draft_vocabulary(rows, plan.training.draft_vocab, _vocab_size(path)), data)
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


def _vocab_size(target: str) -> int:
    size: int = AutoConfig.from_pretrained(target).get_text_config().vocab_size
    return size


def _new_head(
    plan: SpecialistPlan, target: str, vocabulary: torch.Tensor | None, data: RecordedData
) -> DraftHead:
    """A head with fresh weights, or with those of `plan.init`, that drafts from `vocabulary`."""
    torch.manual_seed(plan.training.seed)
    embeddings, lm_head = load_target_ends(target)
    if plan.init is None:
        config = draft_config(AutoConfig.from_pretrained(target))
        head = DraftHead(config, embeddings.float(), lm_head.float(), vocabulary)
        head.fit_inputs(data.pairs(_PAIRS_PER_INPUT * head.fc.in_features))
        return head
    start = load_head(plan.init, target, torch.float32)
    weights = start.trained()
    head = DraftHead(
        start.config, start.embeddings, lm_head.float(), vocabulary,
        fc_bias="fc.bias" in weights, input_norm="layers.0.input_layernorm.weight" in weights,
    )  # fmt: skip
    head.load_state_dict(weights, strict=False)
    return head


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
