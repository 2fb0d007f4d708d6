"""Prompts as context: what text encoders share, and CLIP's text transformer with its tokenizer (through transformers).

CLIP conditions Stable Diffusion. In folders of SD 1 it is CLIP-L (quick GELU, padded with the end token); in those of
SD 2 OpenCLIP's ViT-H (GELU, 23 layers of 24, padded with "!"), whose files say so themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    TokenizersBackend,
)

from models.conditioning import Condition, Conditioner
from models.config.fields import MOST_LAYERS, check_choices, check_sizes
from models.weights_io.configs import read_config
from models.weights_io.files import Reading
from models.weights_io.tensors import LazyTensor, WeightsError, assign, read_json, write_json, write_tensors

STEM = "model"
"""What files of weights are called in transformers' folders."""
PREFIX = "text_model."
"""Published files have it before every key of a CLIPTextModel; that of transformers 5 has lost it."""


class TextConditioner(Conditioner):
    """Prompt -> tokens of a fixed number L. A subclass's `forward` makes context [N, L, D] of token ids [N, L]."""

    tokenizer: TokenizersBackend

    @property
    def max_tokens(self) -> int:
        """Context length L, start and end tokens included."""
        raise NotImplementedError

    @property
    def blank(self) -> Condition:
        return ""

    @property
    def learns_unconditional(self) -> bool:
        return True

    def token_ids(self, prompts: list[str]) -> Tensor:
        """[N, L] ids, padded and truncated to L."""
        return token_ids(self.tokenizer, prompts, self.max_tokens)

    def encode(self, condition: Condition) -> Tensor:
        if not isinstance(condition, str):
            raise ValueError(f"{condition!r} is no prompt; this model takes text")
        context: Tensor = self(self.token_ids([condition]).to(next(self.parameters()).device))
        return context

    def lost_words(self, prompt: str) -> str:
        """The end of the prompt that does not fit into L tokens, "" if all of it does."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        kept = self.max_tokens - 2
        return str(self.tokenizer.decode(ids[kept:])).strip() if len(ids) > kept else ""

    def split_words(self, prompt: str) -> list[str]:
        """Words of the prompt that are not one token each; in a small vocabulary these are the unknown ones."""
        words = dict.fromkeys("".join(c if c.isalnum() else " " for c in prompt.lower()).split())
        return [w for w in words if len(self.tokenizer(w, add_special_tokens=False).input_ids) > 1]


def token_ids(tokenizer: TokenizersBackend, prompts: list[str], length: int) -> Tensor:
    """[N, length], padded and truncated."""
    encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


Tokenizer = TypeVar("Tokenizer", bound=TokenizersBackend)


def load_tokenizer(folder: Path, kind: type[Tokenizer], *files: str) -> Tokenizer:
    """From `folder`/tokenizer.json, or where that is missing from `files`; reaches no hub.

    Raises WeightsError. (transformers makes a tokenizer of nothing where files are missing.)
    """
    whole = (folder / "tokenizer.json").is_file()
    if whole:
        read_json(folder / "tokenizer.json")
    elif missing := [name for name in files if not (folder / name).is_file()]:
        raise WeightsError(
            f"{folder / missing[0]} is missing; expected {' and '.join(files)}, or tokenizer.json instead"
        )
    try:
        tokenizer: Tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises no narrower class
        raise WeightsError(f"{folder}: no {kind.__name__} can be read from it: {error}") from error
    return tokenizer


def save_tokenizer(tokenizer: TokenizersBackend, folder: Path) -> None:
    """As `load_tokenizer`, diffusers and transformers (4 and 5) read it."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # the vocabulary in its older files


Clip = TypeVar("Clip", CLIPTextModel, CLIPTextModelWithProjection)


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises WeightsError."""
    return load_tokenizer(folder, CLIPTokenizer, "vocab.json", "merges.txt")


def read_clip(kind: type[Clip], folder: Path, reading: Reading, tokenizer: TokenizersBackend) -> Clip:
    """From `folder`, one part of a diffusers folder. Raises WeightsError.

    (transformers' own loader only warns of a missing key and goes on with random weights.)
    """
    config = read_config(folder / "config.json", _clip_config)
    tensors, path = reading.weights(folder, STEM)
    return clip_of_tensors(kind, config, tensors, path, reading.dtype, tokenizer)


def _clip_config(data: Mapping[str, Any]) -> CLIPTextConfig:
    """Raises UnsupportedStructure, ValueError."""
    try:
        config: CLIPTextConfig = CLIPTextConfig.from_dict(dict(data))
    except Exception as error:  # those of a validator that transformers takes from elsewhere
        raise ValueError(f"no config of a CLIPTextModel: {error}") from error
    check_sizes(config, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    check_sizes(config, "max_position_embeddings")
    check_sizes(config, "num_hidden_layers", most=MOST_LAYERS)
    check_choices(config, hidden_act=("gelu", "quick_gelu"))
    return config


def clip_of_tensors(
    kind: type[Clip],
    config: CLIPTextConfig,
    tensors: Mapping[str, LazyTensor],
    path: Path,
    dtype: torch.dtype | None,
    tokenizer: TokenizersBackend,
) -> Clip:
    """With the weights that `path` holds, as `assign` takes them. Raises WeightsError, also where the tokenizer has
    more tokens or places than the model."""
    with torch.device("meta"):
        clip = kind(config)
    places = config.max_position_embeddings
    if len(tokenizer) > config.vocab_size or tokenizer.model_max_length > places:
        raise WeightsError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens and {tokenizer.model_max_length} places, "
            f"the text encoder only {config.vocab_size} and {places}"
        )
    # 0, 1, 2, ...; older files store them.
    weights = {key: tensor for key, tensor in tensors.items() if not key.endswith("embeddings.position_ids")}
    if isinstance(clip, CLIPTextModelWithProjection):
        text = clip.text_model
    else:
        text, weights = clip, {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    assign(clip, weights, path, dtype)
    text.embeddings.register_buffer("position_ids", torch.arange(places)[None], persistent=False)
    return clip


def write_clip(clip: CLIPTextModel | CLIPTextModelWithProjection, folder: Path, dtype: torch.dtype | None) -> None:
    """As `read_clip`, diffusers and transformers (4 and 5) read it."""
    write_json(folder / "config.json", {"architectures": [type(clip).__name__], **clip.config.to_diff_dict()})
    prefix = "" if isinstance(clip, CLIPTextModelWithProjection) else PREFIX
    weights = {prefix + key: tensor for key, tensor in clip.state_dict().items()}
    write_tensors(folder / f"{STEM}.safetensors", weights, dtype)


class TextEncoder(TextConditioner):
    """CLIP: last hidden state after the final norm, causal mask only, as in SD 1 and 2."""

    def __init__(self, tokenizer: CLIPTokenizer, transformer: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer, config: CLIPTextConfig) -> TextEncoder:
        return cls(tokenizer, CLIPTextModel(config))

    @classmethod
    def load(cls, folder: Path, reading: Reading = Reading()) -> TextEncoder:  # noqa: B008  # frozen
        """From `folder`/tokenizer and `folder`/text_encoder of a diffusers folder. Raises WeightsError."""
        tokenizer = load_clip_tokenizer(folder / "tokenizer")
        return cls(tokenizer, read_clip(CLIPTextModel, folder / "text_encoder", reading, tokenizer))

    @classmethod
    def of_tensors(
        cls,
        tokenizer: CLIPTokenizer,
        config: CLIPTextConfig,
        tensors: Mapping[str, LazyTensor],
        path: Path,
        dtype: torch.dtype | None,
    ) -> TextEncoder:
        """As `clip_of_tensors`."""
        return cls(tokenizer, clip_of_tensors(CLIPTextModel, config, tensors, path, dtype, tokenizer))

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """To `folder`/tokenizer and `folder`/text_encoder, as `load`, diffusers and transformers (4 and 5) read it."""
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        write_clip(self.transformer, folder / "text_encoder", dtype)

    @property
    def width(self) -> int:
        return int(self.transformer.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        return int(self.tokenizer.model_max_length)

    def forward(self, token_ids: Tensor) -> Tensor:
        hidden: Tensor = self.transformer(input_ids=token_ids).last_hidden_state
        return hidden
