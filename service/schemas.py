"""The public requests: one model per task. Unknown fields are refused, and so is what is not of the field's type.

The ranges here are what any Darkroom takes; a server's settings and a model's card may allow less (`normalise`).
"""

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from contract.spec import (
    MAX_NOISE_LEVEL,
    MAX_OBJECTS,
    MAX_SEED,
    LayoutObject,
    LoraUse,
    OutputFormat,
    Priority,
    Sampler,
    Task,
)

MIN_SIDE: Final = 8
MAX_SIDE: Final = 16384


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character; expected text")
    return value


def _words(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; expected words that say what to paint")
    return _text(value)


def _whole(value: Any) -> Any:
    """To JSON Schema, and to programs that have one kind of number, 4.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _picture(value: Any) -> str | bytes:
    if isinstance(value, str | bytes) and value:
        return value
    raise ValueError("expected a PNG, JPEG or WebP file as base64 text, as a data URL or as a file of a form")


def _picture_field(description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 1, "description": description})


Text = Annotated[str, Field(json_schema_extra={"pattern": r"^[^\u0000]*$"}), AfterValidator(_text)]
Words = Annotated[
    str,
    Field(min_length=1, json_schema_extra={"pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"}),
    AfterValidator(_words),
]
Whole = Annotated[int, BeforeValidator(_whole)]
MaybeWhole = Annotated[
    int | None, BeforeValidator(_whole)
]  # not `Whole | None`, whose bounds pydantic does not document
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE), BeforeValidator(_whole)]
SourceImage = Annotated[
    str | bytes,
    PlainValidator(_picture),
    _picture_field(
        "PNG, JPEG or WebP: base64 text or data URL; in a form, a file. EXIF orientation is applied, "
        "transparent parts become white. Its size is the size of the finished picture."
    ),
]
SmallImage = Annotated[
    str | bytes,
    PlainValidator(_picture),
    _picture_field("The picture to enlarge. PNG, JPEG or WebP: base64 text or data URL; in a form, a file."),
]
MaskImage = Annotated[
    str | bytes,
    PlainValidator(_picture),
    _picture_field(
        "White is repainted, black stays. Of the image's size. PNG, JPEG or WebP: base64 text or data URL; in a form, "
        "a file. Transparent parts count as black."
    ),
]


SemanticMap = Annotated[
    str | bytes,
    PlainValidator(_picture),
    _picture_field("PNG."),
]


class PictureRequest(BaseModel):
    """The fields that every task takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    negative_prompt: Text = Field(default="", description="what the picture should not show")
    model: str | None = Field(
        default=None,
        max_length=100,
        description="a name from GET /v1/models; default: the first model there that serves the task",
        examples=["darkroom-small"],
    )
    steps: MaybeWhole = Field(default=None, ge=1, le=1000, description="denoising steps; default: the model's")
    guidance_scale: float | None = Field(
        default=None,
        ge=0.0,
        le=100.0,
        description="classifier-free guidance: how strongly the prompt leads, 1 is without; default: the model's",
    )
    eta: float = Field(
        default=0.0, ge=0.0, le=1.0, description="of ddim alone: noise added per step, none at 0, that of DDPM at 1"
    )
    seed: MaybeWhole = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="same seed, same picture; picture i of n uses seed + i; only the low 32 bits count, as in "
        "diffusers; default: drawn, and told in the job",
    )
    n: Whole = Field(default=1, ge=1, le=64, description="number of pictures")
    sampler: Sampler = Field(
        default=Sampler.DDIM,
        description="how the noise is taken away step by step; dpmpp_2m (DPM-Solver++) often needs the fewest steps, "
        "ddpm and euler_ancestral add fresh noise at every step",
    )
    loras: tuple[LoraUse, ...] = Field(
        default=(), max_length=8, description="adapters of the model, each once, with weights"
    )
    priority: Priority = Field(default=Priority.INTERACTIVE, description="interactive jobs are taken before batch jobs")
    deadline_seconds: float | None = Field(
        default=None, gt=0.0, le=7 * 86400, description="the job fails if it has not ended so long after it was sent"
    )
    output_format: OutputFormat = Field(default=OutputFormat.PNG, description="file format of the pictures")
    output_quality: Whole = Field(default=90, ge=1, le=100, description="of JPEG and WebP")
    metadata: bool = Field(default=True, description="write the request's parameters into the files")


class Painting(PictureRequest):
    """What says what is in a picture, each to its kind of model; `conditioning` in GET /v1/models tells which it is."""

    prompt: Words | None = Field(
        default=None,
        description="what the whole picture should show; required by models that take text",
        examples=["a pizza on a blue background"],
    )
    class_label: MaybeWhole = Field(default=None, ge=0, description="for class-conditional models, which require it")
    layout: tuple[LayoutObject, ...] = Field(
        default=(),
        max_length=MAX_OBJECTS,
        description='for layout models, which require it: objects in boxes, `[{"label": 3, "box": [0.1, 0.2, 0.5, '
        "0.4]}]`, x and y of the upper left corner, width and height as shares of the picture's sides; `group`, "
        "`occluded`, `depiction` and `inside` may be true",
    )


class TextToImage(Painting):
    """Pictures from words, or from what else a model takes."""

    semantic_map: SemanticMap | None = Field(
        default=None,
        description="for semantic models, which require it: what every pixel shows, by the number of its class. PNG, "
        "8-bit grey or with a palette, whose indices then count: base64 text or data URL; in a form, a file. Its size "
        "is the size of the finished picture.",
    )
    width: Side | None = Field(default=None, description="pixels; default: the model's")
    height: Side | None = Field(default=None, description="pixels; default: the model's")


class ImageToImage(Painting):
    """A picture repainted after words, keeping as much of it as `strength` leaves."""

    image: SourceImage
    strength: float | None = Field(
        default=None, gt=0.0, le=1.0, description="share of the denoising that is done anew; default: the model's"
    )


class Inpaint(Painting):
    """The white part of a mask repainted after words; the rest stays."""

    image: SourceImage
    mask: MaskImage
    strength: float = Field(default=1.0, gt=0.0, le=1.0, description="1 forgets what was under the mask")


class Upscale(PictureRequest):
    """A small picture made larger by the model's factor."""

    prompt: Text = Field(default="", description="may say what the picture shows")
    image: SmallImage
    noise_level: MaybeWhole = Field(
        default=None,
        ge=0,
        le=MAX_NOISE_LEVEL,
        description="noise that hides the picture's faults before it is enlarged: 0 keeps to every pixel, more leaves "
        "more to the model; at most `max_noise_level` in GET /v1/models, only for models that have one; default: the "
        "model's",
    )


REQUESTS: Final[dict[Task, type[PictureRequest]]] = {
    Task.TXT2IMG: TextToImage,
    Task.IMG2IMG: ImageToImage,
    Task.INPAINT: Inpaint,
    Task.UPSCALE: Upscale,
}
PICTURE_FIELDS: Final = ("image", "mask", "semantic_map")
JSON_FIELDS: Final = ("loras", "layout")
"""Those that a form has as JSON text."""


def pictures_of(request: PictureRequest) -> dict[str, str | bytes]:
    """The pictures of a request as they came, by field name."""
    given = {name: getattr(request, name, None) for name in PICTURE_FIELDS}
    return {name: picture for name, picture in given.items() if picture is not None}
