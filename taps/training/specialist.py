"""From prompts to a specialist directory: answers, training, checkpoint. What `taps train` does."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from taps import __version__
from taps.local import LocalVerifier
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_target_ends, save_head
from taps.models.draft_head import DraftHead, draft_config
from taps.models.embedded import target_path
from taps.scheduling import StepBudget
from taps.target import Target
from taps.training.dataset import AnswerRecipe, AnswerRecorder, Prompt, load_prompts, shard_header, shards
from taps.training.trainer import Trainer, TrainRecipe, draft_vocabulary


def train_specialist(
    domain: str, data: Path, out: Path, work: Path, target: str,
    answers: AnswerRecipe, training: TrainRecipe, draft_vocab_size: int,
) -> None:  # fmt: skip
    """Train a head for `target` on the prompts of `data` and write it to `out`.

    Answers are kept in `work` and not generated again. Raises `InvalidData`, `UnservableTarget`.
    """
    path = target_path(target)
    answer_prompts(path, load_prompts(data, answers.seed), work, answers)
    embeddings, lm_head = load_target_ends(path)
    torch.manual_seed(training.seed)
    vocabulary = draft_vocabulary(work, draft_vocab_size, embeddings.shape[0])
    config = draft_config(AutoConfig.from_pretrained(path))
    head = DraftHead(config, embeddings.float(), lm_head.float(), vocabulary)
    print(
        f"training {domain}: {sum(p.numel() for p in head.parameters() if p.requires_grad):,} weights",
        flush=True,
    )
    Trainer(head, work, training).run()
    provenance = _provenance(domain, data, work, target, answers, training)
    save_head(head, out, provenance, torch.bfloat16)
    (out / "README.md").write_text(card(provenance))
    print(f"saved {out}; add it to serve_config.yaml as an application with head: {out}", flush=True)


def answer_prompts(target: str, prompts: Sequence[Prompt], work: Path, recipe: AnswerRecipe) -> None:
    """Record the target's answers into `work`, up to `recipe.answer_tokens` in all."""
    model = CausalLM.load(target, torch.float32)
    longest = recipe.max_prompt_tokens + recipe.max_new_tokens + 1
    budget = StepBudget(prefill_tokens=512, tree_nodes=0)
    verifier = LocalVerifier(Target(model, recipe.batch_size, longest, budget))
    try:
        AnswerRecorder(verifier, AutoTokenizer.from_pretrained(target), work, recipe).run(prompts)
    finally:
        verifier.close()


def _provenance(
    domain: str, data: Path, work: Path, target: str, answers: AnswerRecipe, training: TrainRecipe
) -> dict[str, Any]:
    headers = [shard_header(shard) for shard in shards(work)]
    return {
        "domain": domain,
        "target": target,
        "data": data.name,
        "conversations": sum(len(header["ids"]) for header in headers),
        "answer_tokens": sum(header["answer_tokens"] for header in headers),
        "answers": asdict(answers),
        "training": {"recipe": "eagle-2", **asdict(training)},
        "made_with": {"taps": __version__, "torch": torch.__version__, "machine": platform.machine()},
    }


def card(provenance: Mapping[str, Any]) -> str:
    """A specialist's card: what it was trained on and how, in Markdown."""
    answers, training = provenance["answers"], provenance["training"]
    temperatures = ", ".join(f"{t:g}" for t in answers["temperatures"])
    weights = f"feature loss x {training['feature_weight']:g} + token loss x {training['token_weight']:g}"
    rows = {
        "target": f"`{provenance['target']}`",
        "prompts": f"`{provenance['data']}`, {provenance['conversations']:,} conversations",
        "answers": f"the target's own, {provenance['answer_tokens']:,} tokens, temperature {temperatures}",
        "recipe": f"{training['recipe']}, {training['epochs']} epochs, {weights}",
        "optimizer": f"AdamW, learning rate {training['learning_rate']:g}, batch {training['batch_size']}",
        "made with": f"taps {provenance['made_with']['taps']}, torch {provenance['made_with']['torch']}",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    title = f"# Specialist: {provenance['domain']}"
    return f"{title}\n\nA draft head in the EAGLE layout.\n\n| | |\n|---|---|\n{table}"
