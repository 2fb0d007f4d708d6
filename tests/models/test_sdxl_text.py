"""SDXL's two text encoders against diffusers' `encode_prompt`, from the folder that ours writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.text_pair import TextPairEncoder, Tokenizers
from models.weights_io.files import Reading
from models.weights_io.folder import load_folder, save_folder
from models.weights_io.tensors import WeightsError
from tests.models.sdxl import sdxl, text_pair
from tests.models.small import diffusers
from tests.models.structures import CONTEXT, POOLED

PROMPTS = ["a cat", "", "DOG,  cat; dog!", "the quick brown fox jumps over the lazy dog again and again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    save_folder(sdxl(folder / "vocabulary"), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> TextPairEncoder:
    pair = load_folder(folder, Reading()).conditioner
    assert isinstance(pair, TextPairEncoder)
    return pair


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


@pytest.mark.parametrize("negative", ["dog", "", None])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_context_and_pooled_text_are_those_of_diffusers(
    pair: TextPairEncoder, pipeline: Any, prompt: str, negative: str | None
) -> None:
    """An empty negative prompt is a text as any other; none at all is zeros."""
    with torch.no_grad():
        conditional, unconditional, pooled, unconditional_pooled = pipeline.encode_prompt(
            prompt, device="cpu", negative_prompt=negative
        )
    for condition, expected, one in (
        (prompt, conditional, pooled),
        (pair.blank if negative is None else negative, unconditional, unconditional_pooled),
    ):
        found = pair.encode_with_pooled(condition)
        assert found.context.shape == (1, pair.max_tokens, pair.width)
        assert found.pooled is not None
        torch.testing.assert_close(found.context, expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(found.pooled, one, rtol=0, atol=5e-6)
        assert torch.equal(pair.encode(condition), found.context)
    assert conditional.std() > 0.01
    assert pooled.std() > 0.1


def test_widths_and_texts(pair: TextPairEncoder) -> None:
    assert (pair.width, pair.pooled_width, pair.max_tokens) == (CONTEXT, POOLED, 12)
    assert pair.token_ids(["cat"])[0, -1] == pair.tokenizer.eos_token_id
    assert pair.tokenizer_2.pad_token_id == 0
    assert pair.lost_words("cat " * 10 + "dog cat") == "dog cat"
    with pytest.raises(ValueError, match="7 is no prompt"):
        pair.encode(7)


def test_a_folder_says_whether_nothing_is_zeros(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True
    save_folder(sdxl(tmp_path / "vocabulary", empty_is_zero=False), tmp_path, dtype=None)
    pair = load_folder(tmp_path, Reading()).conditioner
    assert isinstance(pair, TextPairEncoder)
    assert pair.blank == ""
    assert pair.encode(pair.blank).abs().max() > 0


def test_what_was_written_by_transformers_is_read(folder: Path, pair: TextPairEncoder, pipeline: Any) -> None:
    again = folder / "theirs"
    pipeline.save_pretrained(again)
    loaded = TextPairEncoder.load(again)
    for one, other in zip(loaded.encode_with_pooled("a cat"), pair.encode_with_pooled("a cat"), strict=True):
        assert one is not None
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_tokenizers_of_different_lengths_are_refused(tmp_path: Path) -> None:
    pair, other = text_pair(tmp_path / "one"), text_pair(tmp_path / "other")
    other.tokenizer_2.model_max_length = 11
    with pytest.raises(WeightsError, match="12 and 11 places; expected as many"):
        TextPairEncoder(
            Tokenizers(pair.tokenizer, other.tokenizer_2),  # type: ignore[arg-type]
            pair.text_encoder,
            pair.text_encoder_2,
        )
