"""`darkroom txt2img`, `img2img`, `inpaint`, `upscale`: one job on any server, its pictures into files."""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import httpx
import typer

from cli import options
from cli.client import DarkroomClient, Job
from cli.console import err, finish_with_bar, friendly_errors, out
from contract.spec import OutputFormat, Task

_SUFFIXES: Mapping[str, OutputFormat] = {
    ".png": OutputFormat.PNG,
    ".jpg": OutputFormat.JPEG,
    ".jpeg": OutputFormat.JPEG,
    ".webp": OutputFormat.WEBP,
}


def given(**fields: object) -> dict[str, Any]:
    """The fields that were given: what is left out takes the model's own default on the server."""
    return {name: value for name, value in fields.items() if value not in (None, "", [])}


def parse_loras(loras: Sequence[str]) -> list[dict[str, Any]]:
    """`NAME` or `NAME=WEIGHT` each."""
    parsed = []
    for text in loras:
        name, _, weight = text.partition("=")
        try:
            parsed.append({"name": name, "weight": float(weight or "1")})
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}: expected NAME or NAME=WEIGHT, e.g. --lora film=0.8") from error
    return parsed


def parse_layout(layout: str) -> list[Any]:
    """The list of objects, which the server checks."""
    try:
        objects = json.loads(layout or "[]")
    except ValueError as error:
        raise typer.BadParameter(f"--layout: {error}; expected a list of objects as JSON") from error
    if not isinstance(objects, list):
        raise typer.BadParameter(f"--layout is {layout}; expected a list of objects as JSON")
    return objects


def output_format(asked: OutputFormat | None, output: Path | None) -> OutputFormat:
    """By the option, else by the output file's name, else PNG."""
    if asked:
        return asked
    return _SUFFIXES.get(output.suffix.lower(), OutputFormat.PNG) if output else OutputFormat.PNG


def prepare_output(output: Path | None) -> None:
    """Makes the folder. Raises `typer.BadParameter` and `OSError` for what could not be written once the pictures are
    made."""
    if output is None or output.suffix.lower() in _SUFFIXES:
        folder = output.parent if output else Path()
    elif output.suffix and not output.is_dir():
        endings = ", ".join(_SUFFIXES)
        raise typer.BadParameter(f"{output}: expected a folder, or a file that ends in {endings}", param_hint="-o")
    else:
        folder = output
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")


def output_paths(output: Path | None, job: Job) -> list[Path]:
    """One path per picture: a given file's name gets the index when there are several."""
    extensions = [picture.content_type.removeprefix("image/") for picture in job.images]
    if output is not None and output.suffix.lower() in _SUFFIXES:
        if len(job.images) == 1:
            return [output]
        return [output.with_stem(f"{output.stem}-{picture.index}") for picture in job.images]
    folder = output or Path()
    return [
        folder / f"{job.id}-{picture.index}.{extension}"
        for picture, extension in zip(job.images, extensions, strict=True)
    ]


def save_pictures(client: DarkroomClient, job: Job, output: Path | None) -> list[Path]:
    paths = output_paths(output, job)
    for picture, path in zip(job.images, paths, strict=True):
        path.write_bytes(client.download(picture))
    return paths


def _request(
    output: options.Output = None,
    negative_prompt: options.Negative = "",
    model: options.Model = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.SamplerOption = None,
    eta: options.Eta = None,
    seed: options.Seed = None,
    n: options.Count = 1,
    loras: options.Loras = None,
    priority: options.PriorityOption = None,
    deadline: options.Deadline = None,
    format_: options.Format = None,
    quality: options.Quality = None,
    metadata: options.Metadata = True,
) -> dict[str, Any]:
    """The request fields that every task takes."""
    return given(
        negative_prompt=negative_prompt, model=model, steps=steps, guidance_scale=guidance,
        sampler=sampler, eta=eta, seed=seed, n=n, loras=parse_loras(loras or []), priority=priority,
        deadline_seconds=deadline, output_format=output_format(format_, output), output_quality=quality,
        metadata=metadata,
    )  # fmt: skip


def _content(
    prompt: options.Prompt = "", class_label: options.ClassLabel = None, layout: options.Layout = ""
) -> dict[str, Any]:
    """What says what is in the picture."""
    return given(prompt=prompt, class_label=class_label, layout=parse_layout(layout))


def _server(url: options.Url = options.DEFAULT_URL, api_key: options.ApiKey = None) -> tuple[str, str | None]:
    return url, api_key


Parts = Callable[..., Any]


def _taking(*parts: Parts) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of `parts` beside its own; each part's result arrives under the part's name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        part_names = {part.__name__.lstrip("_"): inspect.signature(part).parameters for part in parts}
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name not in part_names]
        options_ = {parameter.name: parameter for parameter in own}
        for parameters in part_names.values():
            options_ |= parameters

        @wraps(command)
        def merged(**values: Any) -> None:
            results = {
                name: part(**{key: values[key] for key in part_names[name]})
                for name, part in zip(part_names, parts, strict=True)
            }
            command(**{parameter.name: values[parameter.name] for parameter in own}, **results)

        ordered = sorted(options_.values(), key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        merged.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        merged.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        return merged

    return decorate


def _run(
    server: tuple[str, str | None], task: Task, fields: Mapping[str, Any], output: Path | None, **pictures: Path
) -> None:
    with friendly_errors(), DarkroomClient(*server) as client:
        prepare_output(output)
        job = client.submit(task, fields, **{name: path.read_bytes() for name, path in pictures.items()})
        with _told_when_left(job):
            job = finish_with_bar(client, job, task.value)
            paths = save_pictures(client, job, output)
    for picture, path in zip(job.images, paths, strict=True):
        out.print(f"{path}  {picture.width}x{picture.height}  seed {picture.seed}", highlight=False, markup=False)


@contextmanager
def _told_when_left(job: Job) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, httpx.TransportError, OSError):
        show, cancel = (f"`darkroom jobs {command} {job.id}`" for command in ("show", "cancel"))
        err.print(f"the job does not depend on this command: {show}, {cancel}", markup=False, soft_wrap=True)
        raise


@_taking(_content, _request, _server)
def txt2img(
    content: dict[str, Any],
    request: dict[str, Any],
    server: tuple[str, str | None],
    output: options.Output = None,
    width: options.Width = None,
    height: options.Height = None,
    semantic_map: options.SemanticMap = None,
) -> None:
    """Make pictures from a prompt, or from what else the model takes.

    Example: darkroom txt2img "a pizza on a blue background" --seed 7 -o pizza.png
    """
    fields = given(width=width, height=height) | content | request
    _run(server, Task.TXT2IMG, fields, output, **given(semantic_map=semantic_map))


@_taking(_content, _request, _server)
def img2img(
    image: options.ImageFile,
    content: dict[str, Any],
    request: dict[str, Any],
    server: tuple[str, str | None],
    output: options.Output = None,
    strength: options.Strength = None,
) -> None:
    """Repaint a picture after a prompt, keeping as much of it as --strength leaves.

    Example: darkroom img2img pizza.png "a pizza on a red background" --strength 0.6 -o red.png
    """
    fields = given(strength=strength) | content | request
    _run(server, Task.IMG2IMG, fields, output, image=image)


@_taking(_content, _request, _server)
def inpaint(
    image: options.ImageFile,
    mask: options.MaskFile,
    content: dict[str, Any],
    request: dict[str, Any],
    server: tuple[str, str | None],
    output: options.Output = None,
    strength: options.Strength = None,
) -> None:
    """Repaint the white part of a mask; the rest of the picture stays as it is.

    Example: darkroom inpaint pizza.png mask.png "a panda on a blue background" -o panda.png
    """
    fields = given(strength=strength) | content | request
    _run(server, Task.INPAINT, fields, output, image=image, mask=mask)


@_taking(_request, _server)
def upscale(
    image: options.ImageFile,
    request: dict[str, Any],
    server: tuple[str, str | None],
    prompt: options.Prompt = "",
    output: options.Output = None,
    noise_level: options.NoiseLevel = None,
) -> None:
    """Make a small picture larger, four times each way with the shipped model; a prompt may help.

    Example: darkroom upscale small.png -o large.png
    """
    _run(server, Task.UPSCALE, given(prompt=prompt, noise_level=noise_level) | request, output, image=image)
