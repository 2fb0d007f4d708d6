"""The examples of the reference. A test sends every one of them."""

from typing import Any, Final

from contract.spec import Task

# PNG files as base64: an orange disc on blue, a mask with a white square, a smaller disc.
_IMAGE: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAABlBMVEXkqEg6bsR4zmQYAAAAhUlEQVR42r3RsQ3CYBCD0fefUtCR"
    "EbIJjJYRGCkjMAIjBERBEWEKKEBKhxRXtj7pLOtavFU2Mdf+Y043SBYOSbFwoXgwU5y5U0w8v+60aIgSGJUnTKulC1xW0QPm/3ft"
    "oF9FHQyrqOD4PcdI+604vmMys0+KHT1Fx4AkY0siybxP0jb86QsNODBerXdHXgAAAABJRU5ErkJggg=="
)
_MASK: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAHklEQVR42mNgGFyAkYHhPwMDAyMDE0xklIHMGGwAAPa7AUAn7aGO"
    "AAAAAElFTkSuQmCC"
)
_SMALL: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAABlBMVEXkqEg6bsR4zmQYAAAASElEQVR42n3OwQ1AUBgE4e9tJMqg"
    "FJ1RmlKUQSLvd3DmsqeZybZCfM41U8dYcdxi7xSls75IZ/8OhCV4tdiaWCLmgTqnar8PHnD9FUCdDRQdAAAAAElFTkSuQmCC"
)


def _example(summary: str, **value: Any) -> dict[str, Any]:
    return {"summary": summary, "value": value}


EXAMPLES: Final[dict[Task, dict[str, dict[str, Any]]]] = {
    Task.TXT2IMG: {
        "short": _example("Only a prompt", prompt="a pizza on a blue background"),
        "reproducible": _example("The same picture every time", prompt="a pizza on a blue background", seed=7),
        "full": _example(
            "Three pictures of another size, as WebP",
            prompt="a panda on a red background",
            negative_prompt="blurry",
            width=96,
            height=128,
            steps=12,
            guidance_scale=4.5,
            eta=0.2,
            seed=1234,
            n=3,
            priority="batch",
            deadline_seconds=600,
            output_format="webp",
            output_quality=85,
            metadata=False,
        ),
        "class": _example("A class, of a class-conditional model", class_label=207),
        "layout": _example(
            "Objects in boxes, of a layout model",
            layout=[
                {"label": 5, "box": [0.1, 0.3, 0.4, 0.6]},
                {"label": 12, "box": [0.5, 0.2, 0.4, 0.5], "occluded": True},
            ],
        ),
    },
    Task.IMG2IMG: {
        "repaint": _example(
            "Keep some of the picture", prompt="a pizza on a red background", image=_IMAGE, strength=0.6
        ),
    },
    Task.INPAINT: {
        "mask": _example(
            "Repaint the white part of the mask",
            prompt="a panda on a blue background",
            image=_IMAGE,
            mask=_MASK,
            seed=7,
        ),
        "data-urls": _example(
            "Pictures as data URLs",
            prompt="a panda on a blue background",
            image=f"data:image/png;base64,{_IMAGE}",
            mask=f"data:image/png;base64,{_MASK}",
        ),
    },
    Task.UPSCALE: {
        "enlarge": _example("Nothing but a picture", image=_SMALL),
        "with-prompt": _example("A prompt may help", image=_SMALL, prompt="an orange disc", output_format="jpeg"),
        "noise": _example("A poor picture, of which the model may make more", image=_SMALL, noise_level=100),
    },
}
