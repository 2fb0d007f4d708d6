"""Files of low-rank adapters, read for one model. Everything is checked before use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.lora import Adapter, LowRank
from models.lora_formats import WRAPPER, Names, Part, Role
from models.text import TextEncoder
from models.text_pair import TextPairEncoder
from models.unet import UNet
from models.weights_io.key_maps import unet_sources
from models.weights_io.tensors import WeightsError, read_json

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

FOLDER: Final = "loras"
"""Of a model folder: <name>.safetensors each."""
_SETTINGS: Final = "lora_adapter_metadata"
_LISTED: Final = 20


def load_adapter(path: Path, model: LatentDiffusion) -> Adapter:
    """Raises WeightsError for a missing, truncated or other file, and with all that does not fit the model."""
    return _Reader(model).load(path)


def load_adapters(folder: Path, model: LatentDiffusion) -> dict[str, Adapter]:
    """Of `folder`/loras by name, that is file name. Raises WeightsError for the first that is broken or of another
    model. Tensors are read from disk when they are used."""
    paths = sorted((folder / FOLDER).glob("*.safetensors"))
    reader = _Reader(model) if paths else None
    return {path.stem: reader.load(path) for path in paths if reader is not None}


def copy_adapter(source: Path, target: Path) -> None:
    """Into one file: the settings that peft keeps in a file of their own go into the header."""
    tensors, settings = _read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_suffix(".partial")
    save_file(tensors, whole, {"format": "pt", _SETTINGS: json.dumps(settings)} if settings else {"format": "pt"})
    whole.replace(target)


class _Target(NamedTuple):
    """A module that adapters can change: its name within UNet or conditioner, and the shape of its weight."""

    name: str
    shape: torch.Size


class _Reader:
    """For one model, whose names are worked out once."""

    def __init__(self, model: LatentDiffusion) -> None:
        self._targets: dict[Part, dict[str, _Target]] = {"unet": _targets(model.unet)}
        match model.conditioner:
            case TextEncoder() as text:
                self._targets["text_encoder"] = _targets(text.transformer, "transformer.")
            case TextPairEncoder() as text:
                self._targets["text_encoder"] = _targets(text.text_encoder, "text_encoder.")
                self._targets["text_encoder_2"] = _targets(text.text_encoder_2, "text_encoder_2.")
        self._names = Names(self._targets, _original_names(model.unet, self._targets["unet"]))

    def load(self, path: Path) -> Adapter:
        tensors, settings = _read(path)
        found, problems = self._sort(tensors)
        low_ranks: dict[Part, dict[str, LowRank]] = {part: {} for part in self._targets}
        for (part, module), roles in found.items():
            target = self._targets[part][module]
            try:
                low_ranks[part][target.name] = _low_rank(roles, target.shape, _Alpha(settings, part, module))
            except ValueError as error:
                problems.append(f"{module} {error}")
        if not problems and not found:
            problems.append("it holds no tensors")
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise WeightsError(f"{path} is no adapter of this model: {'; '.join(problems[:_LISTED])}{more}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        unet = low_ranks.pop("unet")
        return Adapter(unet, {name: one for text in low_ranks.values() for name, one in text.items()}, digest)

    def _sort(self, tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[Part, str], dict[Role, Tensor]], list[str]]:
        """By module, and what belongs to none."""
        found: dict[tuple[Part, str], dict[Role, Tensor]] = {}
        problems = []
        for key, tensor in sorted(tensors.items()):
            place = self._names.place(key)
            if place is None:
                problems.append(f"unexpected {key}")
            elif place.module not in self._targets.get(place.part, {}):
                problems.append(f"unexpected {key}: the model has no such module")
            else:
                found.setdefault((place.part, place.module), {})[place.role] = tensor
        return found, problems


def _targets(root: nn.Module, prefix: str = "") -> dict[str, _Target]:
    """By the names that files use, without WRAPPER."""
    return {
        name.removeprefix(WRAPPER): _Target(prefix + name, module.weight.shape)
        for name, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _original_names(unet: UNet, targets: Mapping[str, _Target]) -> dict[str, str]:
    """Names of the modules by those of the original layout, where these are whole modules there, too."""
    names = {}
    for name, target in targets.items():
        key = f"{name}.weight"
        try:
            source = unet_sources(unet.config, {key: tuple(target.shape)})[key]
        except KeyError:  # of a block that the original layout does not have
            continue
        if source.pick is None:
            names[source.key.removesuffix(".weight")] = name
    return names


def _low_rank(roles: Mapping[Role, Tensor], shape: torch.Size, alpha: _Alpha) -> LowRank:
    """Raises ValueError for what is missing or misshapen; the module's name comes before it."""
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        raise ValueError(f"lacks {' and '.join(missing)}")
    down, up = roles["down"], roles["up"]
    rank = down.shape[0] if down.dim() else 0
    down_shapes = {(rank, *shape[1:])}
    if math.prod(shape[2:]) == 1:  # a 1x1 convolution and a linear are one another's equal: [o, i, 1, 1] and [o, i]
        down_shapes = {(rank, shape[1]), (rank, shape[1], 1, 1)}
    up_shapes = {(shape[0], rank), (shape[0], rank, 1, 1)}
    if rank == 0 or tuple(down.shape) not in down_shapes or tuple(up.shape) not in up_shapes:
        expected = f"[r, {', '.join(map(str, shape[1:]))}], [{shape[0]}, r]"
        raise ValueError(
            f"is down {list(down.shape)}, up {list(up.shape)}; expected {expected} for its weight {list(shape)}"
        )
    if "alpha" in roles and roles["alpha"].numel() != 1:
        raise ValueError(f"has an alpha of shape {list(roles['alpha'].shape)}, expected one number")
    given = float(roles["alpha"].item()) if "alpha" in roles else None
    return LowRank(down.reshape(rank, *shape[1:]), up.flatten(1), alpha.scale(rank, given))


class _Alpha:
    """What peft's settings say of one module: `lora_alpha`, or of `alpha_pattern` what names it, by name or ending."""

    def __init__(self, settings: Mapping[str, Any], part: Part, module: str) -> None:
        own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
        if not own and part == "unet":  # peft's own file has no prefixes
            own = {key: value for key, value in settings.items() if "." not in key}
        self._value = own.get("lora_alpha")
        self._root = bool(own.get("use_rslora"))
        patterns = own.get("alpha_pattern")
        for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
            name = pattern.removeprefix("^")
            if module == name or (name == pattern and module.endswith("." + name)):
                self._value = value
                break

    def scale(self, rank: int, given: float | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023); 1 where there is no alpha."""
        value = self._value if given is None else given
        if value is None:
            return 1.0
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"has alpha {value!r}, expected a number")
        return value / (math.sqrt(rank) if self._root else rank)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors and peft's settings: those of its header, or of the `adapter_config.json` beside it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error
    if _SETTINGS not in metadata:
        beside = path.with_name("adapter_config.json")
        native = beside.is_file() and any(key.startswith("base_model.") for key in tensors)
        return tensors, read_json(beside) if native else {}
    try:
        settings = json.loads(metadata[_SETTINGS])
    except ValueError as error:
        raise WeightsError(f"{path}: its {_SETTINGS} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path}: its {_SETTINGS} is a {type(settings).__name__}, expected an object")
    return tensors, settings
