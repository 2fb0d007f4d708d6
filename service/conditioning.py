"""What a model wants to be told of a picture, and whether a request tells it that and nothing else."""

from typing import Any, Final

from contract.card import ModelCard
from contract.spec import LayoutObject, Task
from service.problems import FieldError, pointer
from service.schemas import PictureRequest

_FIELDS: Final = ("prompt", "negative_prompt", "class_label", "layout", "semantic_map")
_REQUIRED: Final = {"text": "prompt", "class": "class_label", "layout": "layout", "semantic": "semantic_map"}


def conditioning_faults(task: Task, request: PictureRequest, card: ModelCard) -> list[FieldError]:
    """One entry per field that the model does not take, and for the one that it misses. Upscaling needs no prompt."""
    required = _REQUIRED.get(card.conditioning)
    taken = {"prompt", "negative_prompt"} if required == "prompt" else {required}
    given = {field for field in _FIELDS if _is_given(request, field)}
    faults = [
        FieldError(pointer=pointer(field), detail=f"is of no use to {card.name}, which takes {card.takes}")
        for field in _FIELDS
        if field in given - taken
    ]
    if required is not None and required not in given and task is not Task.UPSCALE:
        detail = f"this field is required: {card.name} takes {card.takes}"
        faults.append(FieldError(pointer=pointer(required), detail=detail))
    return faults


def takes_content(task: Task, request: PictureRequest, card: ModelCard) -> bool:
    """Whether the request tells something that the model takes, and nothing else."""
    told = any(_is_given(request, field) for field in _FIELDS)
    return told and not conditioning_faults(task, request, card)


def range_faults(request: PictureRequest, card: ModelCard) -> list[FieldError]:
    """Labels that the model does not have, and more objects than it takes."""
    faults: list[FieldError] = []
    label: int | None = getattr(request, "class_label", None)
    if label is not None and card.classes is not None and label >= card.classes:
        faults.append(_unknown_label(card, label, "class_label"))
    objects: tuple[LayoutObject, ...] = getattr(request, "layout", ())
    if card.max_objects is not None and len(objects) > card.max_objects:
        detail = f"expected at most {card.max_objects} objects for {card.name}; got {len(objects)}"
        faults.append(FieldError(pointer=pointer("layout"), detail=detail))
    for index, one in enumerate(objects):
        if card.classes is not None and one.label >= card.classes:
            faults.append(_unknown_label(card, one.label, "layout", index, "label"))
    return faults


def _unknown_label(card: ModelCard, label: int, *place: str | int) -> FieldError:
    assert card.classes is not None
    detail = f"expected 0 to {card.classes - 1} for {card.name}; got {label}"
    return FieldError(pointer=pointer(*place), detail=detail)


def _is_given(request: PictureRequest, field: str) -> bool:
    value: Any = getattr(request, field, None)
    return value not in (None, "", ())
