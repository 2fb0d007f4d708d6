"""A single file in the original layout (latent-diffusion, Stable Diffusion 1, 2 and XL): recognise, map, load."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from models.config import ScheduleConfig, UnsupportedStructure
from models.schedule import NoiseSchedule
from models.weights_io import original, recognise
from models.weights_io.configs import understood
from models.weights_io.families import ConditionerKind, Family, PredictionType, Signs, family_of
from models.weights_io.files import Reading
from models.weights_io.folder import Parts
from models.weights_io.original import AUTOENCODER, OPEN_CLIP, UNET
from models.weights_io.tensors import LazyTensor, WeightsError, check_keys

# Constants that the original stores beside its weights, and what its training left there.
_IGNORED: Final = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor"
    r"|model_ema\..*|first_stage_model\.(loss|model_ema)\..*|low_scale_model\..*|.*\.position_ids"
    r"|conditioner\.embedders\.1\.model\.(logit_scale|attn_mask)|denoiser\..*"
    r"|cond_stage_model\.transformer\.to_logits\..*|cond_stage_model\.(model\.)?(text_projection|logit_scale|attn_mask)"
)

# The x4 upscaler's noise for its small picture (its yaml's low_scale_config).
_LOW_RES: Final = ScheduleConfig(beta_start=0.0001, beta_end=0.02)


@dataclasses.dataclass(frozen=True)
class Told:
    """What a file does not hold or say, told by the user. `tokenizer` is a folder, by default one beside the file;
    `ema`: whether to take the averaged weights of a file that has both."""

    tokenizer: Path | None = None
    prediction_type: PredictionType | None = None
    ema: bool | None = None


class Recognised(NamedTuple):
    """What a file's keys and shapes tell."""

    family: Family
    conditioner: ConditionerKind | None
    structure: recognise.UNetStructure
    has_ema: bool


def recognised(tensors: Mapping[str, LazyTensor], path: Path) -> Recognised:
    """Raises WeightsError for a file that holds no whole model, UnsupportedStructure for one of another kind."""
    shapes = _shapes(tensors)
    for prefix, part in ((UNET, "UNet"), (AUTOENCODER, "autoencoder")):
        if not any(key.startswith(prefix) for key in shapes):
            raise WeightsError(
                f"{path} holds no {part} (no key begins with {prefix}); expected a whole model in the layout of "
                "CompVis/latent-diffusion or Stable Diffusion, or a diffusers folder"
            )
    structure = recognise.unet_structure(recognise.below(UNET, shapes))
    codebook = f"{AUTOENCODER}quantize.embedding.weight" in shapes
    kind = original.conditioner_kind(shapes, codebook)
    if kind != "clip_pair" and any(key.startswith(original.PAIR) for key in shapes):
        raise UnsupportedStructure(
            f"{path} is laid out as SDXL's files, but has not both text encoders of the base model; expected that model"
        )
    family = family_of(Signs(kind, structure.in_channels, structure.out_channels, codebook))
    return Recognised(family, kind, structure, any(key.startswith("model_ema.diffusion_model") for key in shapes))


def load_single_file(path: Path, reading: Reading, told: Told = Told()) -> Parts:  # frozen
    """Raises WeightsError for a broken file, one that is no whole model, and for missing, unexpected or misshapen keys;
    UnsupportedStructure for a model of none of the published families."""
    known, parts, used = _examined(path, reading, told)
    made: dict[str, Any] = {name: part.of(used) for name, part in parts.items()}
    return Parts(
        unet=made["unet"],
        autoencoder=made["autoencoder"],
        conditioner=made.get("conditioner"),
        schedule=NoiseSchedule(known.family.schedule(told.prediction_type)),
        low_res_schedule=NoiseSchedule(_LOW_RES) if known.structure.classes is not None else None,
        semantic=made.get("semantic"),
    )


def examine(path: Path) -> Recognised:
    """What the file holds, all of whose keys fit; no tokenizer is needed. Raises as `load_single_file`."""
    return _examined(path, Reading(dtype=None, pickles=True), Told())[0]


def _examined(
    path: Path, reading: Reading, told: Told
) -> tuple[Recognised, dict[str, original.Part], dict[str, LazyTensor]]:
    """What the file holds, the parts to make of it, and the tensors that these take."""
    tensors = reading.open(path)
    known = recognised(tensors, path)
    target = original.Target(path, reading.dtype, told.tokenizer)
    parts = understood(path, lambda: _parts(known, tensors, told, target))
    ema = known.has_ema and (known.family.use_ema if told.ema is None else told.ema)
    used = _averaged(tensors) if ema else dict(tensors)
    expected = {source.key: source.shape for part in parts.values() for source in part.sources.values()}
    check_keys(expected, {key: used[key] for key in used if key in expected or not _ignored(key, known, used)}, path)
    return known, parts, used


def _shapes(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _parts(
    known: Recognised, tensors: Mapping[str, LazyTensor], told: Told, target: original.Target
) -> dict[str, original.Part]:
    shapes, family = _shapes(tensors), known.family
    size = family.size(told.prediction_type)
    # LDM measured some of its models' latents, and left the factor in the file.
    scale = family.scaling_factor
    if "scale_factor" in tensors:
        if shapes["scale_factor"] not in ((), (1,)):
            raise ValueError(f"scale_factor is {list(shapes['scale_factor'])}; expected one number")
        scale = float(tensors["scale_factor"].read())
    first_stage = recognise.autoencoder_config(recognise.below(AUTOENCODER, shapes), scale, size)
    parts = {
        "unet": original.unet_part(family.unet_config(known.structure, size), target),
        "autoencoder": original.autoencoder_part(first_stage, target),
    }
    if known.conditioner is not None:
        name = "semantic" if known.conditioner == "semantic" else "conditioner"
        parts[name] = original.conditioner_part(known.conditioner, family, shapes, target)
    return parts


def _averaged(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """With the UNet's averaged weights in place of the last ones. Their names have lost all dots."""
    used = {key: tensor for key, tensor in tensors.items() if not key.startswith(UNET)}
    for key in tensors:
        average = "model_ema." + key.removeprefix("model.").replace(".", "")
        if key.startswith(UNET) and average in tensors:
            used[key] = tensors[average]
    return used


def _ignored(key: str, known: Recognised, tensors: Mapping[str, LazyTensor]) -> bool:
    """What the model does not use: the layer after the last that is read, and an autoencoder that encodes a masked
    picture as well and is therefore in the file twice."""
    if known.conditioner == "open_clip":
        last = recognise.count(f"{OPEN_CLIP}transformer.resblocks.", tensors) - 1
        if key.startswith(f"{OPEN_CLIP}transformer.resblocks.{last}."):
            return True
    conditioner, twin = original.CONDITIONER, AUTOENCODER + key.removeprefix(original.CONDITIONER)
    return _IGNORED.fullmatch(key) is not None or (key.startswith(conditioner) and twin in tensors)
