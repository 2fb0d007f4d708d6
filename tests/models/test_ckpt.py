"""Pickled checkpoints: tensors come out of them, and nothing that they name is ever called."""

import argparse
import collections
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.weights_io.ckpt import open_pickle
from models.weights_io.tensors import WeightsError

TENSORS = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.half": torch.arange(6.0).half().reshape(2, 3),
    "model.bfloat": torch.arange(6.0).bfloat16(),
    "model.transposed": torch.arange(12.0).reshape(3, 4).t(),
    "model.part": torch.arange(20.0)[5:9],
    "model.scalar": torch.tensor(0.18215),
    "model.count": torch.tensor(7),
    "model.empty": torch.zeros(0, 3),
    "model.bool": torch.tensor([True, False]),
}


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = open_pickle(path)
    assert found.keys() == expected.keys()
    for key, lazy in found.items():
        tensor = lazy.read()
        assert lazy.shape == tuple(tensor.shape)
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_tensors_come_back(tmp_path: Path, new: bool, wrapped: bool) -> None:
    path = tmp_path / "model.ckpt"
    data: Any = {"state_dict": TENSORS, "global_step": 470000} if wrapped else TENSORS
    torch.save(data, path, _use_new_zipfile_serialization=new)
    assert_same(path, TENSORS)


def test_parameters_and_modules_state(tmp_path: Path) -> None:
    """state_dict() of a module is an OrderedDict with `_metadata`; parameters have a function of their own."""
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict() | {"parameter": module.weight}, tmp_path / "a.ckpt")
    torch.save(module.state_dict(), tmp_path / "b.ckpt")
    expected = {"weight": module.weight.data, "bias": module.bias.data}
    assert_same(tmp_path / "a.ckpt", expected | {"parameter": module.weight.data})
    assert_same(tmp_path / "b.ckpt", expected)


def package(name: str) -> types.ModuleType:
    """A training framework that the reader of a checkpoint does not have; using it fails the test."""
    module = types.ModuleType(name)

    class Callback:
        def __init__(self, value: int = 0) -> None:
            self.value = value

        def __setstate__(self, state: object) -> None:
            raise AssertionError("called")

    class Parameters(dict[str, object]): ...

    def rebuild(*_: object) -> object:
        raise AssertionError("called")

    for one in (Callback, Parameters, rebuild):
        one.__module__, one.__qualname__ = name, one.__name__
        setattr(module, one.__name__, one)
    return module


def test_what_training_left_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps callbacks and hyper-parameters; none of their classes is imported or called."""
    framework = package("pytorch_lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", framework)

    class Rebuilt:
        def __reduce__(self) -> tuple[Any, ...]:
            return (framework.rebuild, (1, 2))

    checkpoint = {
        "callbacks": {framework.Callback: {"best": framework.Callback(3)}},
        "hyper_parameters": framework.Parameters(lr=1e-4),
        "rebuilt": Rebuilt(),
        "args": argparse.Namespace(seed=3, where=Path("logs")),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "set": {1, 2},
        "bytes": b"abc",
        "dtype": torch.float16,
        "state_dict": TENSORS,
    }
    path = tmp_path / "lightning.ckpt"
    torch.save(checkpoint, path)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert_same(path, TENSORS)
    assert "pytorch_lightning" not in sys.modules


class Code:
    """Runs `function(*arguments)` in whoever unpickles it the usual way."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def attacks(marker: Path) -> dict[str, Code]:
    import os
    import runpy
    import subprocess

    return {
        "shell": Code(os.system, f"touch {marker}"),
        "process": Code(subprocess.Popen, ["touch", str(marker)]),
        "exec": Code(exec, f"open({str(marker)!r}, 'w')"),
        "open": Code(open, str(marker), "w"),
        "import": Code(__import__, "this"),
        "getattr": Code(getattr, "", "join"),
        "runpy": Code(runpy.run_path, str(marker)),
    }


@pytest.mark.parametrize("kind", list(attacks(Path("marker"))))
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_code_is_never_run(tmp_path: Path, kind: str, form: str) -> None:
    marker = tmp_path / "marker"
    data = {"state_dict": TENSORS, "callbacks": attacks(marker)[kind]}
    path = tmp_path / "model.ckpt"
    if form == "plain":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=r"nothing of it was run") as caught:
        open_pickle(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    if kind == "shell" and form == "zip":
        pickle.loads(pickle.dumps(attacks(marker)[kind]))
        assert marker.exists(), "the attack is no attack: this test could not fail"


def test_functions_of_other_packages_are_not_called(tmp_path: Path) -> None:
    """They need not be refused: a stand-in takes their place."""
    marker = tmp_path / "marker"
    data = {"code": Code(torch.save, TENSORS, str(marker)), "state_dict": TENSORS}
    path = tmp_path / "model.ckpt"
    torch.save(data, path)
    assert_same(path, TENSORS)
    assert not marker.exists()


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 10, 100, 400, -1, -30])
def test_truncated(tmp_path: Path, new: bool, kept: int) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.ckpt"):
        [lazy.read() for lazy in open_pickle(path).values()]


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if (kept := change(name, data)) is not None:
                archive.writestr(name, kept)


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"

    def fails(change: Callable[[str, bytes], bytes | None], message: str) -> None:
        torch.save({"weight": torch.arange(4.0)}, path)
        rewritten(path, change)
        with pytest.raises(WeightsError, match=message):
            [lazy.read() for lazy in open_pickle(path).values()]

    fails(lambda name, data: None if name.endswith("data/0") else data, "lacks the record data/0")
    fails(lambda name, data: data[:8] if name.endswith("data/0") else data, "not of the size")
    fails(lambda name, data: None if name.endswith("data.pkl") else data, "0 data.pkl, expected one")
    fails(lambda name, data: b"big" if name.endswith("byteorder") else data, "other byte order")
    fails(lambda name, data: data.replace(b"K\x04\x85", b"K\x09\x85") if name.endswith(".pkl") else data, "outside")
    fails(lambda name, data: pickle.dumps([1, 2]) if name.endswith(".pkl") else data, "no tensors by name")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        open_pickle(tmp_path / "nowhere.ckpt")


def test_a_compressed_pickle(tmp_path: Path) -> None:
    """torch writes none, and a small file could unfold to any size."""
    torch.save(TENSORS, tmp_path / "model.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "model.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "other.ckpt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in plain.namelist():
            other.writestr(name, plain.read(name))
    with pytest.raises(WeightsError, match=r"data.pkl is compressed"):
        open_pickle(tmp_path / "other.ckpt")
