"""The BERT-tokenised transformer of LDM's text-to-image model (Rombach et al. 2022, section 4.3.1).

Its tokens are bert-base-uncased's WordPiece; its weights were trained with the UNet and are not BERT's. diffusers calls
it `LDMBertModel`, whose parameter names and config fields these are. The layout model's transformer is the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer

from models.config import UnsupportedStructure
from models.config.fields import MOST_LAYERS, check_sizes
from models.text import STEM, TextConditioner, load_tokenizer, save_tokenizer
from models.weights_io.configs import read_config
from models.weights_io.files import Reading
from models.weights_io.tensors import LazyTensor, WeightsError, assign, write_json, write_tensors

PREFIX = "model."
"""Before every key of an LDMBertModel but those of `to_logits`, which nothing uses."""


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Pre-norm transformer with learned positions; q, k and v are `encoder_attention_heads * head_dim` wide."""

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280

    def __post_init__(self) -> None:
        check_sizes(self, *(field.name for field in dataclasses.fields(self)))
        check_sizes(self, "encoder_layers", most=MOST_LAYERS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Of a config.json as transformers writes it, most of whose fields concern training alone."""
        for name, only in (("activation_function", "gelu"), ("scale_embedding", False)):
            if data.get(name, only) != only:
                raise UnsupportedStructure(f"{cls.__name__}: {name}={data[name]!r} is not supported; expected {only!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": ["LDMBertModel"], "model_type": "ldmbert", **dataclasses.asdict(self)}


class SelfAttention(nn.Module):
    """Every token attends to every token, padding included: the model was trained without a mask."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.encoder_attention_heads
        inner = self.heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, L, d]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return out


class BertTransformer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[N, L] ids -> [N, L, D]."""
        h = self.embed_tokens(token_ids) + self.embed_positions.weight[: token_ids.shape[1]]
        for layer in self.layers:
            h = layer(h)
        out: Tensor = self.layer_norm(h)
        return out

    @classmethod
    def of_tensors(
        cls, config: BertConfig, tensors: Mapping[str, LazyTensor], path: Path, dtype: torch.dtype | None
    ) -> Self:
        """With the weights that `path` holds, as `assign` takes them. Raises WeightsError."""
        with torch.device("meta"):
            transformer = cls(config)
        used = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if "to_logits." not in key}
        assign(transformer, used, path, dtype)
        return transformer

    @classmethod
    def load(cls, config: BertConfig, folder: Path, reading: Reading) -> Self:
        """From the weights in `folder`. Raises WeightsError."""
        return cls.of_tensors(config, *reading.weights(folder, STEM), reading.dtype)

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        tensors = {PREFIX + key: tensor for key, tensor in self.state_dict().items()}
        write_tensors(folder / f"{STEM}.safetensors", tensors, dtype)


class BertEncoder(TextConditioner):
    """Prompts of the LDM text-to-image model, padded with [PAD] to the transformer's length."""

    def __init__(self, tokenizer: BertTokenizer, transformer: BertTransformer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer

    @classmethod
    def load(cls, folder: Path, reading: Reading = Reading()) -> BertEncoder:  # noqa: B008  # frozen
        """From `folder`/tokenizer and `folder`/bert of a diffusers folder; reaches no hub. Raises WeightsError."""
        tokenizer = load_tokenizer(folder / "tokenizer", BertTokenizer, "vocab.txt")
        config = read_config(folder / "bert" / "config.json", BertConfig.from_dict)
        if len(tokenizer) > config.vocab_size:
            raise WeightsError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, the transformer only {config.vocab_size}"
            )
        return cls(tokenizer, BertTransformer.load(config, folder / "bert", reading))

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """To `folder`/tokenizer and `folder`/bert, as `load` and diffusers read it."""
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        write_json(folder / "bert" / "config.json", self.transformer.config.to_dict())
        self.transformer.save(folder / "bert", dtype)

    @property
    def width(self) -> int:
        return self.transformer.config.d_model

    @property
    def max_tokens(self) -> int:
        return self.transformer.config.max_position_embeddings

    def forward(self, token_ids: Tensor) -> Tensor:
        out: Tensor = self.transformer(token_ids)
        return out
