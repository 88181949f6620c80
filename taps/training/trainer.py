"""Training a draft head on recorded answers: EAGLE-2 or HASS, on one process or several, resumable exactly.

Every update is a function of the weights and of its number: the batches, the noise and the learning rate of
update n do not depend on what ran before in this process. Knows tensors and recordings; nothing of prompts.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from taps.models.alignment import aligned_passes
from taps.models.draft_head import DraftHead
from taps.recording.batches import Batch
from taps.training.data import RecordedData
from taps.training.losses import DraftLoss, LossWeights, draft_loss
from taps.training.validation import Validation, validate

Method = Literal["eagle-2", "hass"]
_BETAS = (0.9, 0.95)
_SAVE_EVERY = 100  # updates
_VALIDATIONS = 10  # during a run
_SHOW_EVERY_S = 15.0


class InvalidState(ValueError):
    """The saved state of another training run is in the way."""


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained. The defaults are good for a small target on two cores."""

    method: Method = "eagle-2"
    epochs: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 4  # conversations, per process
    accumulation: int = 1  # batches per update
    warmup: float = 0.01  # share of the updates; after it the rate falls to 0 along a line
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    feature_noise: float = 0.0  # uniform in [-x, x] / 2 times 512 / batch length, about as EAGLE; 0: none
    learn_prompts: bool = True  # from the prompts' positions too; EAGLE takes the answers' only
    num_passes: int = 3  # of HASS: drafting steps that are aligned
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    draft_vocab: int | None = 8192  # the most frequent tokens, which it drafts from; None is all of them
    seed: int = 0

    @property
    def passes(self) -> int:
        return self.num_passes if self.method == "hass" else 1

    @property
    def weights(self) -> LossWeights:
        return LossWeights(top_k=1.0) if self.method == "hass" else LossWeights()


PRESETS = {
    "embedded": TrainRecipe(),
    # From a head that drafts well already.
    "adapt": TrainRecipe(method="hass", epochs=2, learning_rate=3e-4),
    # As TAPS trained its heads (2603.27027, section 4).
    "paper": TrainRecipe(
        epochs=20,
        learning_rate=3e-5,
        batch_size=8,
        feature_noise=0.2,
        learn_prompts=False,
        mixed_precision="bf16",
        draft_vocab=None,
    ),
}


class Trainer:
    """Trains a head in place, shows how it goes, and resumes from `state` what was interrupted."""

    def __init__(
        self, head: DraftHead, data: RecordedData, recipe: TrainRecipe, state: Path,
        identity: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Args: identity: what else tells this run from others (JSON): where the weights come from."""
        self._head = head
        self._data = data
        self._recipe = recipe
        self._state = state
        self._accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulation,
            # The buffers are the target's frozen ends, the same everywhere.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        weights = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, betas=_BETAS, weight_decay=recipe.weight_decay)
        self._model, self._optimizer = cast(Any, self._accelerator.prepare(head, optimizer))
        self._epoch = (0, data.epoch(recipe.batch_size, recipe.seed, 0))
        self._per_epoch = len(self._epoch[1])
        self._batches_per_update = recipe.accumulation * self._accelerator.num_processes
        self.num_updates = math.ceil(recipe.epochs * self._per_epoch / self._batches_per_update)
        self._update = 0
        self._identity = {
            "recipe": asdict(recipe), "processes": self._accelerator.num_processes,
            "conversations": len(data.training), "answer_tokens": data.num_answer_tokens,
            "data": data.fingerprint, **(identity or {}),
        }  # fmt: skip

    def run(self) -> Validation | None:
        """Train to the end. How the head then does on held-out answers, if there are any.

        Raises `InvalidState` when the state is of another run.
        """
        self._resume()
        self._head.train()
        started, rows, shown = time.monotonic(), 0, 0.0
        while self._update < self.num_updates:
            loss, counted = self._step()
            rows += counted
            elapsed = time.monotonic() - started
            if elapsed - shown > _SHOW_EVERY_S:
                shown = elapsed
                self._show(loss, rows / elapsed)
            if self._update % _SAVE_EVERY == 0 or self._update == self.num_updates:
                self._save()
            if self._update % max(1, self.num_updates // _VALIDATIONS) == 0:
                self._validate()
        self._head.eval()
        return self._validate()

    def _step(self) -> tuple[DraftLoss, int]:
        """One update. Its last batch's loss, and how many answer tokens it took in this process."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._schedule()
        counted = 0
        for number in range(self._recipe.accumulation):
            first = self._update * self._batches_per_update + number * self._accelerator.num_processes
            index = first + self._accelerator.process_index
            batch = self._batch(index)
            with self._accelerator.accumulate(self._model):
                loss = self._backward(batch, index)
                if self._accelerator.sync_gradients:
                    self._accelerator.clip_grad_norm_(self._model.parameters(), self._recipe.max_grad_norm)
                self._optimizer.step()
                self._optimizer.zero_grad()
            counted += int(batch.answers.sum())
        self._update += 1
        return loss, counted

    def _batch(self, index: int) -> Batch:
        epoch, number = divmod(index, self._per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._data.epoch(self._recipe.batch_size, self._recipe.seed, epoch))
        return self._data.load(self._epoch[1][number]).to(self._accelerator.device)

    def _backward(self, batch: Batch, index: int) -> DraftLoss:
        """Gradients of one batch's loss."""
        learned = batch.known if self._recipe.learn_prompts else batch.answers
        with self._accelerator.autocast():
            features = self._noisy(batch.features, index)
            passes = aligned_passes(self._model, batch.tokens, features, self._recipe.passes)
            predicted = torch.stack([of_pass[learned] for of_pass in passes])
            lm_head = self._head.lm_head.weight
            loss = draft_loss(predicted, batch.labels[learned], lm_head, self._recipe.weights)
        self._accelerator.backward(loss.total)
        return DraftLoss(*(part.detach() for part in loss))

    def _noisy(self, features: Tensor, index: int) -> Tensor:
        if not self._recipe.feature_noise:
            return features
        draw = torch.Generator().manual_seed((self._recipe.seed << 32) + index)
        noise = torch.rand(features.shape, generator=draw).to(features.device) - 0.5
        return features + noise * self._recipe.feature_noise * 512 / features.shape[1]

    def _schedule(self) -> float:
        """A line up, then a line down to 0."""
        warmup = max(1, round(self._recipe.warmup * self.num_updates))
        up = (self._update + 1) / warmup
        down = (self.num_updates - self._update) / max(1, self.num_updates - warmup)
        return float(min(up, down, 1.0))

    def _show(self, loss: DraftLoss, rate: float) -> None:
        if self._accelerator.is_main_process:
            epoch = self._update / self.num_updates * self._recipe.epochs
            print(
                f"epoch {epoch:.2f}/{self._recipe.epochs}, update {self._update}/{self.num_updates}: "
                f"feature loss {loss.feature:.4f}, token loss {loss.token:.3f}, {rate:.0f} tokens/s",
                flush=True,
            )

    def _validate(self) -> Validation | None:
        if not (self._accelerator.is_main_process and self._data.held_out):
            return None
        measured = validate(self._head, self._data)
        print(f"update {self._update}: {measured.line()}", flush=True)
        return measured

    def _save(self) -> None:
        """The state after this update, whole or not at all, in place of older ones."""
        partial, final = self._state / "partial", self._state / f"update-{self._update:08d}"
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()  # each process writes its part
        if self._accelerator.is_main_process:
            (partial / "run.json").write_text(json.dumps(self._identity))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for older in self._saved()[:-1]:
                shutil.rmtree(older)
        self._accelerator.wait_for_everyone()

    def _saved(self) -> list[Path]:
        return sorted(self._state.glob("update-*"))

    def _resume(self) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        if not (saved := self._saved()):
            return
        if json.loads((saved[-1] / "run.json").read_text()) != self._identity:
            raise InvalidState(
                f"{self._state} holds the state of another training run: other data, or other settings. "
                "Remove it, or repeat that run's command to finish it"
            )
        self._accelerator.load_state(str(saved[-1]))
        self._update = int(saved[-1].name.partition("-")[2])
        if self._accelerator.is_main_process:
            print(f"resumed after update {self._update}/{self.num_updates}", flush=True)


def recipe_of(preset: str, **changes: Any) -> TrainRecipe:
    """A preset with changes; those that are None are none."""
    return replace(PRESETS[preset], **{k: v for k, v in changes.items() if v is not None})
