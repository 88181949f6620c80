"""Draft heads in the layouts they are published in, and clear refusals of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taps.models.alignment import Alignment
from taps.models.checkpoints import InvalidCheckpoint, export_head, load_head, load_target_ends, save_head
from tests.tiny import HIDDEN, VOCAB, saved_target, tiny_head


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return saved_target(tmp_path / "target")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_head(tiny_head(), tmp_path / "head", {"domain": "test"}, torch.float32)
    return tmp_path / "head"


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randint(0, VOCAB, (1, 6)), torch.randn(1, 6, HIDDEN), torch.arange(6)[None]


def predict(head: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = head(*inputs(), Alignment())
    return out


def rewrite(head: Path, change: dict[str, Any] | None = None, **config: Any) -> None:
    """Change weights (None drops one) and config values of a saved head."""
    weights = load_file(head / "model.safetensors")
    for name, value in (change or {}).items():
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, head / "model.safetensors")
    settings = json.loads((head / "config.json").read_text()) | config
    (head / "config.json").write_text(json.dumps(settings))


def test_a_saved_head_predicts_what_it_did(saved: Path, target: Path) -> None:
    assert torch.equal(predict(load_head(saved, target, torch.float32)), predict(tiny_head()))


def test_the_draft_vocabulary_survives(tmp_path: Path, target: Path) -> None:
    vocabulary = torch.tensor([3, 5, 8, 90])
    save_head(tiny_head(draft_vocab=vocabulary), tmp_path / "head", {}, torch.float32)
    head = load_head(tmp_path / "head", target, torch.float32)
    assert head.draft_vocab.tolist() == [3, 5, 8, 90]
    assert torch.equal(head.lm_head.weight, load_target_ends(target)[1][vocabulary])


def test_a_saved_config_says_what_eagles_own_loader_reads(saved: Path) -> None:
    settings = json.loads((saved / "config.json").read_text())
    assert settings["bias"] is False
    assert settings["rope_theta"] == (tiny_head().config.rope_parameters or {})["rope_theta"]
    assert settings["rope_scaling"] is None


def test_the_published_eagle_layout_loads(saved: Path, target: Path) -> None:
    """Half-precision pytorch_model.bin, embeddings of its own, an fc bias, and an older plain Llama config."""
    weights = load_file(saved / "model.safetensors")
    weights["embed_tokens.weight"] = load_target_ends(target)[0].clone()
    weights["fc.bias"] = torch.ones(HIDDEN)
    (saved / "model.safetensors").unlink()
    torch.save({name: weight.half() for name, weight in weights.items()}, saved / "pytorch_model.bin")
    settings = json.loads((saved / "config.json").read_text())
    older = {"architectures": ["LlamaForCausalLM"], "bias": True, "rope_theta": 500000.0, "rope_scaling": None}
    kept = {name: value for name, value in settings.items() if name not in ("taps", "rope_parameters")}
    (saved / "config.json").write_text(json.dumps(kept | older))
    head = load_head(saved, target, torch.float32)
    assert (head.config.rope_parameters or {})["rope_theta"] == 500000.0
    assert head.fc.bias is not None
    assert not torch.equal(predict(head), predict(tiny_head()))


def test_an_export_has_what_eagles_own_loader_wants_and_nothing_else(tmp_path: Path, target: Path) -> None:
    """It loads one Llama layer strictly: embeddings, no draft vocabulary, no norm before the first layer."""
    save_head(tiny_head(draft_vocab=torch.tensor([3, 5])), tmp_path / "head", {"domain": "x"}, torch.float32)
    export_head(tmp_path / "head", target, tmp_path / "export", torch.float32)
    layer = "layers.0."
    wanted = {"embed_tokens.weight", "fc.weight", f"{layer}post_attention_layernorm.weight"}
    wanted |= {f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    wanted |= {f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    pickled = torch.load(tmp_path / "export" / "pytorch_model.bin", weights_only=True)
    assert tensors.keys() == pickled.keys() == wanted
    assert all(torch.equal(tensor, pickled[name]) for name, tensor in tensors.items())
    exported = load_head(tmp_path / "export", target, torch.float32)
    assert exported.draft_vocab.numel() == VOCAB
    assert torch.equal(predict(exported), predict(tiny_head()))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["taps"]["domain"] == "x"


def test_what_a_checkpoint_repeats_of_its_target_is_not_read(saved: Path, target: Path) -> None:
    inverse = torch.ones(4)
    rewrite(saved, {"lm_head.weight": torch.zeros(3, 3), "layers.0.self_attn.rotary_emb.inv_freq": inverse})
    assert torch.equal(predict(load_head(saved, target, torch.float32)), predict(tiny_head()))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_not_whole_is_named(saved: Path, target: Path, name: str) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    if name == "pytorch_model.bin":
        (saved / "model.safetensors").unlink()
    whole = (saved / name).read_bytes()
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        (saved / name).write_bytes(whole[:kept])
        with pytest.raises(InvalidCheckpoint, match=f"{name} cannot be read, perhaps it is not whole"):
            load_head(saved, target, torch.float32)


def test_an_input_norm_is_used_where_the_checkpoint_has_one(saved: Path, target: Path) -> None:
    rewrite(saved, {"layers.0.input_layernorm.weight": torch.full((HIDDEN,), 0.5)})
    assert not torch.equal(predict(load_head(saved, target, torch.float32)), predict(tiny_head()))


@pytest.mark.parametrize(
    ("weights", "config", "says"),
    [
        ({"fc.weight": None}, {}, "lacks fc.weight"),
        ({"layers.0.mlp.up_proj.weight": None}, {}, "lacks layers.0.mlp.up_proj.weight"),
        ({"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)}, {}, "EAGLE-3 heads"),
        ({"layers.0.mlp.up_proj.weight": torch.zeros(3, HIDDEN)}, {}, "not those of its config"),
        ({"layers.0.self_attn.q_proj.bias": torch.zeros(HIDDEN)}, {}, "q_proj.bias, which the one Llama layer"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(3, HIDDEN)}, {}, "head of another kind"),
        ({}, {"hidden_size": 64}, "hidden size 64, not 32"),
        ({}, {"vocab_size": 50}, "vocabulary of 50 tokens, the target has 97"),
        ({}, {"taps": {"target_fingerprint": "0000"}}, "trained for another target"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    saved: Path, target: Path, weights: dict[str, Any], config: dict[str, Any], says: str
) -> None:
    rewrite(saved, weights, **config)
    with pytest.raises(InvalidCheckpoint, match=says):
        load_head(saved, target, torch.float32)


def test_a_directory_without_a_head_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json"):
        load_head(tmp_path, target, torch.float32)


def test_broken_config_and_missing_weights_are_named(saved: Path, target: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_head(saved, target, torch.float32)
    (saved / "config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="is not JSON"):
        load_head(saved, target, torch.float32)
