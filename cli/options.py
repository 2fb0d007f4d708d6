"""Command-line options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from contract.spec import OutputFormat, Priority, Sampler

Url = Annotated[str, typer.Option("--url", envvar="DARKROOM_URL", help="The server's address.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="DARKROOM_API_KEY", help="Key of servers that ask for one.")
]
DEFAULT_URL = "http://127.0.0.1:8000"

ModelDir = Annotated[
    Path, typer.Option("--model-dir", envvar="DARKROOM_MODEL_DIR", help="Folder with one folder per model.")
]
DEFAULT_MODEL_DIR = Path("weights")

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="Folder of the tokenizer's files, which no single file holds. \\[default: beside the file]",
        exists=True,
        file_okay=False,
    ),
]
Prediction = Annotated[
    PredictionType | None,
    typer.Option("--prediction-type", help="What the UNet of a single file predicts, where its keys cannot tell."),
]

Prompt = Annotated[
    str,
    typer.Argument(help="What the picture shows, e.g. 'a pizza on a blue background'; for models that take text."),
]
ImageFile = Annotated[
    Path, typer.Argument(help="Picture file: PNG, JPEG or WebP.", exists=True, dir_okay=False, readable=True)
]
MaskFile = Annotated[
    Path,
    typer.Argument(help="Mask of the picture's size: white is repainted.", exists=True, dir_okay=False, readable=True),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="File or folder to write to. \\[default: JOB-INDEX in this folder]"),
]

_GENERATION = "What to make"
_OUTPUT = "How to deliver it"
Negative = Annotated[str, typer.Option("--negative", help="What to stay away from.", rich_help_panel=_GENERATION)]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Name of a model, as `darkroom models list --server` shows it. \\[default: the task's first]",
        rich_help_panel=_GENERATION,
    ),
]
Width = Annotated[int | None, typer.Option("--width", help="Pixels.", rich_help_panel=_GENERATION)]
Height = Annotated[int | None, typer.Option("--height", help="Pixels.", rich_help_panel=_GENERATION)]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps: more is finer and slower.", rich_help_panel=_GENERATION)
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="Guidance scale: how closely to follow the prompt.", rich_help_panel=_GENERATION),
]
SamplerOption = Annotated[
    Sampler | None,
    typer.Option("--sampler", help="How to denoise. \\[default: ddim]", rich_help_panel=_GENERATION),
]
Eta = Annotated[
    float | None,
    typer.Option("--eta", help="Of ddim: 0 adds no noise, 1 that of DDPM at every step.", rich_help_panel=_GENERATION),
]
ClassLabel = Annotated[
    int | None, typer.Option("--class-label", help="For class-conditional models.", rich_help_panel=_GENERATION)
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        help='For layout models, JSON: \\[{"label": 3, "box": \\[X, Y, WIDTH, HEIGHT]}], 0 to 1.',
        rich_help_panel=_GENERATION,
    ),
]
SemanticMap = Annotated[
    Path | None,
    typer.Option(
        "--semantic-map",
        help="For semantic models: PNG file whose grey values are classes.",
        exists=True,
        dir_okay=False,
        readable=True,
        rich_help_panel=_GENERATION,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="Same seed, same picture. \\[default: drawn by the server]", rich_help_panel=_GENERATION
    ),
]
Count = Annotated[
    int, typer.Option("-n", "--count", help="Pictures; picture i uses seed + i.", rich_help_panel=_GENERATION)
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="0 to 1: how far to depart from the picture.", rich_help_panel=_GENERATION),
]
NoiseLevel = Annotated[
    int | None,
    typer.Option(
        "--noise-level",
        help="Noise put on the picture first: 0 keeps to it, more leaves more to the model.",
        rich_help_panel=_GENERATION,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="NAME or NAME=WEIGHT; may be given again.", rich_help_panel=_GENERATION),
]
PriorityOption = Annotated[
    Priority | None, typer.Option("--priority", help="Which queue to wait in.", rich_help_panel=_OUTPUT)
]
Deadline = Annotated[
    float | None,
    typer.Option("--deadline", help="Seconds after which to give up.", rich_help_panel=_OUTPUT),
]
Format = Annotated[
    OutputFormat | None,
    typer.Option("--format", help="File format. \\[default: by the name given to -o]", rich_help_panel=_OUTPUT),
]
Quality = Annotated[int | None, typer.Option("--quality", help="1 to 100, for JPEG and WebP.", rich_help_panel=_OUTPUT)]
Metadata = Annotated[
    bool, typer.Option("--metadata/--no-metadata", help="Write the parameters into the file.", rich_help_panel=_OUTPUT)
]
