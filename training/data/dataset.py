"""Examples by number, in memory or as shards on disk.

Example i of a seed depends on nothing but (seed, i): any process may make any part, and an interrupted write goes on.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from training.data.captions import caption
from training.data.render import Picture, object_box, render
from training.data.scenes import Scene, sample_scene

SHARD_SIZE: Final = 2048
_FORMAT: Final = 1


@dataclass(frozen=True)
class Manifest:
    """What makes two datasets the same; a folder is only added to by the same manifest."""

    n: int
    seed: int
    side: int
    format: int = _FORMAT


def example(seed: int, index: int) -> tuple[Scene, str]:
    """Scene and caption number `index` of the endless sequence that `seed` names."""
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng)
    return scene, caption(scene, rng)


def generate(n: int, seed: int, side: int, start: int = 0) -> tuple[npt.NDArray[np.uint8], list[str], list[Scene]]:
    """Examples start to start + n: pictures [n, side, side, 3], captions, scenes."""
    pictures = np.empty((n, side, side, 3), dtype=np.uint8)
    captions, scenes = [], []
    for row in range(n):
        scene, text = example(seed, start + row)
        pictures[row] = render(scene, side)
        captions.append(text)
        scenes.append(scene)
    return pictures, captions, scenes


def write_dataset(out: str | Path, n: int, seed: int, side: int, processes: int = 1) -> None:
    """Writes shards of 2048 pictures; shards already there are kept. ValueError if the folder holds another dataset."""
    folder, manifest = Path(out), Manifest(n, seed, side)
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "manifest.json"
    if note.exists():
        found = json.loads(note.read_text())
        if found != asdict(manifest):
            raise ValueError(
                f"{folder} holds {found}, not {asdict(manifest)}; choose another folder or delete this one"
            )
    else:
        _write_whole(note, json.dumps(asdict(manifest)).encode())
    missing = [s for s in range(_shards(n)) if not _shard_path(folder, "captions", s).exists()]
    if processes <= 1:
        for shard in missing:
            _write_shard(folder, manifest, shard)
        return
    # A forked child of a process that has started threads (torch does) can hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_write_shard, folder, manifest, shard) for shard in missing]:
            done.result()


class PictureDataset:
    """Read access to what `write_dataset` wrote; pictures stay on disk until asked for."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        note = folder / "manifest.json"
        if not note.exists():
            raise FileNotFoundError(
                f"{note} is missing: {folder} holds no dataset; write one with `darkroom train data`"
            )
        self.manifest = Manifest(**json.loads(note.read_text()))
        shards = range(_shards(self.manifest.n))
        self.captions: list[str] = []
        for shard in shards:
            path = _shard_path(folder, "captions", shard)
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: the write was interrupted; repeat the command to go on")
            self.captions += json.loads(path.read_text())
        self._pictures = [np.load(_shard_path(folder, "pictures", s), mmap_mode="r") for s in shards]
        self.boxes: npt.NDArray[np.int16] = np.concatenate([np.load(_shard_path(folder, "boxes", s)) for s in shards])

    def __len__(self) -> int:
        return self.manifest.n

    def pictures(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """[len(indices), side, side, 3]"""
        return np.stack([self.picture(int(i)) for i in indices])

    def picture(self, index: int) -> Picture:
        shard, row = divmod(index, SHARD_SIZE)
        return np.asarray(self._pictures[shard][row])

    def scene(self, index: int) -> Scene:
        return example(self.manifest.seed, index)[0]


def _shards(n: int) -> int:
    return -(-n // SHARD_SIZE)


def _shard_path(folder: Path, kind: str, shard: int) -> Path:
    return folder / f"{kind}-{shard:05d}.{'json' if kind == 'captions' else 'npy'}"


def _write_shard(folder: Path, manifest: Manifest, shard: int) -> None:
    start = shard * SHARD_SIZE
    pictures, captions, scenes = generate(min(SHARD_SIZE, manifest.n - start), manifest.seed, manifest.side, start)
    boxes = np.asarray([object_box(scene, manifest.side) for scene in scenes], dtype=np.int16)
    for kind, array in (("pictures", pictures), ("boxes", boxes)):
        path = _shard_path(folder, kind, shard)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, array)
        partial.replace(path)
    _write_whole(_shard_path(folder, "captions", shard), json.dumps(captions).encode())  # last: marks the shard whole


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
