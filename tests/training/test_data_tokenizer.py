"""The tokenizer folder, read by transformers as the model's code reads it."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from training.data import example
from training.tokenizer import COMMON_WORDS, MAX_LENGTH, build_tokenizer, caption_words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return loaded


def test_the_vocabulary_is_small(tokenizer: CLIPTokenizer) -> None:
    assert 512 < len(tokenizer) < 1500
    assert tokenizer.model_max_length == MAX_LENGTH == 24
    assert tokenizer.pad_token == "<|endoftext|>"


def test_every_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    for word in (*caption_words(), *COMMON_WORDS.split()):
        assert len(tokenizer(word).input_ids) == 3, word


def test_every_caption_is_one_token_per_word_and_fits(tokenizer: CLIPTokenizer) -> None:
    for index in range(2000):
        _, text = example(1, index)
        words = text.replace(",", " ,").split()
        ids = tokenizer(text).input_ids
        assert len(ids) == len(words) + 2 <= MAX_LENGTH
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).split() == words


def test_start_end_and_padding_stand_where_clip_expects_them(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("A Pizza on a BLUE background", padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert ids[7:] == [tokenizer.eos_token_id] * (MAX_LENGTH - 7)
    assert ids == tokenizer("a pizza  on a blue background", padding="max_length").input_ids


@pytest.mark.parametrize("text", ["zyx qwv", "Ein Käse für 3 €", "日本語のピザ 🍕", "it's <3!!", "\x00\x7f"])
def test_any_text_encodes_without_loss(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids
    assert tokenizer.eos_token_id not in ids  # it doubles as the unknown token
    kept = str(tokenizer.decode(ids)).replace(" ", "")
    assert kept == text.lower().replace(" ", "")


def test_the_folder_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_tokenizer(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_truncation_keeps_the_end_token(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("pizza " * 50, truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == tokenizer.eos_token_id
