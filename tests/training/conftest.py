"""Real data at a tiny size."""

from pathlib import Path

import pytest

from training.data import PictureDataset, write_dataset
from training.data.sprites import find_font
from training.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def emoji_font() -> None:
    """Skips where the font is missing; the reason names the command that installs it."""
    try:
        find_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def data_folder(emoji_font: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of 64 pixels."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 48, seed=5, side=64)
    return folder


@pytest.fixture(scope="session")
def data(data_folder: Path) -> PictureDataset:
    return PictureDataset(data_folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder
