"""Real data at a tiny size."""

from pathlib import Path

import pytest

from training.data import PictureDataset, write_dataset
from training.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
