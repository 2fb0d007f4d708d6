"""Text conditioning tau_theta(y): a CLIP text transformer and its tokenizer (through transformers)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.weights_io.tensors import WeightsError, assign, read_json, read_tensors, write_json, write_tensors

WEIGHTS = "model.safetensors"
PREFIX = "text_model."
"""Published files have it before every key; the modules of transformers 5 have lost it."""


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Raises WeightsError. (transformers makes a tokenizer of nothing where files are missing.)"""
    whole = (folder / "tokenizer.json").is_file()
    read_json(folder / ("tokenizer.json" if whole else "vocab.json"))
    if not whole and not (folder / "merges.txt").is_file():
        raise WeightsError(f"{folder / 'merges.txt'} is missing; vocab.json does not go without it")
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises no narrower class
        raise WeightsError(f"{folder}: no CLIP tokenizer can be read from it: {error}") from error
    return tokenizer


class TextEncoder(nn.Module):
    """Prompt -> tokens [1, L, D]: last hidden state after the final norm, causal mask only, as in SD 1 and 2."""

    def __init__(self, tokenizer: CLIPTokenizer, transformer: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer, config: CLIPTextConfig) -> TextEncoder:
        return cls(tokenizer, CLIPTextModel(config))

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        """From `folder`/tokenizer and `folder`/text_encoder of a diffusers folder; reaches no hub.

        Raises WeightsError. (transformers' own loader only warns of a missing key and goes on with random weights.)
        """
        tokenizer = _load_tokenizer(folder / "tokenizer")
        encoder = cls.create(tokenizer, CLIPTextConfig.from_dict(read_json(folder / "text_encoder" / "config.json")))
        config = encoder.transformer.config
        if len(tokenizer) > config.vocab_size or encoder.max_tokens > config.max_position_embeddings:
            raise WeightsError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens and {encoder.max_tokens} places, "
                f"the text encoder only {config.vocab_size} and {config.max_position_embeddings}"
            )
        path = folder / "text_encoder" / WEIGHTS
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(path).items()}
        weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...; older files store them
        assign(encoder.transformer, weights, path)
        return encoder

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """To `folder`/tokenizer and `folder`/text_encoder, as `load`, diffusers and transformers (4 and 5) read it."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt
        config = {"architectures": ["CLIPTextModel"], **self.transformer.config.to_diff_dict()}
        write_json(folder / "text_encoder" / "config.json", config)
        weights = {PREFIX + key: tensor for key, tensor in self.transformer.state_dict().items()}
        write_tensors(folder / "text_encoder" / WEIGHTS, weights, dtype)

    @property
    def width(self) -> int:
        """D of the context."""
        return int(self.transformer.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """Context length L, start and end tokens included."""
        return int(self.tokenizer.model_max_length)

    def token_ids(self, prompts: list[str]) -> Tensor:
        """[N, L] ids, padded and truncated to L."""
        encoded = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids

    def lost_words(self, prompt: str) -> str:
        """The end of the prompt that does not fit into L tokens, "" if all of it does."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        kept = self.max_tokens - 2
        return str(self.tokenizer.decode(ids[kept:])).strip() if len(ids) > kept else ""

    def split_words(self, prompt: str) -> list[str]:
        """Words of the prompt that are not one token each; in a small vocabulary these are the unknown ones."""
        words = dict.fromkeys("".join(c if c.isalnum() else " " for c in prompt.lower()).split())
        return [w for w in words if len(self.tokenizer(w, add_special_tokens=False).input_ids) > 1]

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [N, L] -> context [N, L, D]."""
        hidden: Tensor = self.transformer(input_ids=token_ids).last_hidden_state
        return hidden

    def encode(self, prompt: str) -> Tensor:
        """One prompt -> context [1, L, D] on the encoder's device."""
        context: Tensor = self(self.token_ids([prompt]).to(next(self.parameters()).device))
        return context
