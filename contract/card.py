"""The model card: what the gateway must know about a model to validate a request without loading it."""

from typing import Self

from pydantic import Field, model_validator

from contract.spec import Document, Name, Pixels, Task


class Vocabulary(Document):
    """A hint for callers of a model that was trained on few words; empty for a model that knows all."""

    objects: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    words: tuple[str, ...] = Field(default=(), description="every word the model has seen; empty means unrestricted")


class ModelCard(Document):
    """`card.json` beside the weights. Sizes are of finished pictures, in pixels.

    `latent_downsample` is the autoencoder's factor f. A finished picture's sides are padded to `size_multiple` before
    denoising and cropped after. `default_steps` and `default_guidance` have one entry per task. `digest` is the
    SHA-256 of the weights in hex.
    """

    name: Name
    tasks: tuple[Task, ...] = Field(min_length=1)
    description: str = ""
    default_width: Pixels
    default_height: Pixels
    max_width: Pixels
    max_height: Pixels
    size_multiple: int = Field(ge=1)
    latent_downsample: int = Field(ge=1)
    default_steps: dict[Task, int]
    default_guidance: dict[Task, float]
    default_strength: float = Field(default=0.8, gt=0.0, le=1.0)
    upscale_factor: int | None = Field(default=None, ge=2)
    default_noise_level: int | None = Field(default=None, ge=0, description="upscale: noise added to the small picture")
    max_noise_level: int | None = Field(default=None, ge=0)
    max_tokens: int = Field(default=77, ge=1, description="prompt tokens read, markers included; the rest is cut")
    classes: int | None = Field(default=None, ge=1, description="number of class labels of a class-conditional model")
    loras: tuple[Name, ...] = ()
    vocabulary: Vocabulary = Vocabulary()
    digest: str = ""

    @model_validator(mode="after")
    def _defaults_cover_tasks(self) -> Self:
        for field, given in (("default_steps", self.default_steps), ("default_guidance", self.default_guidance)):
            if set(given) != set(self.tasks):
                raise ValueError(
                    f"{field} has entries for {sorted(given)}; expected one per task: {sorted(self.tasks)}"
                )
        if (Task.UPSCALE in self.tasks) != (self.upscale_factor is not None):
            raise ValueError("upscale_factor is set exactly when the tasks include upscale")
        return self
