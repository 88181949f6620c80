"""Training: losses by hand, alignment against drafting, batches that keep every token, exact resume."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taps.cli import main
from taps.models.attention import PackedStep, Segment
from taps.models.cache import SlotCache
from taps.models.checkpoints import InvalidCheckpoint, load_head
from taps.models.draft_head import DraftHead
from taps.training import trainer
from taps.training.alignment import aligned_mask, aligned_passes
from taps.training.averaging import average
from taps.training.batches import Answers, RecordedData, collate, draft_vocabulary
from taps.training.losses import DraftLoss, LossWeights, draft_loss, target_distribution
from taps.training.shards import (
    Recording,
    load_row,
    load_shard,
    save_shard,
    shard_header,
    shard_rows,
    shards,
)
from taps.training.trainer import InvalidState, Method, Trainer, TrainRecipe, recipe_of
from taps.training.validation import validate
from tests.conftest import PROJECT
from tests.tiny import HIDDEN, VOCAB, tiny_head


def recording(tokens: Sequence[int], answer_start: int, name: str = "r") -> Recording:
    """Feature i is (i, -i)."""
    positions = torch.arange(len(tokens) - 1, dtype=torch.bfloat16)
    features = torch.stack([positions, -positions], dim=1)
    return Recording(name, torch.tensor(tokens, dtype=torch.int32), answer_start, features)


def saved(directory: Path, *recordings: Recording) -> Path:
    directory.mkdir(exist_ok=True)
    save_shard(directory / f"shard-{len(shards(directory)):05d}.safetensors", recordings)
    return directory


def loss_of(predicted: Tensor, features: Tensor, lm_head: Tensor, weights: LossWeights) -> DraftLoss:
    target = target_distribution(features, lm_head, weights)
    return draft_loss(predicted, features, target, lm_head, weights)


def test_the_loss_of_a_case_worked_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2), so the cross-entropy is ln 2; features differ by ln 3 > 1 and by 0."""
    loss = loss_of(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.eye(2), LossWeights(2.0, 0.5))
    feature = (math.log(3) - 0.5) / 2
    assert float(loss.feature) == pytest.approx(feature)
    assert float(loss.token) == pytest.approx(math.log(2))
    assert float(loss.total) == pytest.approx(2.0 * feature + 0.5 * math.log(2))


def test_the_top_k_loss_of_a_case_worked_by_hand() -> None:
    """p = (4, 2, 1, 1) / 8 and q is even: the two likeliest tokens carry 6/8 of ln 4."""
    features = torch.tensor([[math.log(4), math.log(2), 0.0, 0.0]])
    loss = loss_of(torch.zeros(1, 4), features, torch.eye(4), LossWeights(0.0, 0.0, 3.0, k=2))
    assert float(loss.top_k) == pytest.approx(0.75 * math.log(4))
    assert float(loss.total) == pytest.approx(3 * 0.75 * math.log(4))


def test_small_feature_errors_cost_half_their_square() -> None:
    loss = loss_of(torch.tensor([[0.4, 0.0]]), torch.zeros(1, 2), torch.eye(2), LossWeights(1.0, 0.0))
    assert float(loss.total) == pytest.approx(0.5 * 0.4**2 / 2)


def test_the_perfect_prediction_costs_the_targets_entropy_and_has_no_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    features, lm_head = torch.randn(5, 3, generator=draw), torch.randn(7, 3, generator=draw)
    predicted = features.clone().requires_grad_()
    loss = loss_of(predicted, features, lm_head, LossWeights())
    p = (features @ lm_head.T).softmax(-1)
    assert float(loss.feature.detach()) == 0.0
    assert float(loss.token.detach()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, predicted)
    assert gradient.abs().max() < 1e-6


def test_the_mask_of_a_third_pass_worked_by_hand() -> None:
    """The newest position from this pass, the one before it from the second, older ones from the first."""
    first, second, third = torch.split(aligned_mask(3, 4).int(), 4, dim=1)
    assert first.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert second.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert third.tolist() == torch.eye(4).int().tolist()


def drafted_chain(head: DraftHead, tokens: Tensor, features: Tensor, root: int, depth: int) -> list[Tensor]:
    """Features predicted by drafting the recorded tokens from pair `root` on, pair by pair, as serving does."""
    cache = SlotCache(1, 64)
    slot = cache.acquire()

    def extend(pairs: slice, inputs: Tensor) -> Tensor:
        count = len(inputs)
        step = PackedStep(cache, [Segment(slot, 0, torch.arange(count), None)], inputs.dtype, inputs.device)
        hidden: Tensor = head(tokens[None, pairs], inputs[None], step.positions(), step)[0]
        cache.commit(slot, range(count))
        return hidden[-1]

    chain = [extend(slice(0, root + 1), features[: root + 1])]
    for pair in range(root + 1, root + depth):
        chain.append(extend(slice(pair, pair + 1), chain[-1][None]))
    return chain


def test_an_aligned_pass_sees_exactly_what_drafting_sees() -> None:
    head, depth = tiny_head(), 4
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (1, 9), generator=draw)
    features = torch.randn(1, 9, HIDDEN, generator=draw)
    with torch.no_grad():
        passes = list(aligned_passes(head, tokens, features, depth))
        for root in range(9 - depth + 1):
            chain = drafted_chain(head, tokens[0], features[0], root, depth)
            for j, drafted in enumerate(chain):
                torch.testing.assert_close(passes[j][0, root + j], drafted, atol=1e-5, rtol=1e-4)


def test_recordings_survive_a_shard(tmp_path: Path) -> None:
    saved = [recording([1, 2, 3, 4], 2, "a"), recording([5, 6], 1, "b"), recording([7, 8, 9], 3, "c")]
    save_shard(tmp_path / "shard-00000.safetensors", saved)
    assert shards(tmp_path) == list(tmp_path.iterdir()), "no partial file is left"
    assert shard_header(shards(tmp_path)[0]) == {"target": "", "ids": ["a", "b", "c"], "answer_tokens": 3}
    for before, after in zip(saved, load_shard(shards(tmp_path)[0]), strict=True):
        assert (after.id, after.answer_start) == (before.id, before.answer_start)
        assert torch.equal(after.tokens, before.tokens)
        assert torch.equal(after.features, before.features)
        assert after.features.dtype == torch.bfloat16


def test_a_batch_pairs_each_token_with_the_feature_before_it_and_labels_it_with_the_one_at_it() -> None:
    batch = collate([recording([10, 11, 12, 13, 14], answer_start=3), recording([20, 21, 22], answer_start=1)])
    assert batch.tokens.tolist() == [[11, 12, 13], [21, 0, 0]]
    assert batch.features[..., 0].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.labels[..., 0].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch.labels[..., 1].tolist() == [[-1, -2, -3], [-1, 0, 0]]


def test_only_pairs_that_predict_an_answer_token_count_and_no_padding_does() -> None:
    batch = collate([recording([10, 11, 12, 13, 14], answer_start=3), recording([20, 21, 22], answer_start=1)])
    assert batch.counts.tolist() == [[False, True, True], [True, False, False]]


def test_rows_are_read_by_themselves(tmp_path: Path) -> None:
    recordings = [recording([1, 2, 3, 4], 2, "a"), recording([5, 6], 1, "b"), recording([7, 8, 9], 3, "c")]
    (path,) = shards(saved(tmp_path / "answers", *recordings))
    for row, whole in zip(reversed(shard_rows(path)), reversed(recordings), strict=True):
        alone = load_row(row)
        assert (row.length, row.num_answer_tokens) == (len(whole.tokens), whole.num_answer_tokens)
        assert torch.equal(alone.tokens, whole.tokens)
        assert torch.equal(alone.features, whole.features)


def many(count: int) -> list[Recording]:
    return [recording([9, i, *range(i % 3 + 1)], 1, f"r{i}") for i in range(count)]


def test_an_epoch_takes_every_recording_once_except_those_held_out_or_too_short(tmp_path: Path) -> None:
    directory = saved(tmp_path / "answers", *many(120), recording([9, 999], 1, "short"))
    data = RecordedData([Answers(directory)])
    assert 0 < len(data.held_out) < 12
    epoch = data.epoch(4, seed=0, epoch=0)
    ids = [row.id for batch in epoch for row in batch]
    assert sorted(ids) == sorted({r.id for r in many(120)} - {row.id for row in data.held_out})
    assert max(map(len, epoch)) == 4
    assert epoch == data.epoch(4, 0, 0) != data.epoch(4, 0, 1)


def test_all_answers_to_a_prompt_are_held_out_together(tmp_path: Path) -> None:
    again = [recording([9, 1, 2, 3], 1, f"r{i}#{turn}") for i in range(120) for turn in (1, 2)]
    data = RecordedData([Answers(saved(tmp_path / "answers", *many(120), *again))])
    held_out = {row.id.partition("#")[0] for row in data.held_out}
    assert not held_out & {row.id.partition("#")[0] for row in data.training}


def test_every_part_of_a_mixture_is_held_out_from(tmp_path: Path) -> None:
    parts = [[recording([9, i, 1], 1, f"{part}{i}") for i in range(4000)] for part in "ab"]
    data = RecordedData([Answers(saved(tmp_path / part[0].id, *part)) for part in parts])
    held_out = [row.id for row in data.held_out]
    assert len(held_out) == 48
    assert 16 < sum(name.startswith("a") for name in held_out) < 32
    assert len(data.training) == 8000 - 48, "what is not measured with is trained on"


def test_answers_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    rows = [recording([9, 1, 2], 1, name) for name in ("c", "a#1", "b", "other", "a")]
    answers = Answers(saved(tmp_path / "answers", *rows), prompts=("a", "b", "c"))
    assert [row.id for row in answers.rows()] == ["a", "b", "c", "a#1"]


def test_answers_are_taken_up_to_a_number_of_tokens(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", *many(10)), saved(tmp_path / "other", *many(10))
    rows = [*Answers(one, 7).rows(), *Answers(other).rows()]
    assert [row.id for row in rows[:3]] == ["r0", "r1", "r2"]
    assert [sum(row.num_answer_tokens for row in part) for part in (rows[:-10], rows[-10:])] == [9, 29]


def test_the_draft_vocabulary_is_what_answers_use_most_then_the_lowest_ids(tmp_path: Path) -> None:
    rows = [recording([6, 6, 6, 6, 7, 7, 4], answer_start=4), recording([6, 9, 9, 9], answer_start=1)]
    answers = Answers(saved(tmp_path / "answers", *rows)).rows()
    vocabulary = draft_vocabulary(answers, 5, vocab_size=10)
    assert vocabulary is not None
    assert vocabulary.tolist() == [0, 1, 4, 7, 9]
    assert draft_vocabulary(answers, 10, vocab_size=10) is None


def test_a_fresh_head_sees_tokens_as_well_as_features() -> None:
    head = tiny_head()
    features = 50 * head.embeddings[torch.randint(0, VOCAB, (3, 7))]
    features[0, 4:] = 0.0
    before = head.fc.weight.detach().clone()
    head.balance_inputs(features)
    ratio = head.fc.weight.detach() / before
    assert 40 < float(ratio[:, :HIDDEN].mean()) < 60
    assert torch.equal(ratio[:, HIDDEN:], torch.ones(HIDDEN, HIDDEN))


@pytest.fixture
def data(tmp_path: Path) -> RecordedData:
    """Recordings whose next feature is a fixed map of the last: there is something to learn."""
    draw = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=draw)).Q
    lm_head = tiny_head().lm_head.weight.detach()
    recordings = []
    for i in range(120):
        features = [torch.randn(HIDDEN, generator=draw)]
        for _ in range(8 + i % 5):
            features.append(features[-1] @ turn)
        stacked = torch.stack(features)
        tokens = torch.cat([torch.tensor([1]), (stacked @ lm_head.T).argmax(-1)]).int()
        recordings.append(Recording(f"r{i}", tokens, 2, stacked.to(torch.bfloat16)))
    return RecordedData([Answers(saved(tmp_path / "answers", *recordings))])


def trained(data: RecordedData, state: Path, recipe: TrainRecipe) -> DraftHead:
    head = tiny_head()
    Trainer(head, data, recipe, state).run()
    return head


@pytest.mark.parametrize("method", ["eagle-2", "hass"])
def test_training_drafts_better_and_leaves_the_targets_ends_alone(
    method: Method, data: RecordedData, tmp_path: Path
) -> None:
    recipe = TrainRecipe(method, epochs=12, batch_size=8, learning_rate=0.02)
    before, head = tiny_head(), trained(data, tmp_path / "state", recipe)
    measured = validate(head, data)
    assert measured.acceptance_length > 1.5 * validate(before, data).acceptance_length
    assert measured.accuracy[0] >= measured.accuracy[4]
    assert torch.equal(head.lm_head.weight, before.lm_head.weight)
    assert torch.equal(head.embeddings, before.embeddings)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 3, 4, 14])
def test_an_interrupted_run_ends_at_the_same_weights(
    killed_at: int, data: RecordedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_SAVE_EVERY", 3)
    recipe = TrainRecipe("hass", epochs=2, batch_size=8, accumulation=2, feature_noise=0.1)
    unbroken = trained(data, tmp_path / "unbroken", recipe)
    run = Trainer(tiny_head(), data, recipe, tmp_path / "state")
    assert killed_at < run.num_updates
    step = run._step

    def dies() -> tuple[DraftLoss, int]:
        if run._update == killed_at:
            raise Killed
        return step()

    monkeypatch.setattr(run, "_step", dies)
    with pytest.raises(Killed):
        run.run()
    resumed = trained(data, tmp_path / "state", recipe)
    assert all(torch.equal(w, resumed.trained()[name]) for name, w in unbroken.trained().items())


RESUMABLE = TrainRecipe("hass", epochs=2, batch_size=8, feature_noise=0.1)


def train_until_killed(answers: Path, state: Path, out: Path, dies_after: int | None) -> None:
    """Train in a process of its own, which SIGKILL ends in its `dies_after`-th update from the start."""
    step = Trainer._step

    def dies(self: Trainer) -> tuple[DraftLoss, int]:
        if self._update == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_SAVE_EVERY", 2)
        patch.setattr(Trainer, "_step", dies)
        head = trained(RecordedData([Answers(answers)]), state, RESUMABLE)
    torch.save(head.trained(), out)


def test_a_process_that_is_killed_ends_at_the_same_weights_when_started_again(
    data: RecordedData, tmp_path: Path
) -> None:
    answers, state, out = tmp_path / "answers", tmp_path / "state", tmp_path / "weights.pt"
    unbroken = trained(data, tmp_path / "unbroken", RESUMABLE)
    spawn = multiprocessing.get_context("spawn")
    for dies_after, exit_code in ((5, -signal.SIGKILL), (None, 0)):
        process = spawn.Process(target=train_until_killed, args=(answers, state, out, dies_after))
        process.start()
        process.join(120)
        assert process.exitcode == exit_code
        assert out.exists() == (dies_after is None)
    resumed = torch.load(out, weights_only=True)
    assert all(torch.equal(w, resumed[name]) for name, w in unbroken.trained().items())


def train_as_rank(rank: int, port: int, answers: Path, state: Path, out: Path) -> None:
    """One of two processes that train a head together."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    head = trained(RecordedData([Answers(answers)]), state, RESUMABLE)
    torch.save(head.trained(), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_that_accumulates_two_batches(data: RecordedData, tmp_path: Path) -> None:
    alone = trained(data, tmp_path / "alone", replace(RESUMABLE, accumulation=2))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = (port, tmp_path / "answers", tmp_path / "state", tmp_path)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=train_as_rank, args=(rank, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, weight in alone.trained().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], weight, atol=1e-4, rtol=1e-3)


def test_a_finished_run_is_not_trained_again(data: RecordedData, tmp_path: Path) -> None:
    recipe = TrainRecipe(epochs=1, batch_size=8)
    once = trained(data, tmp_path / "state", recipe)
    again = trained(data, tmp_path / "state", recipe)
    assert all(torch.equal(w, again.trained()[name]) for name, w in once.trained().items())


def test_the_state_of_another_run_is_not_overwritten(data: RecordedData, tmp_path: Path) -> None:
    trained(data, tmp_path / "state", TrainRecipe(epochs=1, batch_size=8))
    with pytest.raises(InvalidState, match="another training run"):
        trained(data, tmp_path / "state", TrainRecipe(epochs=2, batch_size=8))
    with pytest.raises(InvalidState, match="another training run"):
        Trainer(tiny_head(), data, TrainRecipe(epochs=1, batch_size=8), tmp_path / "state", {"init": "x"}).run()


def test_one_command_goes_from_prompts_to_a_specialist(
    tmp_path: Path, target_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}]} for i in range(6)]
    data, out = tmp_path / "prompts.jsonl", tmp_path / "adder"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    command = [
        "train", "--domain", "adder", "--data", str(data), "--out", str(out), "--work", str(tmp_path / "work"),
        "--answer-tokens", "60", "--max-new-tokens", "12", "--sessions", "4", "--epochs", "1",
        "--draft-vocab", "512",
        "--init", str(PROJECT / "specialists" / "chat"), "--speculate", str(PROJECT / "specialists" / "math"),
    ]  # fmt: skip
    assert main(command) == 0
    assert f"args: {{name: adder, head: {out}}}" in capsys.readouterr().out
    assert "| prompts | prompts.jsonl |" in (out / "README.md").read_text()
    assert load_head(out, target_directory, torch.float32).draft_vocab.numel() == 512


def test_a_preset_changes_only_where_it_is_told_to() -> None:
    recipe = recipe_of("paper", epochs=3, method=None)
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size) == (3, 3e-5, 8)
    assert recipe.draft_vocab is None, "the whole vocabulary"


def test_an_average_lies_between_its_heads_and_drafts_from_both_vocabularies() -> None:
    one = tiny_head(1, torch.tensor([2, 3, 5]))
    other = tiny_head(2, torch.tensor([3, 4]))
    averaged = average(one, other, 0.25)
    for name, weight in averaged.trained().items():
        torch.testing.assert_close(weight, 0.25 * one.trained()[name] + 0.75 * other.trained()[name])
    assert averaged.draft_vocab.tolist() == [2, 3, 4, 5]
    assert torch.equal(averaged.lm_head.weight[1], one.lm_head.weight[1])
    assert torch.equal(averaged.lm_head.weight[2], other.lm_head.weight[1])
    assert all(torch.equal(w, one.trained()[name]) for name, w in average(one, other, 1.0).trained().items())


def test_heads_that_differ_in_shape_have_no_average() -> None:
    other = copy.deepcopy(tiny_head())
    other.fc = torch.nn.Linear(2 * HIDDEN, HIDDEN, bias=True)
    with pytest.raises(InvalidCheckpoint, match="no average"):
        average(tiny_head(), other, 0.5)
