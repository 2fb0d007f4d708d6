"""Prompts, intervals and fidelity measures against known numbers."""

import math

import numpy as np
import pytest
from PIL import Image

from training.data import is_held_out
from training.evaluate import (
    UPSCALING,
    Prompt,
    Proportion,
    as_json,
    asked_for,
    held_out_pictures,
    inpaintings,
    prompts,
    psnr,
    score_upscaling,
    score_verdicts,
    ssim,
)
from training.judge import Verdict


def grey(level: int) -> np.ndarray:
    return np.full((32, 32, 3), level, dtype=np.uint8)


def test_the_prompts_never_change() -> None:
    asked = prompts()
    assert asked == prompts()
    assert [sum(p.stratum == s for p in asked) for s in ("seen pairs", "held-out pairs", "coloured shapes")] == [
        100,
        60,
        40,
    ]
    assert len({p.seed for p in asked}) == 200
    assert all(is_held_out(p.object, p.background) == (p.stratum == "held-out pairs") for p in asked)
    assert all((p.colour is not None) == (p.stratum == "coloured shapes") for p in asked)
    assert all(p.text.endswith(f"{p.background} background") for p in asked)
    assert [p.text for p in prompts(2)] == [asked[i].text for i in (0, 1, 100, 101, 160, 161)]
    assert asked[100].text == "a pizza on an orange background"


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)]
)
def test_wilson_intervals(right: int, total: int, low: float, high: float) -> None:
    assert Proportion(right, total).wilson() == pytest.approx((low, high), abs=1e-4)


def test_nothing_scored_is_no_knowledge() -> None:
    assert Proportion(0, 0).wilson() == (0.0, 1.0)
    assert math.isnan(Proportion(0, 0).share)


def test_verdicts_are_counted_per_stratum() -> None:
    cat = Prompt("seen pairs", "a cat on a red background", 1, "cat", "red")
    star = Prompt("coloured shapes", "a blue star on a red background", 2, "star", "red", "blue")
    scores = score_verdicts([cat, star], [Verdict("cat", None, "red"), Verdict("star", "green", "red")])
    assert scores["seen pairs"]["object"] == Proportion(1, 1)
    assert "shape colour" not in scores["seen pairs"]
    assert scores["coloured shapes"]["shape colour"] == Proportion(0, 1)
    assert scores["all"]["object"] == Proportion(2, 2)
    assert scores["all"]["everything"] == Proportion(1, 2)
    assert asked_for(star, Verdict("star", "blue", "red"))
    assert as_json(scores["all"]["object"]) == {"right": 2, "total": 2, "share": 1.0, "interval": [0.3424, 1.0]}


def test_psnr() -> None:
    assert psnr(grey(100), grey(110)) == pytest.approx(20 * math.log10(25.5))
    assert psnr(grey(7), grey(7)) == 100


def test_ssim_of_equal_flat_and_inverted_pictures() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert ssim(noise, noise) == pytest.approx(1)
    c1 = (0.01 * 255) ** 2
    assert ssim(grey(50), grey(100)) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))
    assert ssim(noise, (255 - noise).astype(np.uint8)) < 0


def test_inpaintings_mask_the_object_and_ask_for_another() -> None:
    for task in inpaintings(128):
        assert task.mask.shape == (128, 128)
        assert set(np.unique(task.mask)) == {0, 255}
        kept = task.picture[task.mask == 0].astype(int)
        assert np.abs(kept - kept[0]).max() == 0  # plain background alone remains
        assert not is_held_out(task.prompt.object, task.prompt.background)


def test_upscaling_is_compared_with_interpolation() -> None:
    def lanczos(small: np.ndarray, _: str) -> np.ndarray:
        side = small.shape[0] * UPSCALING
        return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.LANCZOS))

    scores = score_upscaling(lanczos, held_out_pictures(5, 128))
    assert scores["bicubic"].gain == 0
    assert scores["model"] == scores["Lanczos"]
    assert 18 < scores["bicubic"].psnr < 35
    assert 0.6 < scores["bicubic"].ssim < 1
