"""Training: the loss by hand, the prompts that are refused, and shards and batches that keep every token."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from taps.models.draft_head import DraftHead, draft_config
from taps.training.dataset import (
    InvalidData,
    Recording,
    load_prompts,
    load_shard,
    save_shard,
    shard_header,
    shards,
)
from taps.training.losses import eagle_loss
from taps.training.trainer import Trainer, TrainRecipe, batches, collate, draft_vocabulary

USER = {"role": "user", "content": "hi"}


def recording(tokens: Sequence[int], answer_start: int, name: str = "r") -> Recording:
    """Feature i is (i, -i)."""
    positions = torch.arange(len(tokens) - 1, dtype=torch.bfloat16)
    features = torch.stack([positions, -positions], dim=1)
    return Recording(name, torch.tensor(tokens, dtype=torch.int32), answer_start, features)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_loss_of_a_case_worked_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2), so the cross-entropy is ln 2; features differ by ln 3 > 1 and by 0."""
    loss = eagle_loss(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.eye(2), 2.0, 0.5)
    feature = (math.log(3) - 0.5) / 2
    assert float(loss.feature) == pytest.approx(feature)
    assert float(loss.token) == pytest.approx(math.log(2))
    assert float(loss.total) == pytest.approx(2.0 * feature + 0.5 * math.log(2))


def test_small_feature_errors_cost_half_their_square() -> None:
    loss = eagle_loss(torch.tensor([[0.4, 0.0]]), torch.zeros(1, 2), torch.eye(2), 1.0, 0.0)
    assert float(loss.total) == pytest.approx(0.5 * 0.4**2 / 2)


def test_the_perfect_prediction_costs_the_targets_entropy_and_has_no_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    features, lm_head = torch.randn(5, 3, generator=draw), torch.randn(7, 3, generator=draw)
    predicted = features.clone().requires_grad_()
    loss = eagle_loss(predicted, features, lm_head, 1.0, 0.1)
    p = (features @ lm_head.T).softmax(-1)
    assert float(loss.feature.detach()) == 0.0
    assert float(loss.token.detach()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, predicted)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "null",
        "[1]",
        '"text"',
        "{}",
        '{"messages": []}',
        '{"messages": "hi"}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": [{"role": "assistant", "content": "hi"}]}',
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_what_is_expected(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "data.jsonl", json.dumps({"messages": [USER]}), line)
    with pytest.raises(InvalidData, match=r"data\.jsonl, line 2: .*expected \{"):
        load_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="holds no prompts"):
        load_prompts(written(tmp_path / "data.jsonl", "", "  "))


def test_reference_answers_are_dropped_and_earlier_turns_kept(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "hello"}
    row = {"id": 7, "messages": [USER, reply, USER | {"name": "x"}, reply]}
    (prompt,) = load_prompts(written(tmp_path / "data.jsonl", json.dumps(row), ""))
    assert prompt.id == "7"
    assert prompt.messages == (USER, reply, USER)


def test_prompts_are_shuffled_by_the_seed_alone_and_keep_their_identity(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [USER | {"content": str(i)}]}) for i in range(20)]
    path = written(tmp_path / "data.jsonl", *lines)
    first, second, other = load_prompts(path, 0), load_prompts(path, 0), load_prompts(path, 1)
    assert first == second != other
    assert sorted(prompt.id for prompt in first) == sorted(prompt.id for prompt in other)
    assert len({prompt.id for prompt in first}) == 20


def test_recordings_survive_a_shard(tmp_path: Path) -> None:
    saved = [recording([1, 2, 3, 4], 2, "a"), recording([5, 6], 1, "b"), recording([7, 8, 9], 3, "c")]
    save_shard(tmp_path / "shard-00000.safetensors", saved)
    assert shards(tmp_path) == list(tmp_path.iterdir()), "no partial file is left"
    assert shard_header(shards(tmp_path)[0]) == {"ids": ["a", "b", "c"], "answer_tokens": 3}
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


def test_an_epoch_takes_every_recording_once_and_skips_those_without_a_pair(tmp_path: Path) -> None:
    for shard in range(6):
        rows = [recording([9, first, *range(first % 3 + 1)], 1) for first in range(10 * shard, 10 * shard + 4)]
        save_shard(tmp_path / f"shard-{shard:05d}.safetensors", [*rows, recording([9, 999], 1)])
    epoch = list(batches(tmp_path, 4, random.Random(0)))
    firsts = [int(first) for batch in epoch for first in batch.tokens[:, 0]]
    assert sorted(firsts) == [10 * shard + i for shard in range(6) for i in range(4)]
    assert max(len(batch.tokens) for batch in epoch) == 4


def test_the_draft_vocabulary_is_what_answers_use_most_then_the_lowest_ids(tmp_path: Path) -> None:
    rows = [recording([6, 6, 6, 6, 7, 7, 4], answer_start=4), recording([6, 9, 9, 9], answer_start=1)]
    save_shard(tmp_path / "shard-00000.safetensors", rows)
    vocabulary = draft_vocabulary(tmp_path, 5, vocab_size=10)
    assert vocabulary is not None
    assert vocabulary.tolist() == [0, 1, 4, 7, 9]
    assert draft_vocabulary(tmp_path, 10, vocab_size=10) is None


def test_training_lowers_the_loss_and_leaves_the_targets_ends_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ends = torch.randn(12, 2)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=2,
        intermediate_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
    )
    head = DraftHead(draft_config(config), ends.clone(), ends.clone())
    rows = [recording([1, 2, 3, 4, 5], answer_start=1 + i % 2) for i in range(8)]
    save_shard(tmp_path / "shard-00000.safetensors", rows)
    batch = collate(rows)

    def loss() -> float:
        with torch.no_grad():
            predicted = head(batch.tokens, batch.features, torch.arange(3)[None])
        return float(eagle_loss(predicted[batch.counts], batch.labels[batch.counts], ends, 1.0, 0.1).total)

    before = loss()
    Trainer(head, tmp_path, TrainRecipe(epochs=20, batch_size=4, learning_rate=0.02, warmup_steps=1)).run()
    assert loss() < 0.8 * before
    assert torch.equal(head.lm_head.weight, ends)
    assert torch.equal(head.embeddings, ends)
