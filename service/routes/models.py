"""The models that jobs can name."""

from collections import Counter
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from contract.card import ModelCard, Vocabulary
from contract.errors import ErrorCode
from contract.spec import Task
from service.auth import Reader
from service.routes.common import State, problems

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelView(BaseModel):
    """A model's card. Sizes are of finished pictures, in pixels."""

    id: str = Field(description="the `model` of a request", examples=["darkroom-small"])
    object: Literal["model"] = "model"
    tasks: list[Task]
    description: str
    conditioning: Literal["text", "class", "layout", "semantic", "none"] = Field(
        description="what a request must give: `prompt`, `class_label`, `layout`, `semantic_map` or none of them"
    )
    default_width: int
    default_height: int
    max_width: int
    max_height: int
    size_multiple: int = Field(description="other sizes work as well: they are padded and cropped")
    default_steps: dict[Task, int]
    default_guidance: dict[Task, float]
    default_strength: float = Field(description="of img2img")
    upscale_factor: int | None
    default_noise_level: int | None = Field(description="of upscale; null: the model takes no `noise_level`")
    max_noise_level: int | None
    max_tokens: int = Field(description="prompt tokens read; a longer prompt is cut, with a warning")
    classes: int | None = Field(description="number of labels, counted from 0, of a model that takes any")
    max_objects: int | None = Field(description="of a layout")
    loras: list[str] = Field(description="adapters that requests may name")
    vocabulary: Vocabulary = Field(description="a hint for prompts: what the model knows; empty lists: anything")
    workers: int = Field(description="live workers that serve it now; jobs for a model without one wait")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelView]


def view_model(card: ModelCard, workers: int) -> ModelView:
    fields = card.model_dump(include=set(ModelView.model_fields))
    return ModelView(id=card.name, workers=workers, **fields)


@router.get("", responses=problems(ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN))
async def list_models(state: State, caller: Reader) -> ModelList:
    """Every known model, with or without a live worker."""
    del caller  # any key may look
    live = Counter(name for worker in await state.broker.workers() for name in worker.models)
    return ModelList(data=[view_model(card, live[card.name]) for card in await state.broker.cards()])
