"""Milliseconds per denoising step: ours beside diffusers on the same weights, and what each exact saving is worth.

The first part of `make bench-engine`. Two threads; all ways take turns, figures are medians. A step is a guided UNet
forward, guidance and the DDIM update, as each side's own pipeline does them.
"""

import importlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPTextConfig, CLIPTokenizer

from benchmarks.report import FOLDER, conditions, interleaved, measure_rounds, medians, table
from models.autoencoder import Autoencoder
from models.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from models.latent_diffusion import LatentDiffusion
from models.schedule import NoiseSchedule
from models.tasks import PictureRequest
from models.text import TextEncoder
from models.unet import UNet
from training.tokenizer import build_tokenizer
from worker.engine import numerics, runner
from worker.engine.bank import Bank
from worker.engine.calibration import Calibration
from worker.engine.engine import Engine
from worker.engine.measure import Plan, fastest
from worker.engine.numerics import ExactPlan, scatter_at_random
from worker.engine.resident import ResidentModel
from worker.engine.scheduler import LaneKey
from worker.engine.tuning import Dtype, candidates, tune

NAME: Final = "bench-engine-step"
SHIPPED: Final = "darkroom-small"
RANDOM: Final = "random-62M"
THREADS: Final = 2
STEPS: Final = 10
PROMPT: Final = "a pizza on a blue background"
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
BATCHES: Final = (1, 8)
EXACT_PICTURES: Final = 5
_WAYS: Final = ("with", "without")

Run = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """A model in fp32 and the tuned forms of it; `side` of its latents."""

    name: str
    model: LatentDiffusion
    residents: Mapping[Dtype, ResidentModel]
    side: int

    def lane(self, *, guided: bool = True) -> LaneKey:
        return LaneKey(self.name, self.side, self.side, guided)


def case(name: str, model: LatentDiffusion, side: int, calibration: Calibration) -> Case:
    """Tuned as `calibration` has it, else as a short calibration finds best."""
    entry = calibration.devices.get(numerics.device_kind(model.device))
    plan = Plan([LaneKey(name, side, side, guided=True)], slots=max(BATCHES), rounds=3, psnr=lambda *_: 0.0)
    tunings = {
        dtype: entry.measured[dtype].tuning if entry else fastest(model, candidates(model.device, dtype), plan)
        for dtype in DTYPES
    }
    residents = {dtype: ResidentModel(tune(model, one, (side, side))) for dtype, one in tunings.items()}
    return Case(name, model, residents, side)


def shipped() -> Case:
    folder = FOLDER.parent / "weights" / SHIPPED
    return case(SHIPPED, LatentDiffusion.load(folder), 16, Calibration.read(folder))


def random_model() -> Case:
    """About 62 million parameters, head width 64, attention at 16x16 and below."""
    config = UNetConfig(
        sample_size=32,
        block_out_channels=(128, 256, 384),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=256,
        norm_num_groups=32,
        use_linear_projection=True,
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    autoencoder = AutoencoderConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    parts = (UNet(config), Autoencoder(autoencoder), TextEncoder.create(tokenizer, text))
    model = LatentDiffusion(*parts, NoiseSchedule(ScheduleConfig())).eval().requires_grad_(False)
    return case(RANDOM, model, 32, Calibration())


def our_step(resident: ResidentModel, lane: LaneKey, rows: int) -> Run:
    bank = Bank(resident, lane, rows)
    scatter_at_random(resident, bank)

    def run(_: int) -> None:
        bank.step.zero_()
        runner.step(resident, bank, slice(0, rows))

    return run


def diffusers_step(one: Case, dtype: Dtype, rows: int) -> Run:
    """The body of the loop in their pipelines: UNet over [unconditional | conditional], guidance, scheduler."""
    library: Any = importlib.import_module("diffusers")
    config = one.model.unet.config
    unet = library.UNet2DConditionModel.from_config(config.to_dict())
    unet.load_state_dict(one.model.unet.state_dict())
    unet = unet.to(getattr(torch, dtype)).eval()
    scheduler = library.DDIMScheduler.from_config(one.model.schedule.config.to_dict())
    scheduler.set_timesteps(20)
    z, text = one.model.autoencoder.config.latent_channels, one.model.conditioner
    assert isinstance(text, TextEncoder)
    x = torch.randn(rows, z, one.side, one.side, dtype=unet.dtype)
    extra = torch.randn(2 * rows, config.in_channels - z, one.side, one.side, dtype=unet.dtype)
    context = torch.randn(2 * rows, text.max_tokens, config.context_width, dtype=unet.dtype)
    t = scheduler.timesteps[7]

    def run(_: int) -> object:
        inputs = torch.cat([scheduler.scale_model_input(torch.cat([x, x]), t), extra], dim=1)
        out = unet(inputs, t, encoder_hidden_states=context, return_dict=False)[0]
        unconditional, conditional = out.chunk(2)
        return scheduler.step(unconditional + 4.0 * (conditional - unconditional), t, x, return_dict=False)[0]

    return run


@torch.inference_mode()
def measure_steps(one: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by batch, then by way."""
    found = {}
    for rows in BATCHES:
        ways: dict[str, Run] = {}
        for dtype in DTYPES:
            ways[f"diffusers {dtype}"] = diffusers_step(one, dtype, rows)
            ways[f"ours {dtype}"] = our_step(one.residents[dtype], one.lane(), rows)
        ways["ours float32, not tuned"] = our_step(ResidentModel(one.model), one.lane(), rows)
        found[str(rows)] = medians(interleaved(ways, rounds))
    return found


@torch.inference_mode()
def measure_savings(one: Case, dtype: Dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of one step (of one picture for the texts) with each saving, and without it."""
    resident, rows = one.residents[dtype], 1
    unet, text = resident.model.unet, resident.model.conditioner
    assert text is not None
    guided, plain = our_step(resident, one.lane(), rows), our_step(resident, one.lane(guided=False), rows)
    bank = Bank(resident, one.lane(), rows)
    scatter_at_random(resident, bank)
    kv, emb = bank.rows_kv(slice(0, rows)), resident.time_table[[500] * rows]
    x = torch.randn(rows, unet.config.in_channels, one.side, one.side).to(emb.dtype)
    context, t = text.encode(PROMPT).expand(2 * rows, -1, -1).to(emb.dtype), torch.tensor([500] * rows)

    def step(*, context_again: bool = False, time_again: bool = False, twice: bool = False) -> Run:
        def run(_: int) -> None:
            keys = unet.project_context(context) if context_again else kv
            shifts = unet.embed_time(t) if time_again else emb
            if twice:
                unet.denoise(torch.cat([x, x]), torch.cat([shifts, shifts]), keys)
            else:
                unet.denoise(x, shifts, keys)

        return run

    def both_rows_apart(seed: int) -> None:
        plain(seed)
        plain(seed)

    pairs: dict[str, tuple[Run, Run]] = {
        "one pass for the guidance pair": (guided, both_rows_apart),
        "no unconditional row at guidance 1": (plain, guided),
        "shared prefix before the first text attention": (step(), step(twice=True)),
        "keys and values of the text once per picture": (step(), step(context_again=True)),
        "time projections once per timestep": (step(), step(time_again=True)),
        "text encodings kept (per picture, two texts)": (
            lambda _: [resident.encoded(prompt) for prompt in ("", PROMPT)],
            lambda _: [text.encode(prompt) for prompt in ("", PROMPT)],
        ),
    }
    ways = {
        f"{name}: {way}": run
        for name, pair in pairs.items()
        for way, run in zip(("with", "without"), pair, strict=True)
    }
    seconds = medians(interleaved(ways, rounds))
    return {name: {way: seconds[f"{name}: {way}"] for way in _WAYS} for name in pairs}


def measure_batching(one: Case, dtype: Dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds for a number of pictures through the engine, exact against fast."""
    resident = one.residents[dtype]
    plan = ExactPlan({one.name: resident}, 8, lambda _: None)
    engines = {
        "exact": Engine({one.name: resident}, buckets=plan, batching="exact"),
        "fast": Engine({one.name: resident}, buckets=numerics.powers_of_two(8), batching="fast"),
        "exact, only the full batch": Engine({one.name: resident}, buckets=(8,), batching="exact"),
    }
    found = {}
    for count in (1, EXACT_PICTURES):
        ways = {name: _pictures(engine, one, count) for name, engine in engines.items()}
        found[str(count)] = medians(interleaved(ways, rounds))
    return found


def _pictures(engine: Engine, one: Case, count: int) -> Run:
    side = one.side * one.model.autoencoder.config.downsampling_factor

    def run(seed: int) -> None:
        for index in range(count):
            request = PictureRequest("txt2img", PROMPT, side, side, seed=100 * seed + index, steps=STEPS)
            engine.submit(f"{seed}/{index}", one.name, request)
        while not engine.idle:
            engine.tick()

    return run


def measure(rounds: int) -> dict[str, Any]:
    numerics.pin(THREADS)
    begun = time.perf_counter()
    cases = [shipped(), random_model()]
    figures: dict[str, Any] = {
        "steps": {one.name: measure_steps(one, rounds) for one in cases},
        "savings": {one.name: measure_savings(one, "float32", rounds) for one in cases},
        "batching": {cases[0].name: measure_batching(cases[0], "float32", max(rounds // 2, 1))},
        "parameters": {one.name: one.residents["float32"].parameters for one in cases},
    }
    figures["conditions"] = conditions(
        device_kind=numerics.device_kind(torch.device("cpu")),
        diffusers=importlib.import_module("diffusers").__version__,
        threads=THREADS,
        rounds=rounds,
        seconds=round(time.perf_counter() - begun),
    )
    return figures


def as_table(figures: dict[str, Any]) -> str:
    parts = []
    for name, batches in figures["steps"].items():
        header = ("guided step, ms", *(f"{what}batch {rows}" for what in ("", "ratio, ") for rows in batches))
        lines = [
            (way, *(1000 * seconds[way] for seconds in batches.values()),
             *(f"{seconds['diffusers float32'] / seconds[way]:.2f}x" for seconds in batches.values()))
            for way in next(iter(batches.values()))
        ]  # fmt: skip
        million = figures["parameters"][name] / 1e6
        parts.append(f"{name} ({million:.0f} M parameters); ratios to diffusers in fp32\n\n{table(header, lines)}")
    for name, savings in figures["savings"].items():
        lines = [
            (saving, 1000 * pair["with"], 1000 * pair["without"], f"{pair['without'] / pair['with']:.2f}x")
            for saving, pair in savings.items()
        ]
        header = (f"{name}, fp32, batch 1: exact saving", "ms with", "ms without", "effect")
        parts.append(table(header, lines))
    for name, counts in figures["batching"].items():
        lines = [(way, *(seconds[way] for seconds in counts.values())) for way in next(iter(counts.values()))]
        parts.append(table((f"{name}, {STEPS} steps, seconds", *(f"{count} pictures" for count in counts)), lines))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    measure_rounds(NAME, __doc__, 11, measure, as_table, arguments)


if __name__ == "__main__":
    main()
