"""The EAGLE draft head: one decoder layer that predicts the target's next feature.

`hidden_i = layer(fc([embedding(t_{i+1}); feature_i]))` approximates feature_{i+1}; the target's own `lm_head`
turns it into the distribution of t_{i+2} (EAGLE, Li et al. 2401.15077, section 3). EAGLE-2 and HASS heads are
this module; they differ in how they are trained and grown.

Knows tensors; nothing of trees or files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

_RIDGE = 0.01  # of each input's own variance


class HeadAttention(Protocol):
    """What a head's rows attend to: a `Packed` in drafting, an `Alignment` in training."""

    attention_name: str  # registered with transformers

    def layer_masks(self) -> Any:
        """What the registered function is given as its attention mask."""
        ...


class DraftHead(nn.Module):
    """A draft head with the frozen ends it shares with its target."""

    def __init__(
        self,
        config: LlamaConfig,
        embeddings: Tensor,
        lm_head: Tensor,
        draft_vocab: Tensor | None = None,
        tensors: Collection[str] = (),
        own_embeddings_for: str | None = None,
    ) -> None:
        """Args: embeddings, lm_head: [V, H] of the target; draft_vocab: [D] ids the head may draft; tensors:
        names of its weights, which say what biases and norms it has; own_embeddings_for: the fingerprint of the
        target, where `embeddings` are not the target's but came with the head.
        """
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.own_embeddings_for = own_embeddings_for
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        layer: Any = LlamaDecoderLayer(config, 0)
        if "layers.0.input_layernorm.weight" not in tensors:
            layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self._add_biases(tensors)
        self.rotary = LlamaRotaryEmbedding(config)
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings, persistent=False)
        rows = lm_head if draft_vocab is None else lm_head[draft_vocab]
        self.lm_head = nn.Linear(hidden, rows.shape[0], bias=False)
        self.lm_head.weight = nn.Parameter(rows.contiguous(), requires_grad=False)
        ids = torch.arange(lm_head.shape[0]) if draft_vocab is None else draft_vocab
        self.draft_vocab: Tensor
        self.register_buffer("draft_vocab", ids, persistent=False)

    def _add_biases(self, tensors: Collection[str]) -> None:
        """Just those that `tensors` names: heads for Qwen2 have them on q, k and v alone, others on fc."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                biased = f"{name}.bias" in tensors
                module.register_parameter(
                    "bias", nn.Parameter(torch.zeros(module.out_features)) if biased else None
                )

    @torch.no_grad()
    def fit_inputs(self, examples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Set fresh input weights to the linear map nearest to the next feature, by ridge regression.

        From there the layer learns what a line misses; from random weights it first has to find out that
        features are larger than embeddings and how they follow each other. Raises ValueError without examples.

        Args: examples: batches of tokens [n]: t_{i+1}; features [n, H]: feature_i; labels [n, H]: the next one.
        """
        hidden = self.embeddings.shape[1]
        inputs, products = torch.zeros(2 * hidden, 2 * hidden), torch.zeros(2 * hidden, hidden)
        for tokens, features, labels in examples:
            x = torch.cat([nn.functional.embedding(tokens, self.embeddings), features], dim=-1).float()
            inputs += x.T @ x
            products += x.T @ labels.float()
        if not inputs.any():
            raise ValueError("the input weights of a head are fitted to examples, and there is none")
        variances = inputs.diagonal()
        variances += _RIDGE * variances.clamp_min(float(variances.max()) * 1e-6)
        self.fc.weight.copy_(torch.linalg.solve(inputs.double(), products.double()).T)

    def forward(self, tokens: Tensor, features: Tensor, positions: Tensor, attention: HeadAttention) -> Tensor:
        """Predicted features [B, T, H].

        Args: tokens [B, T]: t_{i+1}; features [B, T, H]: feature_i, of the target or predicted; positions
        [B, T]: i; attention: what the rows see.
        """
        embedded = nn.functional.embedding(tokens, self.embeddings)
        x = self.fc(torch.cat([embedded, features.to(embedded.dtype)], dim=-1))
        self.config._attn_implementation = attention.attention_name
        out: Tensor = self.layers[0](
            x,
            attention_mask=attention.layer_masks(),
            position_embeddings=self.rotary(x, positions),
            packed=attention,
        )
        return out

    def trained(self) -> dict[str, Tensor]:
        """The head's own weights, under the names of the EAGLE checkpoint layout."""
        return {
            name: weight for name, weight in self.state_dict().items() if name.startswith(("fc.", "layers."))
        }

    def remade(self, weights: Mapping[str, Tensor], lm_head: Tensor, draft_vocab: Tensor | None) -> DraftHead:
        """This head with other weights, of the names and shapes of its own, and another draft vocabulary."""
        head = DraftHead(self.config, self.embeddings, lm_head, draft_vocab, weights, self.own_embeddings_for)
        head.load_state_dict(weights, strict=False)
        return head


def draft_config(target_config: Any) -> LlamaConfig:
    """A one-layer config with the target's shapes, for training a new head."""
    text = target_config.get_text_config()
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters=text.rope_parameters,
        tie_word_embeddings=False,
    )
