"""How a trained model is scored: fixed prompts, what the judge makes of the pictures, and fidelity of upscaling.

Nothing here knows how pictures are made; callers pass functions, so that any model or pipeline can be scored.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from training.data.captions import plain_caption
from training.data.dataset import example
from training.data.render import Picture, object_box, render
from training.data.scenes import Item, Scene, plain_scene
from training.data.vocabulary import COLOURS, SHAPES, held_out_pairs, seen_pairs
from training.judge import Judge, Verdict

Mask = npt.NDArray[np.uint8]
"""[side, side], 255 where the picture is to be painted anew, 0 where it is to stay."""

STRATA: Final = {"seen pairs": 100, "held-out pairs": 60, "coloured shapes": 40}
INPAINTINGS: Final = 50
UPSCALINGS: Final = 100
UPSCALING: Final = 4
UPSCALED_SIDE: Final = 128
"""Pixels, of the pictures to be restored from a quarter of it. Emoji are bitmaps of about 130 pixels: at larger sides
there is no detail left to restore, and interpolation alone looks perfect."""

_PROMPT_SEED: Final = 20_240
_PICTURE_SEED: Final = 1_000_000
_HELD_OUT_DATA_SEED: Final = 987_654_321  # training data never uses it


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its picture, and what the judge has to find in it."""

    stratum: str
    text: str
    seed: int
    object: str
    background: str
    colour: str | None = None


@dataclass(frozen=True)
class Proportion:
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    def wilson(self, z: float = 1.96) -> tuple[float, float]:
        """The 95 % score interval (Wilson 1927)."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Inpainting:
    """A real picture with its object masked, and a prompt for another object in its place."""

    picture: Picture
    mask: Mask
    prompt: Prompt


def prompts(per_stratum: int | None = None) -> list[Prompt]:
    """The 200 prompts, always the same (100 seen pairs, 60 of held-out pairs, 40 coloured shapes), or their first."""
    rng = np.random.default_rng(_PROMPT_SEED)
    seen, held_out = seen_pairs(), held_out_pairs()
    chosen = [seen[i] for i in rng.permutation(len(seen))[: STRATA["seen pairs"]]]
    drawn: list[tuple[str, str, str | None, str]] = [
        ("seen pairs", name, None, background) for name, background in chosen
    ]
    repeats = (held_out[i % len(held_out)] for i in range(STRATA["held-out pairs"]))  # each about 3 times, other seeds
    drawn += [("held-out pairs", name, None, background) for name, background in repeats]
    triples = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]
    few = [triples[i] for i in rng.permutation(len(triples))[: STRATA["coloured shapes"]]]
    drawn += [("coloured shapes", *triple) for triple in few]
    every = [
        Prompt(stratum, _text(name, colour, background), _PICTURE_SEED + number, name, background, colour)
        for number, (stratum, name, colour, background) in enumerate(drawn)
    ]
    return [p for stratum in STRATA for p in [p for p in every if p.stratum == stratum][:per_stratum]]


def score_verdicts(asked: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, dict[str, Proportion]]:
    """Per stratum and over all: shares of pictures with the right object, shape colour, background, and all three."""
    scores = {}
    for stratum in [*dict.fromkeys(prompt.stratum for prompt in asked), "all"]:
        both = [(p, v) for p, v in zip(asked, verdicts, strict=True) if stratum in (p.stratum, "all")]
        shapes = [(p, v) for p, v in both if p.colour is not None]
        scores[stratum] = {
            "object": _proportion(p.object == v.object for p, v in both),
            "background": _proportion(p.background == v.background for p, v in both),
            "everything": _proportion(asked_for(p, v) for p, v in both),
        }
        if shapes:
            scores[stratum]["shape colour"] = _proportion(p.colour == v.colour for p, v in shapes)
    return scores


def asked_for(prompt: Prompt, verdict: Verdict) -> bool:
    """Whether the picture shows all that the prompt names."""
    seen = (verdict.object, verdict.colour, verdict.background)
    return seen == (prompt.object, prompt.colour, prompt.background)


def inpaintings(side: int) -> list[Inpainting]:
    """Held-out pictures with the object's box masked (and a small margin), each with a prompt for another object."""
    rng = np.random.default_rng(_PROMPT_SEED + 1)
    pairs = seen_pairs()
    tasks = []
    for number in range(INPAINTINGS):
        name, background = pairs[int(rng.integers(len(pairs)))]
        others = [n for n, b in pairs if b == background and n != name]
        wanted = others[int(rng.integers(len(others)))]
        scene = plain_scene(name, background, rng)
        left, top, right, bottom = object_box(scene, side)
        margin = side // 16
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = 255
        text = _text(wanted, None, background)
        tasks.append(
            Inpainting(
                render(scene, side), mask, Prompt("inpainting", text, _PICTURE_SEED + number, wanted, background)
            )
        )
    return tasks


def score_inpainting(tasks: Sequence[Inpainting], results: Sequence[Picture], judge: Judge) -> dict[str, Proportion]:
    """The shares of results with every unmasked pixel identical, with the new object, with the background kept."""
    verdicts = judge.judge(np.stack(results))
    return {
        "unmasked pixels identical": _proportion(
            bool((task.picture[task.mask == 0] == result[task.mask == 0]).all())
            for task, result in zip(tasks, results, strict=True)
        ),
        "object": _proportion(t.prompt.object == v.object for t, v in zip(tasks, verdicts, strict=True)),
        "background": _proportion(t.prompt.background == v.background for t, v in zip(tasks, verdicts, strict=True)),
    }


def held_out_pictures(n: int, side: int) -> list[tuple[Picture, str]]:
    """Pictures and captions of the training distribution from a seed that training never uses."""
    scenes = (example(_HELD_OUT_DATA_SEED, index) for index in range(n))
    return [(render(scene, side), text) for scene, text in scenes]


@dataclass(frozen=True)
class Fidelity:
    """Means over pictures. `gain`: PSNR less bicubic's, in dB, with the half-width of its 95 % interval."""

    psnr: float
    ssim: float
    gain: float
    gain_half_width: float


def score_upscaling(
    upscale: Callable[[Picture, str], Picture], pictures: Sequence[tuple[Picture, str]]
) -> dict[str, Fidelity]:
    """`upscale` (given a picture shrunk 4 times and its caption) beside bicubic and Lanczos interpolation."""
    rows: dict[str, list[tuple[float, float]]] = {"model": [], "bicubic": [], "Lanczos": []}
    for picture, text in pictures:
        side = picture.shape[0]
        small = _resize(picture, side // UPSCALING, Image.Resampling.BICUBIC)
        results = {
            "model": upscale(small, text),
            "bicubic": _resize(small, side, Image.Resampling.BICUBIC),
            "Lanczos": _resize(small, side, Image.Resampling.LANCZOS),
        }
        for name, result in results.items():
            rows[name].append((psnr(picture, result), ssim(picture, result)))
    table = {name: np.asarray(values) for name, values in rows.items()}
    return {name: _fidelity(values, table["bicubic"]) for name, values in table.items()}


def psnr(reference: Picture, picture: Picture) -> float:
    """Peak signal-to-noise ratio in dB over all channels; equal pictures count as 100 dB."""
    error = float(np.mean((reference.astype(np.float64) - picture.astype(np.float64)) ** 2))
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def ssim(reference: Picture, picture: Picture) -> float:
    """Structural similarity of the luma (Wang et al. 2004): Gaussian window 11, σ = 1.5, K1 = 0.01, K2 = 0.03."""
    x, y = (torch.from_numpy(p.astype(np.float64)) @ _LUMA for p in (reference, picture))
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x, var_y = _window_mean(x * x) - mean_x**2, _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean())


def as_json(scores: object) -> object:
    """Proportions and fidelities as plain numbers, Wilson intervals included."""
    if isinstance(scores, dict):
        return {name: as_json(value) for name, value in scores.items()}
    if isinstance(scores, Proportion):
        low, high = scores.wilson()
        return {**asdict(scores), "share": round(scores.share, 4), "interval": [round(low, 4), round(high, 4)]}
    if isinstance(scores, Fidelity):
        return {name: round(value, 4) for name, value in asdict(scores).items()}
    return scores


_LUMA: Final = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    """Gaussian means of [h, w], only where the whole window fits: [h - 10, w - 10]."""
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x[None, None], taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))[0, 0]


def _fidelity(values: npt.NDArray[np.float64], baseline: npt.NDArray[np.float64]) -> Fidelity:
    gains = values[:, 0] - baseline[:, 0]
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else 0.0
    mean = values.mean(axis=0)
    return Fidelity(float(mean[0]), float(mean[1]), float(gains.mean()), 1.96 * spread / math.sqrt(len(gains)))


def _text(name: str, colour: str | None, background: str) -> str:
    return plain_caption(Scene((Item(name, 0.5, 0.5, 0.7, colour),), background))


def _proportion(hits: Iterable[bool]) -> Proportion:
    counted = list(hits)
    return Proportion(sum(counted), len(counted))


def _resize(picture: Picture, side: int, resampling: Image.Resampling) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((side, side), resampling))
