"""The whole service as `darkroom up` starts it, used by the commands as a person would, and leaving nothing behind."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cli.client import ApiError, DarkroomClient, Job, JobFailedError, Update
from cli.main import app
from cli.stack import Stack, StackConfig, StackError
from contract.spec import JobStatus, Task
from tests.tiny_models import BASE, UPSCALER, save_tiny_as_shipped, save_tiny_models


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config = StackConfig(tmp_path_factory.mktemp("stack"), model_dir, (BASE, UPSCALER))
    with Stack(config) as running:
        yield running
        pids = running.pids
    assert sorted(pids) == ["gateway", "valkey", "worker"]
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()], "a process outlived the stack"


@pytest.fixture
def client(stack: Stack) -> Iterator[DarkroomClient]:
    with DarkroomClient(stack.url) as connected:
        yield connected


def run(stack: Stack, *arguments: str | Path) -> Result:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"DARKROOM_URL": stack.url, "COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done


def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    Image.linear_gradient("L").resize(size).convert(mode).save(path)
    return path


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def test_txt2img_repeats_with_its_seed(stack: Stack, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first.png", "again.png", "other.png"))
    for path, seed in ((first, 7), (again, 7), (other, 8)):
        done = run(stack, "txt2img", "a pizza", "--seed", str(seed), "-o", path)
        assert f"seed {seed}" in done.stdout
    assert first.read_bytes() == again.read_bytes()
    assert opened(first).tobytes() != opened(other).tobytes()


def test_several_pictures_and_another_format(stack: Stack, tmp_path: Path) -> None:
    run(stack, "txt2img", "a pizza", "-n", "2", "--width", "80", "--height", "64", "-o", tmp_path / "p.jpg")
    for index in range(2):
        image = opened(tmp_path / f"p-{index}.jpg")
        assert (image.format, image.size) == ("JPEG", (80, 64))


def test_pictures_in_pictures_out(stack: Stack, tmp_path: Path) -> None:
    image, mask = picture(tmp_path / "in.png", (64, 64)), tmp_path / "mask.png"
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(mask)
    run(stack, "img2img", image, "a pizza", "--strength", "0.5", "-o", tmp_path / "img2img.png")
    run(stack, "inpaint", image, mask, "a pizza", "-o", tmp_path / "inpaint.png")
    small = picture(tmp_path / "small.png", (16, 16))
    run(stack, "upscale", small, "--noise-level", "300", "-o", tmp_path / "large.png")
    assert opened(tmp_path / "img2img.png").size == (64, 64)
    kept = (32, 0, 64, 64)
    assert opened(tmp_path / "inpaint.png").crop(kept).tobytes() == opened(image).crop(kept).tobytes()
    large = opened(tmp_path / "large.png")
    assert large.size == (64, 64)
    assert "Noise level: 300" in large.info["parameters"]


def test_unknown_words_are_told(stack: Stack, tmp_path: Path) -> None:
    done = run(stack, "txt2img", "a pizza with gorgonzola", "-o", tmp_path / "p.png")
    assert "gorgonzola" in done.stderr


def test_a_refusal_names_the_field(stack: Stack) -> None:
    done = CliRunner().invoke(app, ["txt2img", "a pizza", "--steps", "0", "--url", stack.url])
    assert done.exit_code == 1
    assert "/steps" in done.stderr


def test_what_the_model_does_not_take_is_sent_and_refused(stack: Stack, tmp_path: Path) -> None:
    given = ["--class-label", "3", "--layout", '[{"label": 1, "box": [0, 0, 1, 1]}]']
    given += ["--semantic-map", str(picture(tmp_path / "map.png", (64, 64), "L"))]
    done = CliRunner().invoke(app, ["txt2img", *given, "--url", stack.url], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    for field in ("/class_label", "/layout", "/semantic_map", "/prompt"):
        assert field in done.stderr


def test_jobs_are_listed_shown_and_deleted(stack: Stack, client: DarkroomClient) -> None:
    job = client.result(followed(client, client.submit(Task.TXT2IMG, {"prompt": "a pizza", "seed": 3})))
    listing = CliRunner().invoke(app, ["jobs", "list", "--url", stack.url], env={"COLUMNS": "80"}).stdout
    line = next(line for line in listing.splitlines() if job.id in line)
    assert re.fullmatch(rf"{job.id} +txt2img +succeeded +\d+s +tiny +a piz.*", line), (
        "a narrow terminal keeps what matters"
    )
    shown = json.loads(run(stack, "jobs", "show", job.id).stdout)
    assert shown["images"][0]["seed"] == 3
    run(stack, "jobs", "delete", job.id)
    with pytest.raises(ApiError, match="job_not_found"):
        client.job(job.id)


def test_a_cancelled_job_says_so(stack: Stack, client: DarkroomClient) -> None:
    job = client.submit(Task.TXT2IMG, {"prompt": "a pizza", "steps": 150, "n": 8})
    run(stack, "jobs", "cancel", job.id)
    with pytest.raises(JobFailedError, match="cancelled"):
        client.result(followed(client, job))


def test_models_are_listed_with_what_they_know(stack: Stack) -> None:
    table = run(stack, "models", "list", "--server").stdout
    assert BASE in table
    assert UPSCALER in table
    assert "pizza" in table


def followed(client: DarkroomClient, job: Job) -> Job:
    assert list(client.follow(job))[-1].status.ended
    return job


def test_events_and_polling_tell_the_same_end(client: DarkroomClient) -> None:
    """Where events do not come (here: the address answers with something else), the client asks instead."""
    job = client.submit(Task.TXT2IMG, {"prompt": "a pizza", "steps": 12})
    updates = list(client.follow(job))
    assert updates[-1] == Update(status=JobStatus.SUCCEEDED)
    assert max(update.step for update in updates) == 12
    no_stream = job.model_copy(update={"urls": job.urls.model_copy(update={"events": job.urls.self})})
    polled = list(client.follow(no_stream))
    assert polled == [Update(status=JobStatus.SUCCEEDED, step=12, steps=12)]


def test_render_makes_the_picture_that_the_service_makes(stack: Stack, model_dir: Path, tmp_path: Path) -> None:
    run(stack, "txt2img", "a pizza", "--model", BASE, "--seed", "5", "-o", tmp_path / "served.png")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"task": "txt2img", "model": BASE, "prompt": "a pizza", "seed": 5}))
    run(stack, "render", spec, "--model-dir", model_dir, "-o", tmp_path)
    assert (tmp_path / "render-0.png").read_bytes() == (tmp_path / "served.png").read_bytes()


def test_demo_makes_three_pictures_and_a_sheet(tmp_path: Path) -> None:
    weights, folder = tmp_path / "weights", tmp_path / "demo"
    save_tiny_as_shipped(weights)
    done = CliRunner().invoke(
        app, ["demo", "--folder", str(folder), "--model-dir", str(weights)], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    sizes = {path.stem: opened(path).size for path in folder.iterdir()}
    sheet = sizes.pop("contact-sheet")
    assert sizes == {"txt2img": (128, 128), "mask": (128, 128), "inpaint": (128, 128), "upscale": (512, 512)}
    assert sheet[0] > 4 * 256
    for path in folder.iterdir():
        assert str(path) in done.stdout
    assert "nothing is left running" in done.stdout


def test_ctrl_c_stops_everything(model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "up", "--port", "0", "--models", BASE]
    command += ["--model-dir", str(model_dir), "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        assert up.stdout is not None
        lines = []
        for line in up.stdout:
            lines.append(line)
            if "Ctrl-C stops" in line:
                break
        else:
            pytest.fail("".join(lines))
        url = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
        assert url is not None
        assert httpx.get(f"{url.group()}/v1/models").json()["data"][0]["workers"] == 1
        children = Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()
        assert len(children) == 3
        up.send_signal(signal.SIGINT)
        assert "stopped" in up.stdout.read()
    assert up.returncode == 0
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_a_part_that_cannot_start_is_shown_with_its_log(tmp_path: Path) -> None:
    stack = Stack(StackConfig(tmp_path, tmp_path / "no-weights", ("absent",)))
    with pytest.raises(StackError, match=r"the worker ended with status 1:[\s\S]*card\.json is missing"), stack:
        pass
    assert stack.pids == {}


def test_a_folder_serves_one_stack_at_a_time(stack: Stack, model_dir: Path) -> None:
    other = Stack(StackConfig(stack.config.folder, model_dir, (BASE,)))
    with pytest.raises(StackError, match=r"in use by another `darkroom up`.*--data-dir"), other:
        pass
    assert other.pids == {}
    assert httpx.get(f"{stack.url}/readyz").is_success


def test_a_port_of_others_is_told_before_anything_starts(stack: Stack, model_dir: Path, tmp_path: Path) -> None:
    """The gateway behind it must not be taken for our own."""
    port = httpx.URL(stack.url).port
    command = ["up", "--port", str(port), "--data-dir", str(tmp_path), "--model-dir", str(model_dir), "--models", BASE]
    for _ in range(2):  # the first has left the folder free
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert f"port {port} cannot be used (Address already in use): give another with --port" in done.stderr
        assert done.stdout == ""


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Processes started meanwhile heed SIGINT, even where the tests run in the background of a shell and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_whoever_stops_waiting_is_told_of_the_job(stack: Stack, client: DarkroomClient, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "txt2img", "a pizza", "--steps", "150", "-n", "8", "--url", stack.url]
    with subprocess.Popen([*command, "-o", str(tmp_path)], stderr=subprocess.PIPE, text=True) as waiting:
        deadline = time.monotonic() + 30
        while not (page := client.jobs(JobStatus.RUNNING))["data"] and time.monotonic() < deadline:
            time.sleep(0.02)
        waiting.send_signal(signal.SIGINT)
        assert waiting.stderr is not None
        told = re.search(r"`darkroom jobs cancel (\w+)`", waiting.stderr.read())
    assert waiting.returncode == 130
    assert told is not None
    assert told[1] == page["data"][0]["id"]
    client.cancel(told[1])


def test_a_downloaded_file_is_compared_with_its_digest(client: DarkroomClient) -> None:
    job = client.result(followed(client, client.submit(Task.TXT2IMG, {"prompt": "a pizza"})))
    data = client.download(job.images[0])
    assert Image.open(io.BytesIO(data)).size == (64, 64)
    with pytest.raises(OSError, match="not the one that was stored"):
        client.download(job.images[0].model_copy(update={"sha256": "0" * 64}))
