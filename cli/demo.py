"""`darkroom demo`: the whole service, started, used over HTTP for each kind of picture, and stopped."""

import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw
from rich.table import Table

from cli import options
from cli.client import DarkroomClient, Job
from cli.console import err, finish_with_bar, friendly_errors, out
from cli.contact_sheet import contact_sheet
from cli.generate import given, output_format, prepare_output
from cli.server import SHIPPED_MODELS
from cli.stack import Stack, StackConfig, StackError, stop_signals_raise
from contract.spec import Task

DEMO_PROMPT = "a pizza on a blue background"
DEMO_REPAINT = "a panda on a blue background"
DEMO_SEED = 7


@dataclass
class Session:
    """A client, and the seconds that its jobs took from POST to the file's bytes."""

    client: DarkroomClient
    rows: list[tuple[str, Job, float]] = field(default_factory=list)

    def make(self, task: Task, fields: Mapping[str, Any], **pictures: bytes) -> bytes:
        """The first picture of a new job, as file bytes."""
        started = time.monotonic()
        job = finish_with_bar(self.client, self.client.submit(task, fields, **pictures), task.value)
        data = self.client.download(job.images[0])
        self.rows.append((task.value, job, time.monotonic() - started))
        return data


def demo(
    prompt: Annotated[str | None, typer.Option("--prompt", help="Make only this picture.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same picture.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Where the picture of --prompt goes.")] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where the demo's pictures go.")] = Path("demo"),
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Start everything, make a picture, inpaint it, enlarge it, stop everything.

    With --prompt: only that picture. Example: darkroom demo --prompt "a cat on a red background" --seed 3 --out cat.png
    """
    if out_file is not None and prompt is None:
        raise typer.BadParameter("--out names the picture of --prompt; without a prompt, give --folder")
    models = SHIPPED_MODELS if prompt is None else SHIPPED_MODELS[:1]
    try:
        with tempfile.TemporaryDirectory(prefix="darkroom-") as data, stop_signals_raise(), friendly_errors():
            prepare_output(folder if out_file is None else out_file)
            started = time.monotonic()
            err.print("starting Valkey, gateway and worker ...")
            with Stack(StackConfig(Path(data), model_dir, models)) as stack:
                start_seconds = time.monotonic() - started
                with DarkroomClient(stack.url) as client:
                    session = Session(client)
                    if prompt is None:
                        written = make_three(session, folder, DEMO_SEED if seed is None else seed)
                    else:
                        written = make_one(session, prompt, seed, out_file or folder / "txt2img.png")
                stopping = time.monotonic()
            report(session, written, start_seconds, time.monotonic() - stopping)
    except KeyboardInterrupt as error:
        err.print("stopped")
        raise typer.Exit(130) from error
    except StackError as error:
        err.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def make_one(session: Session, prompt: str, seed: int | None, path: Path) -> list[Path]:
    picture = session.make(Task.TXT2IMG, given(prompt=prompt, seed=seed, output_format=output_format(None, path)))
    return [write(path, picture)]


def make_three(session: Session, folder: Path, seed: int) -> list[Path]:
    """A picture; the same with its middle repainted; the first one enlarged; and all of them on one sheet."""
    first = session.make(Task.TXT2IMG, given(prompt=DEMO_PROMPT, seed=seed))
    mask = middle_mask(first)
    repainted = session.make(Task.INPAINT, given(prompt=DEMO_REPAINT, seed=seed), image=first, mask=mask)
    enlarged = session.make(Task.UPSCALE, given(prompt=DEMO_PROMPT, seed=seed), image=first)
    sheet = contact_sheet(
        [
            (f"txt2img: {DEMO_PROMPT}", first),
            ("the mask: white is repainted", mask),
            (f"inpaint: {DEMO_REPAINT}", repainted),
            ("upscale", enlarged),
        ]
    )
    files = {"txt2img": first, "mask": mask, "inpaint": repainted, "upscale": enlarged, "contact-sheet": sheet}
    return [write(folder / f"{name}.png", data) for name, data in files.items()]


def middle_mask(picture: bytes) -> bytes:
    """White in the middle three quarters, where the demo's object stands."""
    width, height = Image.open(io.BytesIO(picture)).size
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(
        (width // 8, height // 8, width - width // 8 - 1, height - height // 8 - 1), fill=255
    )
    file = io.BytesIO()
    mask.save(file, "PNG")
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def report(session: Session, written: list[Path], start_seconds: float, stop_seconds: float) -> None:
    table = Table("seconds", "queued", "denoise", "decode", "store", "POST to file", "seed")
    for name, job, total in session.rows:
        timings = job.timings
        stages = (timings.queued, timings.denoise, timings.decode, timings.store) if timings else ()
        table.add_row(name, *(f"{seconds:.2f}" for seconds in stages), f"{total:.2f}", str(job.images[0].seed))
    out.print(table)
    out.print(f"start {start_seconds:.1f} s, stop {stop_seconds:.1f} s; nothing is left running")
    for path in written:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
