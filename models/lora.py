"""Low-rank adapters (LoRA, Hu et al. 2021): h = W x + weight * (alpha / rank) * up(down(x)).

W stays as it is, also with several adapters at once; `merge` is for tools and tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.lora_formats import Names, Part, Role
from models.text import TextEncoder
from models.weights_io.tensors import WeightsError, read_json

if TYPE_CHECKING:
    from models.latent_diffusion import LatentDiffusion

FOLDER = "loras"
"""Of a model folder: <name>.safetensors each."""
_SETTINGS = "lora_adapter_metadata"
_LISTED = 20


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """down [r, in] or [r, in, kh, kw] as the module's weight, up [out, r]; `scale` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """What is added to the module's weight at weight 1, fp32 [out, in(, kh, kw)]."""
        delta = self.scale * (self.up.float() @ self.down.float().flatten(1))
        return delta.reshape(-1, *self.down.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """By module name, of the UNet and of the text encoder's transformer; on the CPU, in the file's dtype."""

    unet: Mapping[str, LowRank]
    text: Mapping[str, LowRank]
    digest: str


Uses = Sequence[tuple[Adapter, float]]
"""Adapters of one picture with their weights; 1 = as trained."""


def load_adapter(path: Path, model: LatentDiffusion) -> Adapter:
    """Raises WeightsError for a missing, truncated or other file, and with all that does not fit the model."""
    tensors, settings = _read(path)
    targets = _targets(model)
    names = Names(targets["unet"], targets["text"])
    found: dict[tuple[Part, str], dict[Role, Tensor]] = {}
    problems = []
    for key, tensor in sorted(tensors.items()):
        place = names.place(key)
        if place is None:
            problems.append(f"unexpected {key}")
        elif place.module not in targets[place.part]:
            problems.append(f"unexpected {key}: the model has no such module")
        else:
            found.setdefault((place.part, place.module), {})[place.role] = tensor
    parts: dict[Part, dict[str, LowRank]] = {"unet": {}, "text": {}}
    for (part, module), roles in found.items():
        try:
            alpha = _Alpha(settings, part, module)
            parts[part][module] = _low_rank(roles, targets[part][module], alpha)
        except ValueError as error:
            problems.append(f"{module} {error}")
    if not problems and not found:
        problems.append("it holds no tensors")
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise WeightsError(f"{path} is no adapter of this model: {'; '.join(problems[:_LISTED])}{more}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(parts["unet"], parts["text"], digest)


def load_adapters(folder: Path, model: LatentDiffusion) -> dict[str, Adapter]:
    """Of `folder`/loras by name, that is file name. Raises WeightsError for the first that is broken or of another
    model. Tensors are read from disk when they are used."""
    return {path.stem: load_adapter(path, model) for path in sorted((folder / FOLDER).glob("*.safetensors"))}


def copy_adapter(source: Path, target: Path) -> None:
    """Into one file: the settings that peft keeps in a file of their own go into the header."""
    tensors, settings = _read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_suffix(".partial")
    save_file(tensors, whole, {"format": "pt", _SETTINGS: json.dumps(settings)} if settings else {"format": "pt"})
    whole.replace(target)


@contextmanager
def adapted(model: LatentDiffusion, uses: Uses) -> Iterator[None]:
    """Within it, `model` computes with these adapters; its weights stay as they are."""
    modules = dict(model.unet.named_modules())
    with adapted_text(model, uses), ExitStack() as stack:
        for adapter, weight in uses:
            stack.enter_context(attached(modules, adapter.unet, weight))
        yield


@contextmanager
def adapted_text(model: LatentDiffusion, uses: Uses) -> Iterator[None]:
    """Within it, texts are encoded with these adapters."""
    with ExitStack() as stack:
        for adapter, weight in uses:
            if adapter.text:
                modules = dict(text_transformer(model).named_modules())
                stack.enter_context(attached(modules, adapter.text, weight))
        yield


@contextmanager
def attached(modules: Mapping[str, nn.Module], low_ranks: Mapping[str, LowRank], weight: float) -> Iterator[None]:
    """Within it, these modules add their low-rank terms."""
    with ExitStack() as stack:
        for name, low_rank in low_ranks.items():
            module = modules[name]
            stack.callback(module.register_forward_hook(_term(module, low_rank, weight)).remove)
        yield


@torch.no_grad()
def merge(model: LatentDiffusion, uses: Uses) -> None:
    """Adds the adapters to the weights, for good."""
    for adapter, weight in uses:
        for name, low_rank in adapter.unet.items():
            _merge(model.unet.get_submodule(name), low_rank, weight)
        for name, low_rank in adapter.text.items():
            _merge(text_transformer(model).get_submodule(name), low_rank, weight)


def _merge(module: nn.Module, low_rank: LowRank, weight: float) -> None:
    assert isinstance(module.weight, Tensor)
    module.weight += (weight * low_rank.delta()).to(module.weight)


def text_transformer(model: LatentDiffusion) -> nn.Module:
    """What text adapters name modules of. Raises ValueError for a model that no text adapter fits."""
    if not isinstance(model.conditioner, TextEncoder):
        raise ValueError("this model has no CLIP text encoder, to which adapters could belong")
    return model.conditioner.transformer


def _term(module: nn.Module, low_rank: LowRank, weight: float) -> Any:
    """As a forward hook."""
    assert isinstance(module.weight, Tensor)
    down, up = low_rank.down.to(module.weight), low_rank.up.to(module.weight)
    factor = weight * low_rank.scale

    def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            small = F.conv2d(inputs[0], down, stride=module.stride, padding=module.padding)
            return out + factor * F.conv2d(small, up[:, :, None, None])
        return out + factor * F.linear(F.linear(inputs[0], down), up)

    return add


def _targets(model: LatentDiffusion) -> dict[Part, dict[str, torch.Size]]:
    """Shapes of the weights that adapters can change."""
    roots: dict[Part, nn.Module] = {"unet": model.unet}
    if isinstance(model.conditioner, TextEncoder):
        roots["text"] = model.conditioner.transformer
    shapes: dict[Part, dict[str, torch.Size]] = {"unet": {}, "text": {}}
    for part, root in roots.items():
        for name, module in root.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                shapes[part][name] = module.weight.shape
    return shapes


def _low_rank(roles: Mapping[Role, Tensor], shape: torch.Size, alpha: _Alpha) -> LowRank:
    """Raises ValueError for what is missing or misshapen; the module's name comes before it."""
    missing = [role for role in ("down", "up") if role not in roles]
    if missing:
        raise ValueError(f"lacks {' and '.join(missing)}")
    down, up = roles["down"], roles["up"]
    rank = down.shape[0] if down.dim() else 0
    # A 1x1 convolution and a linear are one another's equal: [o, i, 1, 1] and [o, i].
    pointwise = math.prod(shape[2:]) == 1
    down_fits = down.shape == (rank, *shape[1:]) or (
        pointwise and down.shape in ((rank, shape[1]), (rank, shape[1], 1, 1))
    )
    up_fits = up.shape in ((shape[0], rank), (shape[0], rank, 1, 1))
    if rank == 0 or not down_fits or not up_fits:
        raise ValueError(
            f"is down {list(down.shape)}, up {list(up.shape)}; "
            f"expected {['r', *shape[1:]]}, {[shape[0], 'r']} for its weight {list(shape)}".replace("'", "")
        )
    if "alpha" in roles and roles["alpha"].numel() != 1:
        raise ValueError(f"has an alpha of shape {list(roles['alpha'].shape)}, expected one number")
    given = float(roles["alpha"].item()) if "alpha" in roles else None
    return LowRank(down.reshape(rank, *shape[1:]), up.flatten(1), alpha.scale(rank, given))


class _Alpha:
    """What peft's settings say of one module: `lora_alpha`, or of `alpha_pattern` what names it, by name or ending."""

    def __init__(self, settings: Mapping[str, Any], part: Part, module: str) -> None:
        prefix = {"unet": "unet.", "text": "text_encoder."}[part]
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        own = own or {key: value for key, value in settings.items() if part == "unet" and "." not in key}
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
    beside = path.with_name("adapter_config.json")
    if _SETTINGS not in metadata:
        native = beside.is_file() and any(key.startswith("base_model.") for key in tensors)
        return tensors, read_json(beside) if native else {}
    try:
        settings = json.loads(metadata[_SETTINGS])
    except ValueError as error:
        raise WeightsError(f"{path}: its {_SETTINGS} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path}: its {_SETTINGS} is a {type(settings).__name__}, expected an object")
    return tensors, settings
