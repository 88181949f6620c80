"""Broken and unfit heads and targets: each is refused with one sentence that says what is wrong."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taps.cli import main
from taps.models.checkpoints import InvalidCheckpoint, load_head, load_target_ends, save_head
from tests.conftest import PROJECT
from tests.tiny import HIDDEN, VOCAB, saved_target, tiny_head

WEIGHTS = tiny_head().trained()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def head(tmp_path: Path) -> Path:
    save_head(tiny_head(), tmp_path / "head", {"domain": "test"}, torch.float32)
    return tmp_path / "head"


def with_config(head: Path, **changes: Any) -> Path:
    settings = json.loads((head / "config.json").read_text()) | changes
    (head / "config.json").write_text(json.dumps(settings))
    return head


def with_tensors(head: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """None drops one."""
    weights = {**load_file(head / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, head / "model.safetensors")
    return head


def refusal(head: Path, target: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(InvalidCheckpoint) as refused:
        load_head(head, target, dtype)
    said = str(refused.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"null", "not an object"),
        (b"[]", "not an object"),
        (b'"llama"', "not an object"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"{}", "vocab_size: Field required"),
    ],
)
def test_a_config_that_holds_no_settings_is_refused(text: bytes, says: str, head: Path, target: Path) -> None:
    (head / "config.json").write_bytes(text)
    said = refusal(head, target)
    assert says in said
    assert str(head / "config.json") in said


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "576", 0, -32, 32.5, True, [], {}, 10**30, float("nan"), "absent"])
def test_a_size_is_a_number_that_fits(name: str, value: Any, head: Path, target: Path) -> None:
    if value == "absent":
        settings = json.loads((head / "config.json").read_text())
        del settings[name]
        (head / "config.json").write_text(json.dumps(settings))
    else:
        with_config(head, **{name: value})
    assert "head" in refusal(head, target)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"taps": None}, "taps: Input should be a valid dictionary"),
        ({"taps": ["x"]}, "taps: Input should be a valid dictionary"),
        ({"taps": {"target_fingerprint": "0000"}}, "trained for another target"),
        ({"taps": {"target_fingerprint": 5}}, "trained for another target"),
        ({"hidden_size": 64}, "hidden size 64, not 32"),
        ({"vocab_size": 50}, "vocabulary of 50 tokens, the target has 97"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 10**12}, "no multiple of num_key_value_heads"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 8}, "of shape (32, 32); by its config and the target it should have (32, 64)"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "shout"}, "'shout' is not known"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: Input should be a finite number"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling: Input should be a valid dictionary"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling.type: 'spiral' is not one of"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": -8.0}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": 0}}, "no rotary embedding"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"speculators_model_type": "eagle3"}, "the format of `speculators` and of its kind 'eagle3'"),
        ({"speculators_model_type": "eagle", "transformer_layer_config": []}, "transformer_layer_config"),
        ({"speculators_config": {"algorithm": "mlp"}}, "the format of `speculators`"),
    ],
)
def test_a_setting_that_makes_no_head_is_named(
    setting: dict[str, Any], says: str, head: Path, target: Path
) -> None:
    assert says in refusal(with_config(head, **setting), target)


@pytest.mark.parametrize("name", [*WEIGHTS, "fc.bias", "layers.0.self_attn.k_proj.bias", "embed_tokens.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name: str, head: Path, target: Path) -> None:
    said = refusal(with_tensors(head, {name: torch.zeros(3, 5)}), target)
    assert f"{name} of shape (3, 5)" in said
    if name in WEIGHTS:
        assert f"it should have {tuple(WEIGHTS[name].shape)}" in said


@pytest.mark.parametrize("shape", [(VOCAB - 1, HIDDEN), (VOCAB, HIDDEN // 2), (VOCAB * HIDDEN,), (0, HIDDEN)])
def test_embeddings_are_as_large_as_the_targets(shape: tuple[int, ...], head: Path, target: Path) -> None:
    said = refusal(with_tensors(head, {"embed_tokens.weight": torch.zeros(shape)}), target)
    assert f"embed_tokens.weight of shape {shape}" in said
    assert f"it should have {(VOCAB, HIDDEN)}" in said


@pytest.mark.parametrize("name", [*WEIGHTS, "embed_tokens.weight"])
def test_weights_are_finite_floating_point_numbers(name: str, head: Path, target: Path) -> None:
    like = WEIGHTS.get(name, torch.zeros(VOCAB, HIDDEN))
    for dtype in (torch.int32, torch.bool, torch.uint8):
        assert f"{name} of {dtype}" in refusal(
            with_tensors(head, {name: torch.ones_like(like, dtype=dtype)}), target
        )
    assert "not finite" in refusal(with_tensors(head, {name: torch.full_like(like, torch.nan)}), target)
    large = with_tensors(head, {name: torch.full_like(like, 1e6)})
    assert "not finite in torch.float16" in refusal(large, target, torch.float16)
    load_head(large, target, torch.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"fc.weight": None}, "lacks fc.weight"),
        ({"layers.0.mlp.up_proj.weight": None}, "lacks layers.0.mlp.up_proj.weight"),
        ({"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)}, "EAGLE-3 heads"),
        ({"layers.0.self_attn.q_norm.weight": torch.zeros(8)}, "q_norm.weight, which the one Llama layer"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(3, HIDDEN)}, "head of another kind"),
        ({f"layers.{i}.x": torch.zeros(1) for i in range(99)}, "and 95 more"),
    ],
)
def test_a_head_of_another_kind_is_refused(
    tensors: dict[str, torch.Tensor | None], says: str, head: Path, target: Path
) -> None:
    assert says in refusal(with_tensors(head, tensors), target)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1, VOCAB]), torch.tensor([-1, 2]), torch.tensor([4, 4]), torch.tensor([2**40]),
        torch.arange(VOCAB + 1), torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor(3),
        torch.tensor([[1, 2]]), torch.tensor([], dtype=torch.int32),
    ],
)  # fmt: skip
def test_a_draft_vocabulary_lists_tokens_of_the_target_once(
    ids: torch.Tensor, head: Path, target: Path
) -> None:
    assert "has draft_vocab" in refusal(with_tensors(head, {"draft_vocab": ids}), target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_a_draft_vocabulary_can_be_of_any_whole_numbers(dtype: torch.dtype, head: Path, target: Path) -> None:
    ids = torch.tensor([1, 0, 5], dtype=dtype)
    loaded = load_head(with_tensors(head, {"draft_vocab": ids}), target, torch.float32)
    assert torch.equal(loaded.lm_head.weight, load_target_ends(target)[1][[1, 0, 5]])


@pytest.mark.parametrize(
    "held",
    [
        [1, 2], None, torch.zeros(3), {"fc.weight": 5}, {"state_dict": WEIGHTS}, {5: torch.zeros(3)},
        {"fc.weight": torch.zeros(3, 3).to_sparse()}, {"fc.weight": torch.zeros(3, 3, device="meta")},
        WEIGHTS | {"epoch": "3"}, Path("x"),
    ],
)  # fmt: skip
def test_a_pickle_of_anything_but_tensors_by_name_is_refused(held: Any, head: Path, target: Path) -> None:
    (head / "model.safetensors").unlink()
    torch.save(held, head / "pytorch_model.bin")
    assert str(head / "pytorch_model.bin") in refusal(head, target)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_not_whole_is_named(name: str, head: Path, target: Path) -> None:
    torch.save(load_file(head / "model.safetensors"), head / "pytorch_model.bin")
    if name == "pytorch_model.bin":
        (head / "model.safetensors").unlink()
    whole = (head / name).read_bytes()
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        (head / name).write_bytes(whole[:kept])
        assert f"{name} cannot be read, perhaps it is not whole" in refusal(head, target)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_something_else_is_named(name: str, head: Path, target: Path) -> None:
    (head / "model.safetensors").unlink()
    draw = random.Random(0)
    others = [
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1\n",
    ]
    others += [prefix + draw.randbytes(80) for prefix in (b"", b"\x80\x02") for _ in range(20)]
    for content in others:
        (head / name).write_bytes(content)
        assert str(head / name) in refusal(head, target)


def test_a_directory_that_lacks_a_file_is_refused(head: Path, target: Path) -> None:
    (head / "model.safetensors").rename(head / "weights")
    (head / "model.safetensors").mkdir()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(head, target)
    (head / "config.json").unlink()
    (head / "config.json").mkdir()
    assert "no config.json" in refusal(head, target)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.embed_tokens.weight": None}, "no input embeddings"),
        ({"model.embed_tokens.weight": torch.zeros(VOCAB)}, f"embeddings of shape ({VOCAB},)"),
        ({"lm_head.weight": torch.zeros(VOCAB - 1, HIDDEN)}, f"an lm_head of ({VOCAB - 1}, {HIDDEN})"),
        ({"lm_head.weight": torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)}, "not quantized"),
    ],
)
def test_a_target_whose_ends_fit_no_head_is_refused(
    tensors: dict[str, torch.Tensor | None], says: str, head: Path, target: Path, tmp_path: Path
) -> None:
    other = tmp_path / "target"
    shutil.copytree(target, other)
    assert says in refusal(head, with_tensors(other, tensors))


def test_a_target_that_is_not_whole_is_named(head: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "target"
    shutil.copytree(target, other)
    path = other / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"x" * 100):
        path.write_bytes(content)
        assert f"{path} cannot be read" in refusal(head, other)


@pytest.mark.parametrize(
    "command",
    [
        "export HEAD --out OUT",
        "average HEAD MATH --out OUT",
        "average MATH HEAD --out OUT",
        "eval --benchmark mine --data DATA --heads MATH HEAD --questions 1 --out OUT",
        "bench --benchmark mine --data DATA --heads MATH --alone HEAD --questions 1 --out OUT",
        "train --domain adder --data DATA --init HEAD --work OUT",
        "answer --data DATA --speculate HEAD --out OUT",
    ],
)
def test_a_command_that_is_given_a_broken_head_says_so_in_a_line(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head, data = tmp_path / "broken", tmp_path / "q.jsonl"
    shutil.copytree(PROJECT / "specialists" / "chat", head)
    with_config(head, taps=None)
    data.write_text(json.dumps({"question": "2 + 2?"}))
    math = PROJECT / "specialists" / "math"
    paths = {"HEAD": str(head), "MATH": str(math), "DATA": str(data), "OUT": str(tmp_path / "out")}
    assert main([paths.get(word, word) for word in command.split()]) == 1
    *progress, said = capfd.readouterr().err.splitlines()
    assert (
        said == f"taps: {head / 'config.json'} is not that of a head: taps: Input should be a valid dictionary"
    )
    assert not progress or command.startswith("answer"), "it loads the target first"
