"""The model card: what the gateway must know about a model to validate a request without loading it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from contract.spec import MAX_NOISE_LEVEL, Document, Name, Pixels, Task


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
    SHA-256 of the weights in hex. `classes` is the number of labels that a class-conditional, layout or semantic model
    knows.
    """

    name: Name
    tasks: tuple[Task, ...] = Field(min_length=1)
    description: str = ""
    conditioning: Literal["text", "class", "layout", "semantic", "none"] = Field(
        default="text", description="what a request must say of the picture"
    )
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
    max_noise_level: int | None = Field(default=None, ge=0, le=MAX_NOISE_LEVEL)
    max_tokens: int = Field(default=77, ge=1, description="prompt tokens read, markers included; the rest is cut")
    classes: int | None = Field(default=None, ge=1)
    max_objects: int | None = Field(default=None, ge=1, description="of a layout")
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

    @model_validator(mode="after")
    def _noise_levels_fit(self) -> Self:
        default, most = self.default_noise_level, self.max_noise_level
        if (default is None) != (most is None) or (most is not None and self.upscale_factor is None):
            raise ValueError("default_noise_level and max_noise_level go together, for models that upscale alone")
        if default is not None and most is not None and default > most:
            raise ValueError(f"default_noise_level {default}: expected at most max_noise_level, {most}")
        return self

    @model_validator(mode="after")
    def _conditioning_is_complete(self) -> Self:
        labelled, layout = self.conditioning in ("class", "layout", "semantic"), self.conditioning == "layout"
        for field, needed in (("classes", labelled), ("max_objects", layout)):
            if (getattr(self, field) is not None) != needed:
                expected = "a number" if needed else "none"
                raise ValueError(f"{field}: expected {expected} with conditioning={self.conditioning}")
        return self

    @property
    def takes(self) -> str:
        """What a request must give, in words."""
        labels = f"0 to {(self.classes or 1) - 1}"
        return {
            "text": "a prompt",
            "class": f"a class_label from {labels}",
            "layout": f"a layout of up to {self.max_objects} objects with labels from {labels}",
            "semantic": f"a semantic_map with classes from {labels}",
            "none": "nothing that says what the picture shows",
        }[self.conditioning]
