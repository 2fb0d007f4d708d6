"""Prompts to context, against diffusers' `encode_prompt` and transformers' own loader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from models.latent_diffusion import LatentDiffusion
from models.text import TextEncoder
from models.weights_io.files import Reading
from tests.models.small import diffusers

PROMPTS = ["a cat", "", "DOG,  cat; dog!", "the quick brown fox jumps over the lazy dog again and again"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_context_is_that_of_diffusers(
    text_model: LatentDiffusion, pipeline_of: Callable[[LatentDiffusion, type[Any]], Any], prompt: str
) -> None:
    pipeline = pipeline_of(text_model, diffusers.StableDiffusionPipeline)
    with torch.no_grad():
        conditional, unconditional = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="dog"
        )
    encoder = text_model.conditioner
    assert isinstance(encoder, TextEncoder)
    assert encoder.encode(prompt).shape == (1, encoder.max_tokens, encoder.width)
    torch.testing.assert_close(encoder.encode(prompt), conditional, rtol=0, atol=5e-6)
    torch.testing.assert_close(encoder.encode("dog"), unconditional, rtol=0, atol=5e-6)


def test_keys_with_and_without_their_prefix_are_read(text_encoder: TextEncoder, tmp_path: Path) -> None:
    """Published files say `text_model.embeddings…`; transformers 5 writes `embeddings…`."""
    text_encoder.save(tmp_path / "published", torch.float32)
    text_encoder.tokenizer.save_pretrained(tmp_path / "bare" / "tokenizer")
    text_encoder.transformer.save_pretrained(tmp_path / "bare" / "text_encoder")
    expected = text_encoder.encode("a cat")
    for name in ("published", "bare"):
        assert torch.equal(TextEncoder.load(tmp_path / name, Reading()).encode("a cat"), expected)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "published" / "text_encoder")
    with torch.no_grad():
        context = theirs(input_ids=text_encoder.token_ids(["a cat"])).last_hidden_state
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)


def test_saving_leaves_the_weights_in_use_alone(text_encoder: TextEncoder, tmp_path: Path) -> None:
    before = text_encoder.encode("a cat")
    text_encoder.save(tmp_path, torch.float16)
    assert torch.equal(text_encoder.encode("a cat"), before)


def test_lost_words_are_those_beyond_the_context(text_encoder: TextEncoder) -> None:
    assert text_encoder.lost_words("cat " * 10) == ""
    assert text_encoder.lost_words("cat " * 10 + "dog cat") == "dog cat"


def test_split_words_are_those_of_several_tokens(text_encoder: TextEncoder) -> None:
    assert text_encoder.split_words("Cat, bird and dog; bird") == ["bird", "and"]
