"""`darkroom models add-lora`: a low-rank adapter becomes one that requests to a model may name."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from cli import options
from cli.console import friendly_errors, out
from contract.spec import Name


def add_lora(
    model: Annotated[str, typer.Argument(help="The model that the adapter was trained on.")],
    path: Annotated[Path, typer.Argument(help="The adapter, .safetensors.", exists=True, dir_okay=False)],
    name: Annotated[
        str | None, typer.Option("--name", help="What requests call it. \\[default: the file's name]")
    ] = None,
    model_dir: options.ModelDir = options.DEFAULT_MODEL_DIR,
) -> None:
    """Check a low-rank adapter (LoRA) against a model and copy it there. Workers started from then on serve it.

    Reads files of diffusers and peft, of older diffusers, and of kohya's scripts. Needs torch.
    """
    from models.lora_files import FOLDER, copy_adapter, load_adapter
    from models.weights_io.tensors import WeightsError
    from worker.main import ModelFolderError, load

    called = name or path.stem
    try:
        TypeAdapter(Name).validate_python(called)
    except ValidationError as error:
        raise typer.BadParameter(
            f"{called!r} is no name: expected letters, digits, '.', '_' and '-'", param_hint="--name"
        ) from error
    target = model_dir / model / FOLDER / f"{called}.safetensors"
    with friendly_errors():
        if target.exists():
            raise FileExistsError(f"{target} exists: remove it, or choose another --name")
        try:
            adapter = load_adapter(path, load(model_dir / model).model)
        except (ModelFolderError, WeightsError) as error:
            raise typer.BadParameter(str(error)) from error
        copy_adapter(path, target)
    rank = max(low_rank.rank for part in (adapter.unet, adapter.text) for low_rank in part.values())
    reach = f"{len(adapter.unet)} modules of the UNet, {len(adapter.text)} of the text encoder, rank {rank}"
    out.print(f"{target}: {reach}", highlight=False, markup=False)
