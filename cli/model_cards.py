"""A card for a model that comes without one: what it can do follows from its parts, usual settings from its kind."""

from typing import Final, NamedTuple

from contract.card import ModelCard
from contract.spec import Task
from models.class_label import ClassEncoder
from models.latent_diffusion import LatentDiffusion
from models.layout import LayoutEncoder
from models.text import TextConditioner
from models.text_pair import TextPairEncoder

_ORDER: Final = (Task.TXT2IMG, Task.IMG2IMG, Task.INPAINT, Task.UPSCALE)


class Usual(NamedTuple):
    """Steps and guidance scale where a request leaves them out; None: as the scripts of such models have them."""

    steps: int | None = None
    guidance: float | None = None


def card_of(model: LatentDiffusion, name: str, description: str = "", usual: Usual = Usual()) -> ModelCard:  # noqa: B008
    """Sizes are those of training; twice as large can be asked for, and four times of an upscaler."""
    f = model.autoencoder.config.downsampling_factor
    height, width = (side * f for side in model.unet.config.size)
    growth = 4 if model.upscales else 2
    tasks = tuple(task for task in _ORDER if task.value in model.tasks)
    of_scripts = _of_scripts(model)
    noisy = model.low_res_schedule is not None
    return ModelCard(
        name=name,
        description=description,
        tasks=tasks,
        conditioning=model.conditioning,
        default_width=width,
        default_height=height,
        max_width=growth * width,
        max_height=growth * height,
        size_multiple=f,
        latent_downsample=f,
        default_steps=dict.fromkeys(tasks, usual.steps or of_scripts.steps or 50),
        default_guidance=dict.fromkeys(tasks, _first(usual.guidance, of_scripts.guidance, 1.0)),
        upscale_factor=f if model.upscales else None,
        default_noise_level=min(20, model.max_noise_level) if noisy else None,
        max_noise_level=model.max_noise_level if noisy else None,
        max_tokens=model.conditioner.max_tokens if isinstance(model.conditioner, TextConditioner) else 77,
        classes=_classes(model),
        max_objects=model.conditioner.config.max_objects if isinstance(model.conditioner, LayoutEncoder) else None,
    )


def _of_scripts(model: LatentDiffusion) -> Usual:
    """What the original repositories' scripts, and diffusers' pipelines for Stable Diffusion, take."""
    match model.conditioning, model.upscales:
        case "text", True:
            return Usual(75, 9.0)
        case "text", False:
            newest = isinstance(model.conditioner, TextPairEncoder)
            oldest = model.unet.config.cross_attention_dim == _LDM_CONTEXT
            return Usual(50, 5.0 if newest or oldest else 7.5)
        case "class", _:
            guided = model.conditioner is not None and model.conditioner.learns_unconditional
            return Usual(20 if guided else 50, 3.0 if guided else 1.0)
        case _, True:
            return Usual(100, 1.0)
        case _:
            return Usual(50, 1.0)


_LDM_CONTEXT: Final = 1280


def _classes(model: LatentDiffusion) -> int | None:
    """How many labels a request can choose from; the one that stands for none is not among them."""
    if model.semantic is not None:
        return model.semantic.in_channels
    match model.conditioner:
        case ClassEncoder(config=config):
            return config.num_classes - (config.unconditional is not None)
        case LayoutEncoder(config=config):
            return config.labels
        case _:
            return None


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
