"""How commands turn options into requests and pictures into files."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.client import Job
from cli.generate import given, output_format, output_paths, parse_layout, parse_loras
from cli.main import app
from contract.spec import OutputFormat


def job_with(pictures: int) -> Job:
    images = [
        {
            "index": index,
            "seed": 7 + index,
            "url": f"http://server/v1/images/{index}",
            "width": 128,
            "height": 128,
            "content_type": "image/png",
            "bytes": 1,
            "sha256": "0" * 64,
        }
        for index in range(pictures)
    ]
    urls = dict.fromkeys(("self", "events", "cancel"), "http://server/")
    return Job.model_validate(
        {
            "id": "j1",
            "task": "txt2img",
            "model": "m",
            "status": "succeeded",
            "created_at": "2026-01-01T00:00:00Z",
            "images": images,
            "urls": urls,
            "a field of a newer server": 1,
        }
    )


def test_fields_left_out_are_not_sent_but_zeros_are() -> None:
    assert given(eta=0.0, seed=0, model=None, negative_prompt="", loras=[], metadata=False) == {
        "eta": 0.0,
        "seed": 0,
        "metadata": False,
    }


def test_loras_carry_a_weight_of_one_unless_given() -> None:
    assert parse_loras(["film", "neon=0.5"]) == [{"name": "film", "weight": 1.0}, {"name": "neon", "weight": 0.5}]
    with pytest.raises(typer.BadParameter, match="expected NAME or NAME=WEIGHT"):
        parse_loras(["film=much"])


def test_a_layout_is_a_list_of_objects() -> None:
    assert parse_layout('[{"label": 3, "box": [0, 0, 0.5, 1]}]') == [{"label": 3, "box": [0, 0, 0.5, 1]}]
    assert parse_layout("") == []
    for wrong in ("a dog on the left", '{"label": 3}'):
        with pytest.raises(typer.BadParameter, match="expected a list of objects as JSON"):
            parse_layout(wrong)


@pytest.mark.parametrize(
    ("asked", "output", "expected"),
    [
        (None, None, OutputFormat.PNG),
        (None, Path("a.jpg"), OutputFormat.JPEG),
        (None, Path("a.WEBP"), OutputFormat.WEBP),
        (None, Path("folder"), OutputFormat.PNG),
        (OutputFormat.PNG, Path("a.jpg"), OutputFormat.PNG),
    ],
)
def test_format_follows_the_option_then_the_name(
    asked: OutputFormat | None, output: Path | None, expected: OutputFormat
) -> None:
    assert output_format(asked, output) is expected


@pytest.mark.parametrize(
    ("output", "pictures", "expected"),
    [
        (None, 1, ["j1-0.png"]),
        (Path("a.png"), 1, ["a.png"]),
        (Path("d/a.png"), 2, ["d/a-0.png", "d/a-1.png"]),
        (Path("d"), 2, ["d/j1-0.png", "d/j1-1.png"]),
    ],
)
def test_each_picture_gets_a_path(output: Path | None, pictures: int, expected: list[str]) -> None:
    assert output_paths(output, job_with(pictures)) == [Path(path) for path in expected]


def test_without_a_server_the_error_says_what_to_do() -> None:
    done = CliRunner().invoke(app, ["jobs", "list", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "Start one with" in re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize(
    "command", [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
)
def test_every_command_teaches(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert len(done.stdout) > 200


@pytest.mark.parametrize("command", ["txt2img", "img2img", "inpaint", "upscale"])
def test_picture_commands_share_their_options(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160"}).stdout
    for option in ("--output", "--model", "--steps", "--guidance", "--seed", "--format", "--url", "--api-key"):
        assert option in text, f"{command} lacks {option}"
