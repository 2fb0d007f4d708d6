"""Finished pictures as files: encoding, the parameters that made them, and what a result tells of them."""

import hashlib
import io
from typing import Any, Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from contract import keys
from contract.spec import JobSpec, OutputFormat, PictureResult, Task

_EXIF_IFD: Final = 0x8769
_USER_COMMENT: Final = 0x9286
_PREVIEW_SIDE: Final = 256


def parameters_text(spec: JobSpec, index: int, digest: str) -> str:
    """The text that users of other tools expect: prompt, negative prompt, then "Steps: 20, Sampler: DDIM, ..."."""
    values: dict[str, Any] = {
        "Steps": spec.steps,
        "Sampler": spec.sampler.usual_name,
        "CFG scale": f"{spec.guidance_scale:g}",
        "Seed": spec.picture_seed(index),
        "Size": f"{spec.width}x{spec.height}",
        "Model": spec.model,
    }
    if digest:
        values["Model hash"] = digest[:10]
    if spec.class_label is not None:
        values["Class label"] = spec.class_label
    if spec.eta:
        values["Eta"] = f"{spec.eta:g}"
    if spec.task in (Task.IMG2IMG, Task.INPAINT):
        values["Denoising strength"] = f"{spec.strength:g}"
    if spec.noise_level is not None:
        values["Noise level"] = spec.noise_level
    adapters = [f"<lora:{lora.name}:{lora.weight:g}>" for lora in spec.loras]
    lines = [" ".join([spec.prompt, *adapters] if spec.prompt else adapters)]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])


def encode(image: Image.Image, spec: JobSpec, index: int, digest: str = "") -> bytes:
    """The picture's file; the same picture and spec always give the same bytes. `digest` is that of the weights."""
    text = parameters_text(spec, index, digest) if spec.metadata else None
    options: dict[str, Any] = {}
    if spec.output_format is OutputFormat.PNG:
        if text is not None:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", text)
    else:
        options["quality"] = spec.output_quality
        if text is not None:
            options["exif"] = _user_comment(text)
    buffer = io.BytesIO()
    image.save(buffer, format=spec.output_format.value.upper(), **options)
    return buffer.getvalue()


def _user_comment(text: str) -> Image.Exif:
    """EXIF with a UserComment (EXIF 2.3, 4.6.5), where JPEG and WebP keep the parameters."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def encode_preview(preview: Image.Image, width: int, height: int) -> bytes:
    """A preview in latent size as a JPEG in the picture's proportions, its longer side at most 256 pixels."""
    scale = min(1.0, _PREVIEW_SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    preview.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def picture_result(spec: JobSpec, execution_id: str, index: int, size: tuple[int, int], data: bytes) -> PictureResult:
    """What the job's result tells of a picture of `size` (width, height) whose file is `data`."""
    return PictureResult(
        index=index,
        seed=spec.picture_seed(index),
        key=keys.output_object(spec.id, execution_id, index, spec.output_format.value),
        width=size[0],
        height=size[1],
        content_type=spec.output_format.content_type,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
