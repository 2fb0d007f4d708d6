"""Rows of one batch with different low-rank adapters: each as `LatentDiffusion.render` makes it alone."""

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.lora_files import FOLDER, load_adapters
from models.tasks import PictureRequest
from tests.adapter_files import ATTENTION, EVERYWHERE, TEXT, random_pairs, text_root, write_kohya, write_peft
from tests.tiny_models import BASE, UPSCALER
from worker.engine import adapters, runner
from worker.engine.bank import Bank
from worker.engine.engine import Engine
from worker.engine.events import LaneTicked, RowFinished
from worker.engine.numerics import ExactPlan, NumericsError, probe
from worker.engine.resident import ResidentModel
from worker.engine.resume import ResumeState
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Dtype, Tuning, candidates, default_tuning, tune

Models = Mapping[str, LatentDiffusion]
Loras = tuple[tuple[str, float], ...]
DEVICE = torch.device(os.environ.get("DARKROOM_TEST_DEVICE", "cpu"))
FORMS = candidates(DEVICE, "float32")
TOLERANCE = 2e-5 if DEVICE.type == "cpu" else 1e-2
"""Of latents; GPUs may take TF32 in convolutions."""
COMPANY: dict[str, Loras] = {
    "none": (),
    "attention": (("attention", 1.0),),
    "everywhere": (("everywhere", 0.7),),
    "both": (("attention", -0.5), ("everywhere", 0.4)),
    "wide": (("wide", 1.0),),
    "convolutions": (("convolutions", 1.0),),
    "time": (("time", 1.0),),
    "text": (("text", 1.0),),
    "context": (("context", 1.0),),
}
RANKS = {"none": 0, "attention": 8, "everywhere": 8, "both": 8, "wide": 16, "convolutions": 8, "text": 0, "context": 0}


@pytest.fixture(scope="module")
def models_with(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny models with adapters of several kinds and ranks."""
    return {name: with_adapters(model, tmp_path_factory.mktemp("model")) for name, model in models.items()}


def with_adapters(model: LatentDiffusion, folder: Path) -> LatentDiffusion:
    loras = folder / FOLDER
    pairs = functools.partial(random_pairs, model.unet, gain=0.4)
    text = random_pairs(text_root(model), TEXT, 4, 9)
    write_peft(loras / "attention.safetensors", pairs(ATTENTION, 5, 1), text, {"unet.lora_alpha": 4})
    write_kohya(loras / "everywhere.safetensors", pairs(EVERYWHERE, 3, 2), alpha=2.0)
    write_peft(loras / "wide.safetensors", pairs(ATTENTION, 9, 3))
    write_peft(loras / "convolutions.safetensors", pairs(r".*conv\d?|conv_in|conv_out", 8, 4))
    write_peft(loras / "time.safetensors", pairs(r".*(time_emb_proj|linear_\d)", 4, 5))
    write_peft(loras / "text.safetensors", {}, text)
    write_peft(loras / "context.safetensors", pairs(r".*attn2\.to_(k|v)", 4, 6))
    model = copy.copy(model)
    model.adapters = load_adapters(folder, model)
    return model


def request(loras: Loras = (), **changes: Any) -> PictureRequest:
    fields: dict[str, Any] = {"width": 64, "height": 64, "seed": 3, "steps": 3, "guidance_scale": 3.0}
    return PictureRequest("txt2img", "a pizza on a blue background", loras=loras, **{**fields, **changes})


def requests_for(name: str, guidance_scale: float) -> list[PictureRequest]:
    """One per entry of COMPANY, all of the same size in latents."""
    several = [request(loras, seed=seed, guidance_scale=guidance_scale) for seed, loras in enumerate(COMPANY.values())]
    if name == BASE:
        return several
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    return [PictureRequest(**{**vars(one), "task": "upscale", "image": image, "noise_level": 20}) for one in several]


def untuned_unet(model: LatentDiffusion, tuned: LatentDiffusion) -> LatentDiffusion:
    """With the tuned autoencoder: this one's norms make much of rounding where a blank picture has no variance."""
    model = copy.copy(model)
    model._modules = {**model._modules, "autoencoder": tuned.autoencoder}
    return model


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("tuning", FORMS, ids=str)
@pytest.mark.parametrize("name", [BASE, UPSCALER])
def test_rows_with_own_adapters_equal_the_plain_loop(
    models_with: Models, name: str, tuning: Tuning, guidance_scale: float
) -> None:
    """Latents after three steps in one batch against each row alone; and the adapters are what makes the difference."""
    tuned, requests = tune(models_with[name], tuning), requests_for(name, guidance_scale)
    resident, plain_loop = ResidentModel(tuned), untuned_unet(models_with[name], tuned)
    side = 8 if name == BASE else 16
    bank = Bank(resident, LaneKey(name, side, side, guidance_scale > 1, rank=16), len(requests) + 1)
    rows = [runner.admit(resident, bank, slot, one) for slot, one in enumerate(requests)]
    for step in range(3):
        for slot, (start, time) in enumerate(rows):
            runner.feed(bank, slot, start, time, step)
        runner.step(resident, bank, slice(0, len(requests) + 1))
    for slot, one in enumerate(requests):
        torch.testing.assert_close(bank.x[slot], plain_loop.render_latents(one)[0], rtol=0, atol=TOLERANCE)
        plain = plain_loop.render_latents(PictureRequest(**{**vars(one), "loras": ()}))[0]
        assert ((bank.x[slot] - plain).abs().max() > 1.2e-2) == bool(one.loras)
    assert not bank.x[-1].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_adapters_do_about_the_same(models_with: Models, dtype: Dtype) -> None:
    """One step, by which the adapter's part is far larger than the rounding."""
    steps = []
    for tuning in (Tuning(), Tuning(dtype)):
        resident = ResidentModel(tune(models_with[BASE], tuning))
        bank = Bank(resident, LaneKey(BASE, 8, 8, guided=True, rank=8), 2)
        for slot, name in enumerate(("everywhere", "none")):
            start, time = runner.admit(resident, bank, slot, request(COMPANY[name]))
            runner.feed(bank, slot, start, time, 0)
        runner.step(resident, bank, slice(0, 2))
        steps.append(bank.x.clone())
    exact, half = steps
    difference = exact[0] - exact[1]
    assert difference.norm() > 0.3 * exact[0].norm()
    assert (half - exact).norm() < 0.1 * difference.norm()


def test_a_row_that_left_leaves_nothing_behind(models_with: Models) -> None:
    tuned = tune(models_with[BASE], FORMS[0])
    resident = ResidentModel(tuned)
    bank = Bank(resident, LaneKey(BASE, 8, 8, guided=True, rank=16), 2)
    assert bank.adapters is not None
    runner.admit(resident, bank, 0, request(COMPANY["wide"]))
    narrow = dict(bank.adapters.factors)
    runner.admit(resident, bank, 1, request(COMPANY["both"]))
    assert bank.adapters.factors.keys() > narrow.keys()
    bank.clear(0)
    bank.clear(1)
    runner.admit(resident, bank, 1, request(COMPANY["wide"]))
    assert bank.adapters.factors.keys() == narrow.keys(), "a step computes more than its rows need"
    assert all(bank.adapters.factors[name].a is own.a for name, own in narrow.items()), "a graph would be lost"
    bank.clear(1)
    start, time = runner.admit(resident, bank, 0, request())
    assert not bank.adapters.factors
    for step in range(3):
        runner.feed(bank, 0, start, time, step)
        runner.step(resident, bank, slice(0, 2))
    expected = untuned_unet(models_with[BASE], tuned).render_latents(request())
    torch.testing.assert_close(bank.x[:1], expected, rtol=0, atol=TOLERANCE)


def test_the_rank_of_a_lane(models_with: Models) -> None:
    """Padded to a power of two, 8 at least; 0 where a step computes nothing of the adapters."""
    model = models_with[BASE]
    unet = tune(model, FORMS[0]).unet
    ranks = {name: adapters.padded_rank(unet, model.uses(request(COMPANY[name]))) for name in RANKS}
    assert ranks == RANKS
    twice = (("wide", 1.0), ("everywhere", 0.5), ("attention", 1.0))  # 9 + 3 + 5
    assert adapters.padded_rank(unet, model.uses(request(twice))) == 32
    assert adapters.padded_rank(unet, model.uses(request((("wide", 0.0),)))) == 0


def engine_of(models: Models, **changes: Any) -> Engine:
    tuned = {name: tune(model, default_tuning(DEVICE)) for name, model in models.items()}
    return Engine(tuned, **{"buckets": (4,), "batching": "exact", "fingerprint": "same", **changes})


def finish(engine: Engine, wanted: Mapping[str, PictureRequest], pause: int = 0) -> tuple[dict[str, bytes], set[str]]:
    """Pictures by name, one more every `pause` ticks, and the labels of the lanes that shared a forward pass."""
    made: dict[str, bytes] = {}
    shared: set[str] = set()
    for name, one in wanted.items():
        engine.submit(name, BASE, one)
        events = [event for _ in range(pause) for event in engine.tick()]
        while name == list(wanted)[-1] and not engine.idle:
            events += engine.tick()
        made |= {event.row_id: event.image.tobytes() for event in events if isinstance(event, RowFinished)}
        shared |= {event.lane.label for event in events if isinstance(event, LaneTicked) and event.rows > 1}
    return made, shared


def wanted_pictures() -> dict[str, PictureRequest]:
    guided = {name: request(loras, seed=7, steps=4, eta=0.5) for name, loras in COMPANY.items()}
    return guided | {"unguided": request(COMPANY["both"], guidance_scale=1.0), "wide too": request(COMPANY["wide"])}


@pytest.mark.parametrize("pause", [0, 2])
def test_the_same_bytes_alone_and_in_company(models_with: Models, pause: int) -> None:
    wanted = wanted_pictures()
    alone = {name: finish(engine_of(models_with), {name: one})[0][name] for name, one in wanted.items()}
    assert len(set(alone.values())) == len(wanted)
    together, shared = finish(engine_of(models_with), wanted, pause)
    assert together == alone
    assert shared >= {"8x8 guided", "8x8 guided rank 8"}
    for name, one in wanted.items():
        rendered = models_with[BASE].render(one)
        made = Image.frombytes("RGB", rendered.size, alone[name])
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(rendered, dtype=int)).max() <= 1


def test_rows_without_adapters_do_not_know_of_them(models: Models, models_with: Models) -> None:
    plain = {"plain": request(seed=7), "noisy": request(seed=8, eta=1.0)}
    assert (
        finish(engine_of(models), plain)[0].items()
        <= finish(engine_of(models_with), wanted_pictures() | plain)[0].items()
    )


def test_a_row_goes_on_with_its_adapters(models_with: Models) -> None:
    one = request(COMPANY["both"], steps=5, eta=1.0)
    expected = finish(engine_of(models_with), {"a": one})[0]["a"]
    first = engine_of(models_with)
    first.submit("a", BASE, one)
    while (state := first.snapshot("a")) is None or state.step < 2:
        first.tick()
    second = engine_of(models_with)
    second.submit("a", BASE, one, resume=ResumeState.from_bytes(state.to_bytes()))
    second.submit("b", BASE, request(COMPANY["everywhere"]))
    made: dict[str, bytes] = {}
    while not second.idle:
        made |= {event.row_id: event.image.tobytes() for event in second.tick() if isinstance(event, RowFinished)}
    assert made["a"] == expected


def test_unknown_adapters_and_untuned_models_are_refused(models_with: Models) -> None:
    with pytest.raises(ValueError, match="no adapter of this model: film; it has: attention, context, "):
        engine_of(models_with).submit("a", BASE, request((("film", 1.0), ("wide", 1.0))))
    with pytest.raises(ValueError, match="adapters need a model in its tuned form"):
        Engine(models_with).submit("a", BASE, request(COMPANY["wide"]))


@pytest.mark.parametrize("tuning", FORMS, ids=str)
@pytest.mark.parametrize("name", [BASE, UPSCALER])
def test_the_probe_covers_adapters(models_with: Models, name: str, tuning: Tuning) -> None:
    resident = ResidentModel(tune(models_with[name], tuning))
    groups = probe(resident, LaneKey(name, 8, 8, guided=True, rank=8), (1, 2, 4))
    assert sorted(bucket for group in groups for bucket in group) == [1, 2, 4]
    plan = ExactPlan({name: resident}, 4, lambda _: 4)
    assert 4 in plan.prove(LaneKey(name, 8, 8, guided=False, rank=16))


@pytest.mark.parametrize("function", ["_add_to_tokens", "_add_to_map"])
def test_the_probe_refuses_terms_that_depend_on_neighbours(
    models_with: Models, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    resident = ResidentModel(tune(models_with[BASE], FORMS[0]))
    add = getattr(adapters, function)

    def spoiled(*arguments: Any) -> Tensor:
        out: Tensor = add(*arguments)
        return out.add_(1e-3 * arguments[-2].mean())

    monkeypatch.setattr(adapters, function, spoiled)
    with pytest.raises(NumericsError, match="8x8 guided rank 8: in a batch of 4"):
        probe(resident, LaneKey(BASE, 8, 8, guided=True, rank=8), (4,))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
@torch.inference_mode()
def test_a_graph_is_captured_anew_when_a_row_needs_more_terms(models_with: Models) -> None:
    resident = ResidentModel(tune(models_with[BASE], default_tuning(DEVICE)))
    banks = [Bank(resident, LaneKey(BASE, 8, 8, guided=True, rank=8), 2) for _ in range(2)]
    for slot, name in enumerate(("attention", "everywhere")):
        for bank in banks:
            runner.admit(resident, bank, slot, request(COMPANY[name]))
        runner.step(resident, banks[0], slice(0, 2))
        runner._step(resident, banks[1], slice(0, 2))
        torch.testing.assert_close(banks[0].x, banks[1].x, rtol=0, atol=1e-5)
