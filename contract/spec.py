"""The job as it travels: one frozen, versioned JSON document per direction (request in, result out)."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from contract.errors import ErrorCode

SPEC_MAJOR: Final = 1
MAX_SEED: Final = 2**63 - 1
MAX_NOISE_LEVEL: Final = 999
MAX_OBJECTS: Final = 100
"""Of any layout; published models take 30."""

# Names become parts of Redis and store keys, so they hold neither ":" nor "/".
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
Pixels = Annotated[int, Field(ge=1, le=16384)]


class Document(BaseModel):
    """Frozen; refuses unknown fields and non-finite numbers; its JSON round trip is exact."""

    # An error's text may reach a log, where no prompt belongs.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class UnsupportedVersionError(ValueError):
    """A document of another major version: this process is older or newer than the one that wrote it."""


class Task(StrEnum):
    """What a job does with its inputs."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"
    UPSCALE = "upscale"


REQUIRED_INPUTS: Final[dict[Task, frozenset[str]]] = {
    Task.TXT2IMG: frozenset(),
    Task.IMG2IMG: frozenset({"image"}),
    Task.INPAINT: frozenset({"image", "mask"}),
    Task.UPSCALE: frozenset({"image"}),
}
OPTIONAL_INPUTS: Final[dict[Task, frozenset[str]]] = {Task.TXT2IMG: frozenset({"semantic_map"})}


class Priority(StrEnum):
    """Queues are taken in the order of these members."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Sampler(StrEnum):
    """How a picture is denoised step by step; every model takes every one of them."""

    DDIM = "ddim"
    DDPM = "ddpm"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    DPMPP_2M = "dpmpp_2m"

    @property
    def usual_name(self) -> str:
        """As other tools write it into their files."""
        return _SAMPLER_TITLES.get(self, self.upper())


_SAMPLER_TITLES: Final = {
    Sampler.EULER: "Euler",
    Sampler.EULER_ANCESTRAL: "Euler a",
    Sampler.DPMPP_2M: "DPM++ 2M",
}


class OutputFormat(StrEnum):
    """File format of the finished pictures; the value is also the file extension."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def content_type(self) -> str:
        return f"image/{self.value}"


class JobStatus(StrEnum):
    """The life of a job: queued, running, then exactly one of the other three."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class LoraUse(Document):
    """One adapter of the model's, applied with a weight (1 = as trained)."""

    name: Name
    weight: float = Field(default=1.0, ge=-4.0, le=4.0)


def repeated_loras(loras: Sequence[LoraUse]) -> list[int]:
    """Places of adapters that came before."""
    names = [lora.name for lora in loras]
    return [index for index, name in enumerate(names) if name in names[:index]]


Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]


class LayoutObject(Document):
    """One object of a layout: its class, and x, y, width, height of its box as shares of the picture's sides, x and y
    of the upper left corner. The others are remarks on the box: a group of such objects, partly hidden, a drawing of
    one, seen from within."""

    label: int = Field(ge=0)
    box: tuple[Share, Share, PositiveShare, PositiveShare]
    group: bool = False
    occluded: bool = False
    depiction: bool = False
    inside: bool = False


class JobSpec(Document):
    """Everything a worker needs to make the pictures of one job.

    `width` and `height` are those of the finished picture in pixels (for upscale: input size times the factor).
    `prompt`, `class_label`, `layout` and the input "semantic_map" say what is in it, each to its kind of model. Picture
    i uses seed `(seed + i) mod 2**63`. `inputs` maps "image", "mask" and "semantic_map" to store keys of PNG files (the
    mask is 8-bit grey, white = repaint, of the image's size; the map is 8-bit grey, a pixel's value is its class).
    `strength` in (0, 1] is the share of the schedule that img2img and inpaint run. `noise_level` is the timestep to
    which upscaling noises the small picture, None for models that take it as it is. `created_at` is Unix time in
    seconds; `deadline_seconds` counts from there to the end of the job.
    `request_id` is that of the request that made the job, for logs.
    """

    version: Literal["1"] = "1"
    id: JobId
    task: Task
    model: Name
    prompt: str = ""
    negative_prompt: str = ""
    width: Pixels
    height: Pixels
    steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0.0, le=100.0)
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int = Field(ge=0, le=MAX_SEED)
    n: int = Field(default=1, ge=1, le=64)
    sampler: Sampler = Sampler.DDIM
    strength: float = Field(default=1.0, gt=0.0, le=1.0)
    noise_level: int | None = Field(default=None, ge=0, le=MAX_NOISE_LEVEL)
    class_label: int | None = Field(default=None, ge=0)
    layout: tuple[LayoutObject, ...] = Field(default=(), max_length=MAX_OBJECTS)
    loras: tuple[LoraUse, ...] = ()
    priority: Priority = Priority.INTERACTIVE
    deadline_seconds: float | None = Field(default=None, gt=0.0)
    output_format: OutputFormat = OutputFormat.PNG
    output_quality: int = Field(default=90, ge=1, le=100)
    metadata: bool = True
    inputs: dict[str, str] = Field(default_factory=dict)
    created_at: float = Field(ge=0.0)
    api_key_id: Name | None = None
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,100}$")

    @model_validator(mode="after")
    def _inputs_fit_task(self) -> Self:
        wanted = REQUIRED_INPUTS[self.task]
        allowed = wanted | OPTIONAL_INPUTS.get(self.task, frozenset())
        if not wanted <= set(self.inputs) <= allowed:
            expected = " and ".join(sorted(wanted)) or " or ".join(["none", *sorted(allowed)])
            raise ValueError(
                f"{self.task} takes the inputs: {expected}; got: {', '.join(sorted(self.inputs)) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _eta_fits_sampler(self) -> Self:
        if self.eta and self.sampler is not Sampler.DDIM:
            raise ValueError(f"eta belongs to ddim; expected 0 with the sampler {self.sampler}, got {self.eta:g}")
        return self

    @model_validator(mode="after")
    def _loras_are_different(self) -> Self:
        if repeated := repeated_loras(self.loras):
            raise ValueError(f"loras {', '.join(self.loras[index].name for index in repeated)}: expected each once")
        return self

    def picture_seed(self, index: int) -> int:
        """Seed of picture `index`; wraps so that every seed stays in range."""
        return (self.seed + index) % (MAX_SEED + 1)

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Raises `UnsupportedVersionError` for another major version, else `pydantic.ValidationError`."""
        refuse_other_major(text)
        return cls.model_validate_json(text)


def refuse_other_major(text: str | bytes) -> None:
    """Looks at `version` alone, so that a document from the future gives one clear error instead of many odd ones."""
    document = json.loads(text)
    version = document.get("version") if isinstance(document, dict) else None
    if str(version).split(".")[0] != str(SPEC_MAJOR):
        raise UnsupportedVersionError(
            f"job spec version {version!r}: this process reads major version {SPEC_MAJOR}; "
            "upgrade the workers before the gateways, and drain old queues before removing old workers"
        )


class JobWarning(Document):
    """Something the caller should know about a job that runs all the same, e.g. code "unknown_words"."""

    code: Literal["prompt_truncated", "unknown_words", "size_adjusted", "ignored_field"]
    message: str


class JobError(Document):
    """Why a job failed; the gateway renders it as a problem (RFC 9457). `detail` is for the caller: no traceback."""

    code: ErrorCode
    detail: str


class PictureResult(Document):
    """One stored picture. `key` is its store key, `bytes` its file size, `sha256` the hex digest of the file."""

    index: int = Field(ge=0)
    seed: int = Field(ge=0, le=MAX_SEED)
    key: str
    width: Pixels
    height: Pixels
    content_type: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Timings(Document):
    """Seconds spent in each stage; for n pictures, from the first row's start to the last row's end of the stage."""

    queued: float = Field(default=0.0, ge=0.0)
    denoise: float = Field(default=0.0, ge=0.0)
    decode: float = Field(default=0.0, ge=0.0)
    store: float = Field(default=0.0, ge=0.0)


class JobResult(Document):
    """What a worker hands back: keys, seeds and times, never pixels."""

    version: Literal["1"] = "1"
    pictures: tuple[PictureResult, ...]
    timings: Timings = Timings()
    warnings: tuple[JobWarning, ...] = ()
    fingerprint: str = Field(default="", description="names all that the pictures' bits depend on beside the request")

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What a newer worker adds is left out. Raises as `JobSpec.from_json` does."""
        refuse_other_major(text)
        return cls.model_validate_json(text, extra="ignore")
