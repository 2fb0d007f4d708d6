"""From a model as it was published to a folder that workers serve."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from cli.model_cards import Usual, card_of
from cli.registry import CARD, link, new_folder, read_card, write_note
from contract.card import ModelCard
from models.latent_diffusion import LatentDiffusion
from models.weights_io.digest import weights_digest
from models.weights_io.files import PICKLED, PickledError, Reading
from models.weights_io.folder import save_folder
from models.weights_io.load import load_parts
from models.weights_io.single_file import Recognised, Told, examine
from models.weights_io.tensors import WeightsError, read_json


class Added(NamedTuple):
    """`recognised` is None for a diffusers folder, which says itself what it is."""

    card: ModelCard
    kind: str
    recognised: Recognised | None


def add(source: Path, name: str, model_dir: Path, told: Told, *, copy: bool, usual: Usual) -> Added:
    """Makes `model_dir`/`name`, or nothing. A folder that can be served as it is becomes links to it, unless `copy`;
    all else is written as a diffusers folder with every tensor in its own type.

    Raises `cli.registry.RegistryError` for the name, WeightsError or UnsupportedStructure for the model.
    """
    known = examine(source) if source.is_file() else None
    with new_folder(model_dir, name) as folder:
        model, as_it_is = _load(source, told)
        kind = "reference to" if as_it_is and not copy else "converted from"
        if kind == "reference to":
            parts = [key for key, what in read_json(source / "model_index.json").items() if isinstance(what, list)]
            link(folder, source, ["model_index.json", *(Path(part).name for part in parts)])
        else:
            save_folder(model, folder, dtype=None)
        card = described(source, name, model, known, usual).model_copy(update={"digest": weights_digest(folder)})
        (folder / CARD).write_text(json.dumps(_plain(card), indent=2) + "\n", encoding="utf-8")
        write_note(folder, kind, source)
    return Added(card, kind, known)


def _load(source: Path, told: Told) -> tuple[LatentDiffusion, bool]:
    """The model with its tensors as they are on disk, and whether a worker could load it from there."""
    try:
        return LatentDiffusion(*load_parts(source, Reading(dtype=None), told)), source.is_dir()
    except PickledError:
        return LatentDiffusion(*load_parts(source, Reading(dtype=None, pickles=True), told)), False


def described(
    source: Path,
    name: str,
    model: LatentDiffusion,
    known: Recognised | None = None,
    usual: Usual = Usual(),  # noqa: B008
) -> ModelCard:
    """The card that lies beside the model under this name, else one made for it. Raises RegistryError."""
    beside = source / CARD
    if beside.is_file():
        return read_card(beside).model_copy(update={"name": name})
    kind = known.family.name if known else read_json(source / "model_index.json").get("_class_name", "")
    return card_of(model, name, f"{kind} from {source.name}", usual)


def opened(source: Path, told: Told) -> tuple[ModelCard, LatentDiffusion]:
    """A model that is not among this machine's, with a card of its own. Raises WeightsError or UnsupportedStructure."""
    model = LatentDiffusion.load(source, None, told)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem if source.is_file() else source.resolve().name).strip("-._")
    card = described(source, name[:100] or "model", model, examine(source) if source.is_file() else None)
    return ModelCard.model_validate({**card.model_dump(), "loras": tuple(model.adapters)}), model


def _plain(card: ModelCard) -> dict[str, Any]:
    """What the card says beyond its defaults."""
    return card.model_dump(mode="json", exclude_defaults=True)


def facts(source: Path) -> dict[str, str]:
    """What `inspect` tells of a folder or file, whose keys all fit. Raises WeightsError or UnsupportedStructure."""
    if source.is_file():
        return _facts_of_file(source)
    if not source.is_dir():
        raise WeightsError(f"{source}: no such file or folder, and no model of this name")
    model, as_it_is = _load(source, Told())
    card = described(source, "model", model)
    return {
        "layout": "diffusers folder" + ("" if as_it_is else ", pickled"),
        "kind": str(read_json(source / "model_index.json").get("_class_name", "unknown")),
        "tasks": ", ".join(card.tasks),
        "takes": card.takes,
        "usual size": f"{card.default_width}x{card.default_height}",
        "prediction": model.schedule.config.prediction_type,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M",
        "numbers": str(model.unet.conv_in.weight.dtype).removeprefix("torch."),
    }


def _facts_of_file(source: Path) -> dict[str, str]:
    known = examine(source)
    family, unet = known.family, known.structure
    told = {
        "layout": "original, one file" + (", pickled" if source.suffix in PICKLED else ""),
        "kind": family.name,
        "conditioning": known.conditioner or "none",
        "UNet": f"{unet.in_channels} channels in, {unet.out_channels} out, widths {unet.widths}",
        "prediction": family.prediction_type,
        "averaged weights": ("used" if family.use_ema else "there, not used") if known.has_ema else "none",
    }
    if family.other is not None:
        told["prediction"] += f" assumed; {family.other.models}: --prediction-type {family.other.prediction_type}"
    if known.conditioner in ("clip", "open_clip", "clip_pair", "bert"):
        told["needs"] = "a tokenizer beside it, or --tokenizer"
    return told
