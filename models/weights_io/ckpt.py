"""The tensors of a .ckpt or .bin file. Such files are pickles, and a pickle may name any function to be called.

Here nothing that the file names is looked up: `find_class` knows the few names of which tensors are made, and an inert
stand-in takes the place of every other. So a checkpoint with the optimiser, callbacks and hyper-parameters of its
training can be read without the packages they came from.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from models.weights_io.tensors import LazyTensor, WeightsError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PLAIN_MODULES = frozenset(("argparse", "collections", "datetime", "decimal", "enum", "pathlib", "typing", "uuid"))
_PLAIN_TYPES: tuple[type, ...] = (
    bool,
    bytearray,
    bytes,
    complex,
    dict,
    float,
    frozenset,
    int,
    list,
    object,
    range,
    set,
    slice,
    str,
    tuple,
)
_PLAIN_NAMES = frozenset(
    (
        *(("builtins", kind.__name__) for kind in _PLAIN_TYPES),
        *(("copyreg", "_reconstructor"), ("_codecs", "encode"), ("functools", "partial"), ("types", "SimpleNamespace")),
    )
)

# What a pickle that is broken, or not one, can raise in the unpickler.
_BROKEN = (
    *(pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError),
    *(RecursionError, OverflowError, MemoryError, struct.error, UnicodeDecodeError, ImportError),
)


class Inert:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Inert:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...


class CodeError(Exception):
    """A pickle names something that data does not need."""


class _Storage(NamedTuple):
    """Where the numbers of one or more tensors lie in the archive."""

    dtype: torch.dtype
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    """Tensors become LazyTensors; `read` makes one of (storage, offset, size, stride)."""

    def __init__(self, data: bytes, read: Callable[[_Storage, int, tuple[int, ...], tuple[int, ...]], Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, torch's, calls things as Python 2 did.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        root = module.split(".")[0]
        if root in sys.stdlib_module_names and root not in _PLAIN_MODULES and (module, name) not in _PLAIN_NAMES:
            raise CodeError(f"{module}.{name}")
        return Inert

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"no storage: {pid}")
        return _Storage(dtype, str(key), int(numel))

    def _tensor(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> LazyTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without storage")
        size, stride = tuple(map(int, size)), tuple(map(int, stride))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage.numel):
            raise pickle.UnpicklingError(f"a tensor of size {size} outside its storage")
        return LazyTensor(size, lambda: self._read(storage, offset, size, stride))


class _Archive:
    """What `torch.save` writes since torch 1.6: an uncompressed zip file of a pickle and one record per storage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in self._records if name.endswith("/data.pkl") or name == "data.pkl"]
            if len(pickles) != 1:
                raise zipfile.BadZipFile(f"it has {len(pickles)} data.pkl, expected one")
            self._root = pickles[0].removesuffix("data.pkl")
            order = self._root + "byteorder"
            if order in self._records and archive.read(order) != sys.byteorder.encode():
                raise zipfile.BadZipFile("it was written on a machine of the other byte order")
            if self._records[pickles[0]].compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("its data.pkl is compressed, which torch's never is")
            self.pickle = archive.read(pickles[0])
        self._mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)

    def read(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        start = self._start(storage)
        numbers = torch.empty(0, dtype=torch.uint8).set_(self._mapped)  # type: ignore[arg-type]
        numbers = numbers[start : start + storage.numel * storage.dtype.itemsize]
        if start % storage.dtype.itemsize:
            numbers = numbers.clone()
        numbers = numbers.view(storage.dtype)
        return numbers.as_strided(size, stride, numbers.storage_offset() + offset)

    def _start(self, storage: _Storage) -> int:
        """Byte at which the record begins, behind its local header of 30 bytes, a name and an extra field."""
        info = self._records.get(f"{self._root}data/{storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{self._path} lacks the record data/{storage.key}, or has it compressed")
        if info.file_size != storage.numel * storage.dtype.itemsize:
            raise WeightsError(f"{self._path}: the record data/{storage.key} is not of the size that its tensors need")
        with self._path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        start: int = info.header_offset + 30 + name + extra
        if start + info.file_size > self._mapped.nbytes():
            raise WeightsError(f"{self._path} ends within the record data/{storage.key}")
        return start


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of the file, of its `state_dict` where it has one; all else is left out.

    Raises WeightsError for a file that is missing, broken or without tensors, and for one that holds code.
    """
    try:
        data = _read_archive(path) if zipfile.is_zipfile(path) else _read_old(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except CodeError as error:
        raise WeightsError(
            f"{path} holds code: it asks for {error}, which weights do not need; nothing of it was run. "
            "Take the file from a source that you trust, as safetensors if there is a choice"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    named = data.items() if isinstance(data, dict) else ()
    tensors = {str(key): value for key, value in named if isinstance(value, LazyTensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name; expected a checkpoint with a state_dict")
    return tensors


def _broken(path: Path, error: Exception) -> NoReturn:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise WeightsError(f"{path} is no whole checkpoint: {reason}") from error


def _read_archive(path: Path) -> object:
    try:
        archive = _Archive(path)
        return _Unpickler(archive.pickle, archive.read).load()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *_BROKEN) as error:
        if isinstance(error, WeightsError):
            raise
        _broken(path, error)


def _read_old(path: Path) -> object:
    """A file of torch before 1.6, read by torch's own unpickler of tensors and nothing else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write, and refuses
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's text recommends to read the file without its protection.
        raise WeightsError(
            f"{path} is no checkpoint of tensors alone, or broken; nothing of it was run. If it is an old checkpoint "
            "with more than tensors, save its state_dict again with a newer torch"
        ) from error
    except (RuntimeError, *_BROKEN) as error:
        _broken(path, error)
    return _lazily(data)


def _lazily(data: object) -> object:
    if isinstance(data, Tensor):
        return LazyTensor(tuple(data.shape), lambda: data)
    if isinstance(data, dict):
        return {key: _lazily(value) for key, value in data.items()}
    return data
