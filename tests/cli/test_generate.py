"""How commands turn options into requests and pictures into files."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.client import Job
from cli.generate import given, output_format, output_paths, parse_layout, parse_loras, prepare_output
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


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9", "no server answered at http://127.0.0.1:9 ("),
        ("localhost:8000", "e.g. http://127.0.0.1:8000"),
        ("http://[", "e.g. http://127.0.0.1:8000"),
    ],
)
def test_without_a_server_the_error_says_what_to_do(url: str, said: str) -> None:
    done = CliRunner().invoke(app, ["jobs", "list", "--url", url])
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Start one with `darkroom up`" in done.stderr


def test_what_cannot_be_written_is_refused_before_a_job_is_made(tmp_path: Path) -> None:
    """No server is asked: these errors are not that none answers."""
    (tmp_path / "file").touch()
    for output, said in (("a.gif", "expected a folder, or a file that ends in .png"), ("file/a.png", "file")):
        arguments = ["txt2img", "a pizza", "--url", "http://127.0.0.1:9", "-o", str(tmp_path / output)]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
        assert done.exit_code in (1, 2)
        assert said in done.stderr
        assert "no server" not in done.stderr
    prepare_output(tmp_path / "new" / "a.png")
    prepare_output(tmp_path / "other")
    assert (tmp_path / "new").is_dir()
    assert (tmp_path / "other").is_dir()


@pytest.mark.parametrize("command", ["gateway", "worker"])
def test_a_wrong_setting_is_one_line_with_its_name(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_PORT", "secret")
    done = CliRunner().invoke(app, [command])
    assert done.exit_code == 2
    assert done.stderr.startswith("DARKROOM_PORT: ")
    assert len(done.stderr.splitlines()) == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("spec", ["[]", '{"task": "txt2img"}', "no JSON"])
def test_a_spec_without_a_model_is_told(spec: str, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(spec)
    done = CliRunner().invoke(app, ["render", str(tmp_path / "spec.json")], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert "expect" in done.stderr.lower()


def test_a_folder_without_models_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["models", "list", "--model-dir", str(tmp_path)])
    assert done.exit_code == 0
    assert f"{tmp_path} holds no models" in done.stderr


@pytest.mark.parametrize("wrong", [["--models", " , "], ["--port", "70000"]])
def test_up_needs_models_and_a_port(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["up", *wrong])
    assert done.exit_code == 2
    assert wrong[0] in done.stderr


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
