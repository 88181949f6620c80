"""Recordings as batches: every token once, held-out prompts apart, the most used tokens to draft from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taps.recording.answers import Answers
from taps.recording.batches import collate
from taps.recording.shards import (
    Recording,
    load_row,
    load_shard,
    save_shard,
    shard_header,
    shard_rows,
    shards,
)
from taps.recording.sources import InvalidData
from taps.training.data import RecordedData, draft_vocabulary
from tests.recordings import recording, saved


def test_recordings_survive_a_shard(tmp_path: Path) -> None:
    saved = [recording([1, 2, 3, 4], 2, "a"), recording([5, 6], 1, "b"), recording([7, 8, 9], 3, "c")]
    save_shard(tmp_path / "shard-00000.safetensors", saved)
    assert shards(tmp_path) == list(tmp_path.iterdir()), "no partial file is left"
    header = {"target": "", "answering": {}, "ids": ["a", "b", "c"], "answer_tokens": 3}
    assert shard_header(shards(tmp_path)[0]) == header
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


def test_pairs_with_a_label_are_known_and_those_that_predict_an_answer_token_are_marked() -> None:
    batch = collate([recording([10, 11, 12, 13, 14], answer_start=3), recording([20, 21, 22], answer_start=1)])
    assert batch.known.tolist() == [[True, True, True], [True, False, False]]
    assert batch.answers.tolist() == [[False, True, True], [True, False, False]]


def test_rows_are_read_by_themselves(tmp_path: Path) -> None:
    recordings = [recording([1, 2, 3, 4], 2, "a"), recording([5, 6], 1, "b"), recording([7, 8, 9], 3, "c")]
    (path,) = shards(saved(tmp_path / "answers", *recordings))
    for row, whole in zip(reversed(shard_rows(path)), reversed(recordings), strict=True):
        alone = load_row(row)
        assert (row.length, row.num_answer_tokens) == (len(whole.tokens), whole.num_answer_tokens)
        assert torch.equal(alone.tokens, whole.tokens)
        assert torch.equal(alone.features, whole.features)


def test_a_shard_that_is_not_whole_is_named(tmp_path: Path) -> None:
    (path,) = shards(saved(tmp_path / "answers", recording([1, 2, 3, 4], 2)))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidData, match=r"shard-00000\.safetensors cannot be read"):
        Answers(tmp_path / "answers").rows()


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


def test_answers_that_are_all_held_out_train_nothing(tmp_path: Path) -> None:
    held_out = RecordedData([Answers(saved(tmp_path / "many", *many(120)))]).held_out[0]
    answers = saved(tmp_path / "few", load_row(held_out))
    with pytest.raises(InvalidData, match="of 1 recorded answers all are held out"):
        RecordedData([Answers(answers)])


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
    alone = RecordedData([Answers(tmp_path / "a0")])
    assert {row.id for row in alone.held_out}.isdisjoint(row.id for row in data.training), "nor by other runs"
    assert len(data.training) == pytest.approx(8000 * 49 / 50, rel=0.01)


def test_answers_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    rows = [recording([9, 1, 2], 1, name) for name in ("c", "a#1", "b", "other", "a")]
    answers = Answers(saved(tmp_path / "answers", *rows), prompts=("a", "b", "c"))
    assert [row.id for row in answers.rows()] == ["a", "b", "c", "a#1"]


def test_answers_are_taken_up_to_a_number_of_tokens(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", *many(10)), saved(tmp_path / "other", *many(10))
    rows = [*Answers(one, 7).rows(), *Answers(other).rows()]
    assert [row.id for row in rows[:3]] == ["r0", "r1", "r2"]
    assert [sum(row.num_answer_tokens for row in part) for part in (rows[:-10], rows[-10:])] == [9, 29]


def test_fewer_answers_than_asked_for_are_refused(tmp_path: Path) -> None:
    answers = saved(tmp_path / "answers", *many(10))
    with pytest.raises(InvalidData, match="answers holds 29 answer tokens, 30 were asked for"):
        Answers(answers, 30).rows()
    assert len(Answers(answers, 30, tuple(f"r{i}" for i in range(10))).rows()) == 10, "all there is to prompts"
    with pytest.raises(InvalidData, match=r"no recorded answers in .*elsewhere"):
        Answers(tmp_path / "elsewhere").rows()


def test_features_are_computed_for_those_kept_without_them(tmp_path: Path) -> None:
    whole, bare = recording([1, 2, 3, 4], 2, "same"), recording([5, 6, 7], 1, "same")
    kept = saved(tmp_path / "kept", whole)
    without = saved(tmp_path / "without", replace(bare, features=torch.empty(0, 0)))
    data = RecordedData([Answers(kept), Answers(without)], lambda found: [bare.features for _ in found])
    rows = [*Answers(kept).rows(), *Answers(without).rows()]
    for got, wanted in zip(data.load(rows), collate([whole, bare]), strict=True):
        assert torch.equal(got, wanted)


def test_the_draft_vocabulary_is_what_answers_use_most_then_the_lowest_ids(tmp_path: Path) -> None:
    rows = [recording([6, 6, 6, 6, 7, 7, 4], answer_start=4), recording([6, 9, 9, 9], answer_start=1)]
    answers = Answers(saved(tmp_path / "answers", *rows)).rows()
    vocabulary = draft_vocabulary(answers, 5, vocab_size=10)
    assert vocabulary is not None
    assert vocabulary.tolist() == [0, 1, 4, 7, 9]
    assert draft_vocabulary(answers, 10, vocab_size=10) is None
