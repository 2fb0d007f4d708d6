"""From a valid request to the job spec: which model, its defaults for what was left out, and its limits."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import uuid4

from contract import keys
from contract.card import ModelCard
from contract.errors import ErrorCode
from contract.settings import Settings
from contract.spec import JobSpec, Sampler, Task, repeated_loras
from service.conditioning import conditioning_faults, range_faults, takes_content
from service.problems import FieldError, ProblemError, pointer
from service.schemas import MIN_SIDE, PICTURE_FIELDS, PictureRequest
from service.uploads import IMAGE, MASK, SEMANTIC_MAP, Picture

# Drawn seeds stay exact in JavaScript, and fit the seed fields of other tools.
_DRAWN_SEEDS: Final = 2**32


def choose_model(cards: Sequence[ModelCard], task: Task, request: PictureRequest) -> ModelCard:
    """The model that was asked for, else the first that serves the task and takes what the request tells of the
    picture; if it tells nothing, or what none takes, the first that serves the task. A model without a live worker is
    as good."""
    asked = request.model
    serving = [card for card in cards if task in card.tasks]
    names = ", ".join(card.name for card in serving) or "none; start a worker that serves one"
    if asked is None:
        if serving:
            return next((card for card in serving if takes_content(task, request, card)), serving[0])
        raise _model_missing(
            f"no known model serves {task.value}", f"expected a model that serves {task.value}: {names}"
        )
    for card in cards:
        if card.name == asked:
            if card in serving:
                return card
            detail = f"{asked} serves {', '.join(card.tasks)}, not {task.value}; expected one of: {names}"
            raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", [_wrong("model", detail)])
    raise _model_missing(f"there is no model {asked!r}", f"expected one of: {names}")


def _model_missing(detail: str, expected: str) -> ProblemError:
    return ProblemError(ErrorCode.MODEL_NOT_FOUND, detail, [_wrong("model", expected)])


def _wrong(field: str, detail: str) -> FieldError:
    return FieldError(pointer=pointer(field), detail=detail)


def check_limits(task: Task, request: PictureRequest, card: ModelCard, settings: Settings) -> None:
    """Raises `ProblemError` for what this server or this model does not take, pictures aside."""
    faults = conditioning_faults(task, request, card) or range_faults(request, card)
    longest = settings.max_prompt_chars
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(request, field) or "")
        if length > longest:
            faults.append(_wrong(field, f"has {length:,} characters; expected at most {longest:,}"))
    for field, most in (("steps", settings.max_steps), ("n", settings.max_pictures)):
        asked = getattr(request, field)
        if asked is not None and asked > most:
            faults.append(_wrong(field, f"expected at most {most} on this server; got {asked}"))
    if request.eta and request.sampler is not Sampler.DDIM:
        faults.append(_wrong("eta", f"belongs to ddim; expected 0 with {request.sampler}; got {request.eta:g}"))
    faults += _noise_faults(request, card)
    for index, lora in enumerate(request.loras):
        if lora.name not in card.loras:
            known = ", ".join(card.loras) or "none, it has no adapters"
            detail = f"{lora.name} is no adapter of {card.name}; expected one of: {known}"
            faults.append(FieldError(pointer=pointer("loras", index, "name"), detail=detail))
    for index in repeated_loras(request.loras):
        detail = f"{request.loras[index].name} is given twice; expected each adapter once, with its whole weight"
        faults.append(FieldError(pointer=pointer("loras", index, "name"), detail=detail))
    for field, most in (("width", card.max_width), ("height", card.max_height)):
        asked = getattr(request, field, None)
        if asked is not None and asked > min(most, settings.max_side):
            limit = min(most, settings.max_side)
            faults.append(_wrong(field, f"expected {MIN_SIDE} to {limit} pixels for {card.name}; got {asked}"))
    if not faults and _asked_pixels(request, card) > settings.max_pixels:
        detail = f"expected width times height of at most {settings.max_pixels:,}; got {_asked_pixels(request, card):,}"
        faults.append(_wrong("width", detail))
    if faults:
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", faults)


def _noise_faults(request: PictureRequest, card: ModelCard) -> list[FieldError]:
    asked: int | None = getattr(request, "noise_level", None)
    if asked is None:
        return []
    if card.max_noise_level is None:
        return [_wrong("noise_level", f"is of no use to {card.name}, which takes the picture as it is; leave it out")]
    if asked > card.max_noise_level:
        return [_wrong("noise_level", f"expected 0 to {card.max_noise_level} for {card.name}; got {asked}")]
    return []


def _asked_pixels(request: PictureRequest, card: ModelCard) -> int:
    width = getattr(request, "width", None) or card.default_width
    height = getattr(request, "height", None) or card.default_height
    return int(width * height)


def check_pictures(
    task: Task, request: PictureRequest, pictures: Mapping[str, Picture], card: ModelCard, settings: Settings
) -> None:
    """Raises `ProblemError` for pictures of the wrong size, and for classes that the model does not know."""
    for name in (IMAGE, SEMANTIC_MAP):
        if name in pictures:
            _check_image(task, name, pictures[name], card, settings)
    if SEMANTIC_MAP in pictures:
        _check_map(request, pictures[SEMANTIC_MAP], card)
    image, mask = pictures.get(IMAGE), pictures.get(MASK)
    if image and mask and (image.width, image.height) != (mask.width, mask.height):
        detail = f"the mask is {mask.width}×{mask.height}; expected the image's size, {image.width}×{image.height}"
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", [_wrong(MASK, detail)])


def _check_map(request: PictureRequest, classes: Picture, card: ModelCard) -> None:
    faults = [
        _wrong(field, f"expected nothing, or the semantic_map's {side}; got {asked}")
        for field, side in (("width", classes.width), ("height", classes.height))
        if (asked := getattr(request, field)) not in (None, side)
    ]
    if card.classes is not None and classes.largest >= card.classes:
        detail = f"has class {classes.largest}; expected 0 to {card.classes - 1} for {card.name}"
        faults.append(_wrong(SEMANTIC_MAP, detail))
    if faults:
        raise ProblemError(ErrorCode.VALIDATION_FAILED, "nothing was queued", faults)


def _check_image(task: Task, name: str, image: Picture, card: ModelCard, settings: Settings) -> None:
    factor = _factor(task, card)
    max_width, max_height = (min(most, settings.max_side) // factor for most in (card.max_width, card.max_height))
    code = detail = None
    if min(image.width, image.height) < MIN_SIDE:
        code, detail = ErrorCode.IMAGE_INVALID, f"expected sides of at least {MIN_SIDE} pixels"
    elif image.width > max_width or image.height > max_height:
        code, detail = ErrorCode.IMAGE_TOO_LARGE, f"expected at most {max_width}×{max_height} for {card.name}"
    elif image.width * image.height * factor**2 > settings.max_pixels:
        code = ErrorCode.IMAGE_TOO_LARGE
        detail = f"expected at most {settings.max_pixels // factor**2:,} pixels in all"
    if code is not None:
        enlarged = f", enlarged {image.width * factor}×{image.height * factor}" if factor > 1 else ""
        got = f"the picture is {image.width}×{image.height}{enlarged}; {detail}"
        raise ProblemError(code, "nothing was queued", [_wrong(name, got)])


def _factor(task: Task, card: ModelCard) -> int:
    return card.upscale_factor or 1 if task is Task.UPSCALE else 1


def build_spec(
    task: Task,
    request: PictureRequest,
    pictures: Mapping[str, Picture],
    card: ModelCard,
    caller: str | None,
    now: float,
    request_id: str | None = None,
) -> JobSpec:
    """The job, with a new id, every default filled in and a seed drawn where none was given. `now` in Unix seconds."""
    job_id = uuid4().hex
    given = request.model_dump(exclude={*PICTURE_FIELDS, "model"}, exclude_none=True)
    defaults = {
        "steps": card.default_steps[task],
        "guidance_scale": card.default_guidance[task],
        "seed": secrets.randbelow(_DRAWN_SEEDS),
        "width": card.default_width,
        "height": card.default_height,
        "noise_level": card.default_noise_level if task is Task.UPSCALE else None,
    }
    if task is Task.IMG2IMG:
        defaults["strength"] = card.default_strength
    fixed = {
        "id": job_id,
        "task": task,
        "model": card.name,
        "inputs": {name: keys.input_object(job_id, name) for name in pictures},
        "created_at": now,
        "api_key_id": caller,
        "request_id": request_id,
    }
    source = pictures.get(IMAGE) or pictures.get(SEMANTIC_MAP)
    if source is not None:
        factor = _factor(task, card)
        fixed |= {"width": source.width * factor, "height": source.height * factor}
    return JobSpec.model_validate(defaults | given | fixed)
