"""Training: it drafts better, is resumed exactly, on one process or two, and ends as a served specialist."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from taps.cli import main
from taps.models.causal_lm import fingerprint
from taps.models.checkpoints import InvalidCheckpoint, load_head, save_head
from taps.models.draft_head import DraftHead
from taps.recording.answers import Answers
from taps.recording.shards import Recording
from taps.training import trainer
from taps.training.averaging import average, average_checkpoints
from taps.training.data import RecordedData
from taps.training.losses import DraftLoss, draft_loss
from taps.training.specialist import SpecialistPlan, refuse_unfit_start, train_specialist
from taps.training.trainer import InvalidState, Trainer, TrainRecipe, recipe_of
from taps.training.validation import validate
from tests.conftest import PROJECT
from tests.recordings import saved
from tests.tiny import HIDDEN, VOCAB, saved_target, tiny_head


def test_a_fresh_head_begins_with_the_line_through_its_examples() -> None:
    draw = torch.Generator().manual_seed(3)
    head, line = tiny_head(), torch.randn(2 * HIDDEN, HIDDEN, generator=draw)
    features = 50 * torch.randn(4, 100, HIDDEN, generator=draw)
    features[..., 0] = 0.0  # an input that never varies
    tokens = torch.randint(0, VOCAB, (4, 100), generator=draw)
    labels = torch.cat([head.embeddings[tokens], features], -1) @ line
    head.fit_inputs(zip(tokens, features, labels, strict=True))
    fitted = head.fc(torch.cat([head.embeddings[tokens], features], -1)).detach()
    assert float((fitted - labels).norm() / labels.norm()) < 0.02
    assert head.fc.weight.isfinite().all()


def test_there_is_no_line_through_nothing() -> None:
    with pytest.raises(ValueError, match="there is none"):
        tiny_head().fit_inputs([])


def test_pairs_come_evenly_from_all_training_recordings(data: RecordedData) -> None:
    every = [pair for pairs in data.pairs(10**6) for pair in zip(*pairs, strict=True)]
    assert len(every) == sum(row.length - 2 for row in data.training)
    some = [pair for pairs in data.pairs(len(every) // 10) for pair in zip(*pairs, strict=True)]
    assert len(every) // 20 < len(some) < len(every) // 5
    batch = data.load(data.training[:1])
    token, feature, label = every[0]
    assert (token, *feature, *label) == (batch.tokens[0, 0], *batch.features[0, 0], *batch.labels[0, 0])


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Accelerate keeps what the first run of a process asked for."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.mark.parametrize(
    "recipe",
    [
        TrainRecipe("eagle-2", epochs=12, batch_size=8, learning_rate=0.02),
        TrainRecipe("hass", epochs=12, batch_size=8, learning_rate=0.02),
        TrainRecipe("hass", epochs=12, batch_size=8, learning_rate=0.02, mixed_precision="bf16"),
    ],
)
def test_training_drafts_better_and_leaves_the_targets_ends_alone(
    recipe: TrainRecipe, data: RecordedData, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("learn_prompts", [True, False])
def test_prompts_are_learned_from_by_choice(
    learn_prompts: bool, data: RecordedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counting(predicted: torch.Tensor, *rest: Any) -> DraftLoss:
        rows.append(predicted.shape[1])
        return draft_loss(predicted, *rest)

    monkeypatch.setattr(trainer, "draft_loss", counting)
    trained(data, tmp_path / "state", TrainRecipe(epochs=1, batch_size=8, learn_prompts=learn_prompts))
    pairs = sum(
        row.length - 2 if learn_prompts else row.length - max(row.answer_start, 2) for row in data.training
    )
    assert sum(rows) == pairs


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


def questions(path: Path) -> str:
    rows = [{"messages": [{"role": "user", "content": f"What is {i} plus {i}?"}]} for i in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


SHORT = ["--answer-tokens", "60", "--max-new-tokens", "12", "--sessions", "4"]


def test_one_command_goes_from_prompts_to_a_specialist(
    tmp_path: Path, target_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = questions(tmp_path / "prompts.jsonl"), tmp_path / "adder"
    command = [
        "train", "--domain", "adder", "--data", data, "--out", str(out), "--work", str(tmp_path / "work"),
        *SHORT, "--epochs", "1", "--draft-vocab", "512",
        "--init", str(PROJECT / "specialists" / "chat"), "--speculate", str(PROJECT / "specialists" / "math"),
    ]  # fmt: skip
    assert main(command) == 0
    assert f"args: {{name: adder, head: {out}}}" in capsys.readouterr().out
    assert "| prompts | prompts.jsonl |" in (out / "README.md").read_text()
    assert load_head(out, target_directory, torch.float32).draft_vocab.numel() == 512


@pytest.mark.parametrize(
    ("start", "message"),
    [(["--preset", "adapt"], "name one with --init"), (["--init", "/no/such/head"], "/no/such/head")],
)
def test_a_start_that_is_not_there_is_refused_before_anything_is_answered(
    start: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, work = questions(tmp_path / "prompts.jsonl"), tmp_path / "work"
    assert main(["train", "--domain", "adder", "--data", data, "--work", str(work), *SHORT, *start]) == 1
    assert message in capsys.readouterr().err
    assert not work.exists()


def test_the_preset_for_a_head_that_drafts_well_aligns_it_with_small_steps() -> None:
    recipe = recipe_of("adapt")
    assert (recipe.method, recipe.epochs, recipe.learning_rate) == ("hass", 2, 3e-4)


def test_answers_are_recorded_apart_and_trained_on_up_to_a_number_of_tokens(tmp_path: Path) -> None:
    answers, out = tmp_path / "answers", tmp_path / "adder"
    record = ["answer", "--data", questions(tmp_path / "prompts.jsonl"), "--out", str(answers), *SHORT]
    assert main(record) == 0
    train = [
        "train", "--domain", "adder", "--answers", f"{answers}:30", "--out", str(out),
        "--work", str(tmp_path / "work"), "--epochs", "1", "--draft-vocab", "512",
    ]  # fmt: skip
    assert main(train) == 0
    made = json.loads((out / "config.json").read_text())["taps"]
    assert made["prompts"] == "answers"
    taken = Answers(answers, 30)
    assert 30 <= sum(row.num_answer_tokens for row in taken.rows()) < 42
    assert made["answer_tokens"] == RecordedData([taken]).num_answer_tokens, "the rest is held out"


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


BIASES = {"fc.bias": HIDDEN, "layers.0.self_attn.q_proj.bias": 32, "layers.0.self_attn.k_proj.bias": 16}


def remade(head: DraftHead, **weights: torch.Tensor) -> DraftHead:
    return head.remade(head.trained() | weights, head.lm_head.weight.detach(), None)


def biased_head(value: float) -> DraftHead:
    return remade(tiny_head(), **{name: torch.full((size,), value) for name, size in BIASES.items()})


def head_with_embeddings(embeddings: torch.Tensor) -> DraftHead:
    head = tiny_head()
    lm_head = head.lm_head.weight.detach()
    made_for = fingerprint(head.embeddings)
    return DraftHead(head.config, embeddings, lm_head, own_embeddings_for=made_for).eval()


def test_biases_are_averaged_too() -> None:
    averaged = average(biased_head(1.0), biased_head(3.0), 0.25).trained()
    assert {name for name in averaged if name.endswith(".bias")} == BIASES.keys()
    assert all(torch.equal(averaged[name], torch.full((size,), 2.5)) for name, size in BIASES.items())


def test_heads_that_differ_in_more_than_values_have_no_average() -> None:
    turned, own = tiny_head(), tiny_head().embeddings + 1
    turned.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    for other in (biased_head(1.0), turned, head_with_embeddings(own)):
        for heads in ((tiny_head(), other), (other, tiny_head())):
            with pytest.raises(InvalidCheckpoint, match="no average"):
                average(*heads, 0.5)
    averaged = average(head_with_embeddings(own), head_with_embeddings(own), 0.5)
    assert torch.equal(averaged.embeddings, own)
    assert averaged.own_embeddings_for == fingerprint(tiny_head().embeddings)


def test_a_head_adapted_from_one_with_embeddings_and_biases_of_its_own_is_read_and_adapted_again(
    data: RecordedData, tmp_path: Path
) -> None:
    target, answers = saved_target(tmp_path / "target"), [Answers(tmp_path / "answers")]
    own = (tiny_head().embeddings + 1).bfloat16().float()
    start = remade(head_with_embeddings(own), **{name: torch.zeros(size) for name, size in BIASES.items()})
    save_head(start, tmp_path / "0", {}, torch.bfloat16)
    recipe = TrainRecipe("hass", epochs=1, batch_size=8, learning_rate=0.02, draft_vocab=50)
    for i in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        plan = SpecialistPlan(
            "x", str(target), tmp_path / f"{i + 1}", tmp_path / f"state-{i}", recipe, str(tmp_path / f"{i}")
        )
        refuse_unfit_start(plan)
        train_specialist(plan, answers, {})
    heads = [load_head(tmp_path / f"{i}", target, torch.float32) for i in range(3)]
    assert all(torch.equal(head.embeddings, own) for head in heads)
    assert [head.draft_vocab.numel() for head in heads] == [VOCAB, 50, 50]
    assert all(heads[1].trained()[name].any() and heads[2].trained()[name].any() for name in BIASES)
    average_checkpoints(tmp_path / "1", tmp_path / "2", 0.5, str(target), tmp_path / "3")
    assert torch.equal(load_head(tmp_path / "3", target, torch.float32).embeddings, own)


@pytest.mark.parametrize("settings", ["null", '{"model_type": "llama", "hidden_size": "32"}', "{"])
def test_a_target_that_no_head_can_be_made_for_is_refused_before_anything_is_answered(
    settings: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target, work = saved_target(tmp_path / "target"), tmp_path / "work"
    capfd.readouterr()
    (target / "config.json").write_text(settings)
    data = questions(tmp_path / "prompts.jsonl")
    command = ["train", "--domain", "adder", "--data", data, "--work", str(work), "--target", str(target)]
    assert main([*command, *SHORT]) == 1
    said = capfd.readouterr().err
    assert said.startswith(f"taps: cannot load the config.json of the target '{target}'")
    assert said.count("\n") == 1
    assert not work.exists()


@pytest.mark.parametrize("weight", ["nan", "1.5", "-0.1", "half"])
def test_a_weight_that_makes_no_average_is_refused(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["average", "one", "other", f"--weight={weight}", "--out", "out"])
    assert f"'{weight}' is not a number from 0 to 1" in capsys.readouterr().err
