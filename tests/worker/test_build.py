"""Models in a folder become an engine as settings and calibration ask."""

import dataclasses
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from contract.settings import Settings
from models.tasks import PictureRequest
from tests.tiny_models import BASE, UPSCALER, base_card, upscaler_card
from worker import build as build_module
from worker.batch_worker import ServedModel
from worker.build import buckets, build, choose, usual_lane
from worker.engine import numerics
from worker.engine.calibration import Calibration, CalibrationError, DeviceCalibration, Measured
from worker.engine.engine import Engine
from worker.engine.events import LaneTicked, RowFinished
from worker.engine.numerics import NumericsError
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Tuning, default_tuning
from worker.main import load, warm_up

CPU = torch.device("cpu")
NAMES = (BASE, UPSCALER)


def loaded(model_dir: Path) -> Iterator[ServedModel]:
    return (load(model_dir / name) for name in NAMES)


def run(engine: Engine) -> tuple[dict[str, Image.Image], list[int]]:
    """Pictures by row, and the buckets of all ticks."""
    pictures, batches = {}, []
    while not engine.idle:
        for event in engine.tick():
            if isinstance(event, RowFinished):
                pictures[event.row_id] = event.image
            if isinstance(event, LaneTicked):
                batches.append(event.bucket)
    return pictures, batches


def test_exact_pictures_are_the_same_alone_and_in_company(model_dir: Path) -> None:
    engine, served = build(Settings(worker_slots=4), loaded(model_dir), model_dir, CPU)
    warm_up(engine, served)
    one = PictureRequest("txt2img", "a cat", 64, 64, seed=1, steps=4, guidance_scale=3.0)
    engine.submit("alone", BASE, one)
    (alone,), batches = run(engine)[0].values(), run(engine)[1]
    for seed in range(2, 5):
        engine.submit(f"other {seed}", BASE, PictureRequest("txt2img", "a dog", 64, 64, seed=seed, steps=3 + seed))
        engine.tick()
    engine.submit("in company", BASE, one)
    pictures, batches = run(engine)
    assert max(batches) == 4
    assert np.array_equal(np.asarray(pictures["in company"]), np.asarray(alone))


def test_fast_takes_every_bucket_and_has_another_fingerprint(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = build(Settings(worker_slots=2), loaded(model_dir), model_dir, CPU)
    monkeypatch.setattr(numerics, "probe", None)  # not called
    fast, _ = build(Settings(worker_slots=2, batching="fast"), loaded(model_dir), model_dir, CPU)
    again, _ = build(Settings(worker_slots=2, batching="fast"), loaded(model_dir), model_dir, CPU)
    assert fast.fingerprint == again.fingerprint != exact.fingerprint
    assert {slots: buckets(slots) for slots in (1, 2, 6, 8)} == {1: (1,), 2: (1, 2), 6: (1, 2, 4, 6), 8: (1, 2, 4, 8)}


def test_the_fingerprint_names_the_schedule_and_this_version(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the same: their digest stands in a card, and is not looked at again."""
    folder = tmp_path / BASE
    shutil.copytree(model_dir / BASE, folder)
    card = base_card().model_copy(update={"digest": "0" * 64})
    (folder / "card.json").write_text(card.model_dump_json())

    def fingerprint() -> str:
        fast = Settings(worker_slots=1, batching="fast")
        return build(fast, [load(folder)], tmp_path, CPU)[0].fingerprint

    found = [fingerprint(), fingerprint()]
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "leading"}))
    found.append(fingerprint())
    monkeypatch.setattr(build_module, "version", lambda package: f"{package} of tomorrow")
    found.append(fingerprint())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_no_two_models_are_in_memory_untuned(model_dir: Path) -> None:
    def one_after_the_other() -> Iterator[ServedModel]:
        for name in NAMES:
            served = load(model_dir / name)
            unet = weakref.ref(served.model.unet)
            yield served
            del served
            gc.collect()
            assert unet() is None, f"the untuned UNet of {name} is kept"

    build(Settings(batching="fast"), one_after_the_other(), model_dir, CPU)


def test_exact_is_refused_where_the_probe_fails(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise NumericsError("rows differ; use batching=fast")

    monkeypatch.setattr(numerics, "probe", fail)
    with pytest.raises(NumericsError, match="use batching=fast"):
        build(Settings(), loaded(model_dir), model_dir, CPU)


def test_calibration_chooses_tuning_and_bucket(tmp_path: Path, model_dir: Path) -> None:
    bf16, fp32 = Tuning("bfloat16", attention="plain"), Tuning("float32", packed=True)
    measured = {"float32": Measured(fp32, {"8x8 guided": 2}), "bfloat16": Measured(bf16, {})}
    kind = numerics.device_kind(CPU)
    calibration = Calibration({kind: DeviceCalibration("bfloat16", measured)})  # type: ignore[arg-type]
    calibration.write(tmp_path)
    assert Calibration.read(tmp_path) == calibration
    assert choose(calibration, CPU, "auto").tuning == bf16
    chosen = choose(calibration, CPU, "float32")
    assert (chosen.tuning, chosen.buckets) == (fp32, {"8x8 guided": 2})
    lane = LaneKey(BASE, 8, 8, guided=True, blends=True, rank=8)
    assert (chosen.bucket(lane), chosen.bucket(dataclasses.replace(lane, guided=False))) == (2, None)
    unknown = Calibration.read(tmp_path / "nowhere")
    assert choose(unknown, CPU, "auto") == build_module.Choice(default_tuning(CPU), {})
    assert choose(unknown, CPU, "bfloat16").tuning.dtype == "bfloat16"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"version": 2, "devices": {}}', '{"version": 1, "devices": {"cpu": {"dtype": "float32"}}}'],
)
def test_an_unreadable_calibration_says_how_to_make_it_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"calibration\.json cannot be read .* bench calibrate --model-dir"):
        Calibration.read(tmp_path)


def test_usual_lanes() -> None:
    assert usual_lane(base_card()) == LaneKey(BASE, 8, 8, guided=True)
    assert usual_lane(upscaler_card()) == LaneKey(UPSCALER, 16, 16, guided=False)
