"""Draft heads in the layouts they are published in, written so that they and other engines read them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from taps.models.alignment import Alignment
from taps.models.causal_lm import fingerprint
from taps.models.checkpoints import export_head, load_head, load_target_ends, save_head, weights_digest
from taps.models.draft_head import DraftHead
from taps.models.head_tensors import tensor_shapes
from tests.conftest import PROJECT
from tests.tiny import HIDDEN, VOCAB, saved_target, tiny_config, tiny_head

QKV = {"q": 32, "k": 16, "v": 16}  # rows of the tiny head's projections


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


def save_again(head: Path, target: Path, out: Path) -> Path:
    save_head(load_head(head, target, torch.float32), out, {}, torch.float32)
    return out


def export_again(head: Path, target: Path, out: Path) -> Path:
    export_head(head, target, out, torch.float32)
    return out


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


def test_an_input_norm_is_used_where_the_checkpoint_has_one(saved: Path, target: Path) -> None:
    rewrite(saved, {"layers.0.input_layernorm.weight": torch.full((HIDDEN,), 0.5)})
    assert not torch.equal(predict(load_head(saved, target, torch.float32)), predict(tiny_head()))


def test_a_head_has_the_biases_that_its_checkpoint_has(saved: Path, target: Path) -> None:
    """As heads for Qwen2 are published: on q, k and v, none on o, whatever the config says of it."""
    torch.manual_seed(5)
    biases = {f"layers.0.self_attn.{name}_proj.bias": torch.randn(size) for name, size in QKV.items()}
    for flags in ({"qkv_bias": True}, {"attention_bias": True}, {"attention_bias": False}, {}):
        rewrite(saved, biases, **flags)
        head = load_head(saved, target, torch.float32)
        assert {name for name in head.trained() if name.endswith(".bias")} == biases.keys()
        torch.testing.assert_close(predict(head), predict_as_qwen2(head))


def predict_as_qwen2(head: DraftHead) -> torch.Tensor:
    """What the head predicts if its layer is the one transformers has for Qwen2."""
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    config: Any = Qwen2Config(**{name: getattr(head.config, name) for name in same})
    config._attn_implementation = Alignment.attention_name
    layer: Any = Qwen2DecoderLayer(config, 0).eval()
    layer.input_layernorm = torch.nn.Identity()
    weights = {name.removeprefix("layers.0."): w for name, w in head.trained().items() if "layers" in name}
    layer.load_state_dict(weights)
    head.layers[0] = layer
    return predict(head)


@pytest.mark.parametrize("written", [save_again, export_again])
def test_biases_survive_writing(
    written: Callable[[Path, Path, Path], Path], saved: Path, target: Path, tmp_path: Path
) -> None:
    biases = {f"layers.0.self_attn.{name}_proj.bias": torch.ones(size) for name, size in QKV.items()}
    rewrite(saved, biases | {"fc.bias": torch.ones(HIDDEN)})
    again = written(saved, target, tmp_path / "again")
    read = predict(load_head(again, target, torch.float32))
    assert torch.equal(read, predict(load_head(saved, target, torch.float32)))
    settings = json.loads((again / "config.json").read_text())
    flags = {"bias": True, "qkv_bias": True, "attention_bias": False, "mlp_bias": False}
    assert {name: settings[name] for name in flags} == flags


def test_own_embeddings_survive_writing_and_the_fingerprint_stays_the_targets(
    saved: Path, target: Path, tmp_path: Path
) -> None:
    of_target = load_target_ends(target)[0]
    own = of_target + 1
    rewrite(saved, {"embed_tokens.weight": own})
    head = load_head(saved, target, torch.float32)
    assert torch.equal(head.embeddings, own)
    for again in (save_again(saved, target, tmp_path / "a"), export_again(saved, target, tmp_path / "b")):
        made_for = json.loads((again / "config.json").read_text())["taps"]["target_fingerprint"]
        assert made_for == fingerprint(of_target)
        read = load_head(save_again(again, target, tmp_path / "twice"), target, torch.float32)
        assert torch.equal(read.embeddings, own)
        assert torch.equal(predict(read), predict(head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_that_repeat_the_targets_are_the_targets(
    dtype: torch.dtype, saved: Path, target: Path, tmp_path: Path
) -> None:
    """As published heads have them, rounded or not: the target's own are at hand, and are not saved again."""
    of_target = load_target_ends(target)[0]
    rewrite(saved, {"embed_tokens.weight": of_target.to(dtype)})
    head = load_head(saved, target, torch.float32)
    assert torch.equal(head.embeddings, of_target)
    save_head(head, tmp_path / "again", {}, torch.float32)
    assert "embed_tokens.weight" not in load_file(tmp_path / "again" / "model.safetensors")


def test_the_speculators_format_is_read(saved: Path, target: Path) -> None:
    """Its settings are nested, and its tensors have other names."""
    words = {"fc.": "fusion_fc.", "layers.0.": "transformer."}
    weights = load_file(saved / "model.safetensors")
    for ours, theirs in words.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    save_file(weights, saved / "model.safetensors")
    layer = json.loads((saved / "config.json").read_text())
    settings = {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"], "speculators_model_type": "eagle",
        "speculators_config": {"algorithm": "eagle", "verifier": {"name_or_path": "x"}}, "fusion_bias": False,
        "layernorms": False, "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": {name: value for name, value in layer.items() if name != "taps"},
    }  # fmt: skip
    (saved / "config.json").write_text(json.dumps(settings))
    assert torch.equal(predict(load_head(saved, target, torch.float32)), predict(tiny_head()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_config_says_what_other_engines_read(
    dtype: torch.dtype, tmp_path: Path, target: Path
) -> None:
    """vLLM knows its EAGLE class by the layer's architecture; EAGLE's own loader wants a scaling's `type`."""
    scaled = tiny_config()
    scaled.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    head = tiny_head()
    head.config.rope_parameters = scaled.rope_parameters
    save_head(head, tmp_path / "head", {}, dtype)
    settings = json.loads((tmp_path / "head" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert (settings["model_type"], settings["num_hidden_layers"]) == ("llama", 1)
    assert settings["dtype"] == settings["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert settings["rope_theta"] == 500.0
    assert (settings["rope_scaling"]["type"], settings["rope_scaling"]["factor"]) == ("linear", 4.0)
    read = load_head(tmp_path / "head", target, torch.float32).config.rope_parameters or {}
    assert (read["rope_type"], read["factor"], read["rope_theta"]) == ("linear", 4.0, 500.0)


def test_the_table_of_shapes_is_the_modules_own() -> None:
    config = LlamaConfig(
        hidden_size=24, intermediate_size=20, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        vocab_size=11,
    )  # fmt: skip
    shapes = tensor_shapes(config)
    head = DraftHead(config, torch.zeros(11, 24), torch.zeros(11, 24), tensors=shapes)
    assert shapes.pop("embed_tokens.weight") == (11, 24)
    assert shapes == {name: tuple(weight.shape) for name, weight in head.trained().items()}


@pytest.mark.parametrize("name", ["math", "chat", "code"])
def test_a_shipped_head_is_as_it_would_be_saved_now(name: str, target_directory: Path, tmp_path: Path) -> None:
    shipped = PROJECT / "specialists" / name
    settings = json.loads((shipped / "config.json").read_text())
    save_head(load_head(shipped, target_directory, torch.float32), tmp_path, settings["taps"], torch.bfloat16)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again | {"transformers_version": settings["transformers_version"]} == settings
    assert weights_digest(tmp_path) == weights_digest(shipped)
