"""A job spec as the pictures that the engine makes, its inputs read from the store, and what its caller should know."""

import io
import re
from collections.abc import Mapping
from typing import Final, Literal

from PIL import Image, UnidentifiedImageError

from broker.store import ObjectMissingError, Store
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.spec import JobError, JobSpec, JobWarning, Task
from models.conditioning import Conditioner
from models.layout import LayoutObject
from models.tasks import PictureRequest
from models.text import TextConditioner

_TASKS: Final[dict[Task, Literal["txt2img", "img2img", "inpaint", "upscale"]]] = {
    Task.TXT2IMG: "txt2img",
    Task.IMG2IMG: "img2img",
    Task.INPAINT: "inpaint",
    Task.UPSCALE: "upscale",
}
_MODES: Final = {"image": "RGB", "mask": "L", "semantic_map": "L"}


class BadJobError(Exception):
    """The job cannot be run here, for a reason that its caller should read."""

    def __init__(self, code: ErrorCode, detail: str) -> None:
        super().__init__(detail)
        self.error = JobError(code=code, detail=detail)


def load_inputs(store: Store, spec: JobSpec) -> dict[str, Image.Image]:
    """The job's pictures by name, decoded. Raises `BadJobError`, or `StoreError` when the store is away."""
    pictures = {}
    for name, key in spec.inputs.items():
        try:
            image = Image.open(io.BytesIO(store.get(key)), formats=["PNG"])
            pictures[name] = image.convert(_MODES[name])
        except ObjectMissingError as error:
            detail = f"the stored {name} is gone; inputs are kept for a while after a job's end: send the request again"
            raise BadJobError(ErrorCode.INPUT_MISSING, detail) from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadJobError(ErrorCode.IMAGE_INVALID, f"the stored {name} is no readable PNG picture") from error
    return pictures


def picture_requests(spec: JobSpec, card: ModelCard, inputs: Mapping[str, Image.Image]) -> list[PictureRequest]:
    """One request per picture. Raises `BadJobError` for what the model does not have."""
    if spec.task not in card.tasks:
        raise BadJobError(ErrorCode.VALIDATION_FAILED, f"{card.name} serves {', '.join(card.tasks)}, not {spec.task}")
    unknown = [lora.name for lora in spec.loras if lora.name not in card.loras]
    if unknown:
        known = ", ".join(card.loras) or "none"
        detail = f"{card.name} has no adapter {', '.join(unknown)} here; it has: {known}"
        raise BadJobError(ErrorCode.VALIDATION_FAILED, detail)
    words = spec.prompt or spec.negative_prompt
    map_ = inputs.get("semantic_map")
    for kind, given in (("text", words), ("class", spec.class_label), ("layout", spec.layout), ("semantic", map_)):
        if given not in (None, (), "") and kind != card.conditioning:
            raise BadJobError(ErrorCode.VALIDATION_FAILED, f"{card.name} takes {card.takes}, nothing else")
    layout = tuple(LayoutObject(**one.model_dump()) for one in spec.layout)
    noise_level = spec.noise_level if spec.noise_level is not None else card.default_noise_level
    return [
        PictureRequest(
            task=_TASKS[spec.task],
            prompt=spec.prompt,
            negative_prompt=spec.negative_prompt,
            class_label=spec.class_label,
            layout=layout,
            semantic_map=inputs.get("semantic_map"),
            width=spec.width,
            height=spec.height,
            seed=spec.picture_seed(index),
            steps=spec.steps,
            guidance_scale=spec.guidance_scale,
            sampler=spec.sampler.value,
            eta=spec.eta,
            strength=spec.strength,
            image=inputs.get("image"),
            mask=inputs.get("mask"),
            noise_level=noise_level or 0,
            loras=tuple((lora.name, lora.weight) for lora in spec.loras),
        )
        for index in range(spec.n)
    ]


def usual_request(card: ModelCard, prompt: str = "", seed: int = 0, steps: int | None = None) -> PictureRequest:
    """What a request that leaves all to the model asks for, in trials; of a plain gradient where it needs a picture."""
    task = card.tasks[0]
    factor = (card.upscale_factor or 1) if task is Task.UPSCALE else 1
    size = (card.default_width // factor, card.default_height // factor)
    gradient = Image.linear_gradient("L").resize(size)
    return PictureRequest(
        task=_TASKS[task],
        prompt=prompt,
        class_label=0 if card.conditioning == "class" else None,
        semantic_map=Image.new("L", size) if card.conditioning == "semantic" else None,
        width=size[0] * factor,
        height=size[1] * factor,
        seed=seed,
        steps=steps or card.default_steps[task],
        guidance_scale=card.default_guidance[task],
        strength=card.default_strength if task is Task.IMG2IMG else 1.0,
        image=None if task is Task.TXT2IMG else gradient.convert("RGB"),
        mask=Image.new("L", size, 255) if task is Task.INPAINT else None,
        noise_level=card.default_noise_level or 0,
    )


def job_warnings(spec: JobSpec, card: ModelCard, conditioner: Conditioner | None) -> tuple[JobWarning, ...]:
    """What of the request the model makes no use of, and words that it does not read or has never seen."""
    warnings: list[JobWarning] = []
    if spec.guidance_scale > 1.0 and (conditioner is None or not conditioner.learns_unconditional):
        message = f"{card.name} has learned nothing to be guided by; guidance_scale is ignored"
        warnings.append(JobWarning(code="ignored_field", message=message))
    if isinstance(conditioner, TextConditioner):
        warnings += _prompt_warnings(spec, card, conditioner)
    return tuple(warnings)


def _prompt_warnings(spec: JobSpec, card: ModelCard, text: TextConditioner) -> list[JobWarning]:
    warnings: list[JobWarning] = []
    for field, prompt in (("prompt", spec.prompt), ("negative_prompt", spec.negative_prompt)):
        lost = text.lost_words(prompt)
        if lost:
            message = f"{card.name} reads {text.max_tokens - 2} tokens; lost from the end of {field}: {lost}"
            warnings.append(JobWarning(code="prompt_truncated", message=message))
        unknown = unknown_words(prompt, card, text)
        if unknown:
            message = f"{card.name} does not know these words of {field}: {', '.join(unknown)}"
            warnings.append(JobWarning(code="unknown_words", message=message))
    return warnings


def unknown_words(prompt: str, card: ModelCard, text: TextConditioner) -> list[str]:
    """Words outside the model's vocabulary, as often unknown to the tokenizer as merely never seen in training.

    None for a model without a stated vocabulary: its tokenizer may well split words that it knows.
    """
    known = set(card.vocabulary.words)
    if not known:
        return []
    words = dict.fromkeys([*re.findall(r"[^\W_]+", prompt.lower()), *text.split_words(prompt)])
    return [word for word in words if word not in known]
