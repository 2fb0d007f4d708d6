"""SDXL's text (Podell et al. 2023, section 2.1): CLIP-L and OpenCLIP's ViT-bigG side by side, and a pooled vector."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.conditioning import Condition, Encoded
from models.text import TextConditioner, load_clip_tokenizer, read_clip, save_tokenizer, token_ids, write_clip
from models.weights_io.files import Reading
from models.weights_io.tensors import WeightsError, read_json

EMPTY_IS_ZERO: Final = "force_zeros_for_empty_prompt"
"""As a pipeline's `model_index.json` has it."""


class Tokenizers(NamedTuple):
    """Two vocabularies that are one but for padding: with the end token, and with "!"."""

    first: CLIPTokenizer
    second: CLIPTokenizer


class TextPairEncoder(TextConditioner):
    """Context: what goes into the last layer of both encoders, next to one another, without a final norm. Pooled: the
    second's projected end token.

    With `empty_is_zero` a missing negative prompt is all zeros, context and pooled, which an empty prompt is not.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        *,
        empty_is_zero: bool = True,
    ) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = tokenizers
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.empty_is_zero = empty_is_zero
        if self.tokenizer_2.model_max_length != self.max_tokens:
            raise WeightsError(
                f"two tokenizers of {self.max_tokens} and {self.tokenizer_2.model_max_length} places; expected as many"
            )

    @classmethod
    def load(cls, folder: Path, reading: Reading = Reading()) -> TextPairEncoder:  # noqa: B008  # frozen
        """From the tokenizers and text encoders of a diffusers folder, with and without "_2". Raises WeightsError."""
        tokenizers = Tokenizers(load_clip_tokenizer(folder / "tokenizer"), load_clip_tokenizer(folder / "tokenizer_2"))
        return cls(
            tokenizers,
            read_clip(CLIPTextModel, folder / "text_encoder", reading, tokenizers.first),
            read_clip(CLIPTextModelWithProjection, folder / "text_encoder_2", reading, tokenizers.second),
            empty_is_zero=bool(read_json(folder / "model_index.json").get(EMPTY_IS_ZERO, True)),
        )

    def save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """As `load`, diffusers and transformers read it; `empty_is_zero` belongs to the folder's model_index.json."""
        save_tokenizer(self.tokenizer, folder / "tokenizer")
        save_tokenizer(self.tokenizer_2, folder / "tokenizer_2")
        write_clip(self.text_encoder, folder / "text_encoder", dtype)
        write_clip(self.text_encoder_2, folder / "text_encoder_2", dtype)

    @property
    def width(self) -> int:
        return int(self.text_encoder.config.hidden_size + self.text_encoder_2.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        return self.text_encoder_2.text_projection.out_features

    @property
    def max_tokens(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def blank(self) -> Condition:
        """() is no prompt at all, all zeros."""
        return () if self.empty_is_zero else ""

    def encode(self, condition: Condition) -> Tensor:
        return self.encode_with_pooled(condition).context

    def encode_with_pooled(self, condition: Condition) -> Encoded:
        device, dtype = self.text_encoder_2.device, self.text_encoder_2.dtype
        if condition == ():
            context = torch.zeros(1, self.max_tokens, self.width, device=device, dtype=dtype)
            return Encoded(context, torch.zeros(1, self.pooled_width, device=device, dtype=dtype))
        if not isinstance(condition, str):
            raise ValueError(f"{condition!r} is no prompt; this model takes text")
        ids, ids_2 = (
            token_ids(tokenizer, [condition], self.max_tokens).to(device)
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        hidden = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        second = self.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
        return Encoded(torch.cat([hidden[-2], second.hidden_states[-2]], dim=-1), second.text_embeds)
