"""Scores the shipped models: do they draw what prompts ask for, does inpainting keep its promises, does upscaling help.

`python -m benchmarks.score`. Pictures are made in this process with each model's default settings; a judge that was
trained on real renders, and frozen before, says what they show. Writes score.json and score.md.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from benchmarks.studio import Studio
from training.data import Picture
from training.evaluate import (
    INPAINTINGS,
    UPSCALED_SIDE,
    UPSCALINGS,
    Fidelity,
    Proportion,
    as_json,
    asked_for,
    held_out_pictures,
    inpaintings,
    prompts,
    score_inpainting,
    score_upscaling,
    score_verdicts,
)
from training.judge import JUDGE_FOLDER, Judge, load_judge

SMALL: Final = Path("weights/darkroom-small")
UPSCALER: Final = Path("weights/darkroom-small-x4")
RESULTS: Final = Path("benchmarks/results")

Scores = dict[str, Any]


def score_prompts(studio: Studio, judge: Judge, per_stratum: int | None, sheet: Path | None) -> Scores:
    asked = prompts(per_stratum)
    started = time.perf_counter()
    pictures = [studio.txt2img(prompt.text, prompt.seed) for prompt in asked]
    seconds = (time.perf_counter() - started) / len(asked)
    verdicts = judge.judge(np.stack(pictures))
    if sheet is not None:
        save_sheet(pictures, sheet)
    misses = [
        {"prompt": prompt.text, "seed": prompt.seed, "seen": asdict(verdict)}
        for prompt, verdict in zip(asked, verdicts, strict=True)
        if not asked_for(prompt, verdict)
    ]
    return {"strata": score_verdicts(asked, verdicts), "seconds per picture": round(seconds, 3), "misses": misses}


def score_inpaintings(studio: Studio, judge: Judge, limit: int, sheet: Path | None) -> dict[str, Proportion]:
    tasks = inpaintings(studio.side)[:limit]
    results = [studio.inpaint(task.prompt.text, task.prompt.seed, task.picture, task.mask) for task in tasks]
    if sheet is not None:
        beside = [picture for task, result in zip(tasks, results, strict=True) for picture in (task.picture, result)]
        save_sheet(beside, sheet.with_stem(sheet.stem + "-inpaint"))
    return score_inpainting(tasks, results, judge)


def score_upscalings(studio: Studio, limit: int, side: int) -> dict[str, Fidelity]:
    return score_upscaling(studio.upscale, held_out_pictures(limit, side))


def save_sheet(pictures: Sequence[Picture], path: Path, columns: int = 20) -> None:
    """All pictures in rows, to be looked at."""
    blank = np.zeros_like(pictures[0])
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def markdown(scores: Scores) -> str:
    """The tables, as the README shows them."""
    lines = []
    if "prompts" in scores:
        lines += ["| prompts | n | object | background | shape colour | everything |", "|---|---|---|---|---|---|"]
        for stratum, shares in scores["prompts"]["strata"].items():
            cells = [_share(shares.get(key)) for key in ("object", "background", "shape colour", "everything")]
            lines.append(f"| {stratum} | {shares['object'].total} | {' | '.join(cells)} |")
    if "inpainting" in scores:
        shares = scores["inpainting"]
        lines += ["", f"| inpainting | {' | '.join(shares)} |", "|---" * (len(shares) + 1) + "|"]
        lines.append(f"| {shares['object'].total} pictures | {' | '.join(map(_share, shares.values()))} |")
    if "upscaling" in scores:
        lines += ["", "| enlarging 4 times | PSNR, dB | SSIM | gain over bicubic, dB |", "|---|---|---|---|"]
        for name, fidelity in scores["upscaling"].items():
            gain = f"{fidelity.gain:+.2f} ± {fidelity.gain_half_width:.2f}"
            lines.append(f"| {name} | {fidelity.psnr:.2f} | {fidelity.ssim:.4f} | {gain} |")
    return "\n".join(lines) + "\n"


def _share(proportion: Proportion | None) -> str:
    if proportion is None:
        return ""
    low, high = proportion.wilson()
    return f"{proportion.share:.2f} ({low:.2f} to {high:.2f})"


def write_results(scores: Scores, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(as_json(scores), indent=1, ensure_ascii=False) + "\n")
    (folder / "score.md").write_text(markdown(scores))


def conditions(studio: Studio, upscaled_side: int) -> Mapping[str, object]:
    """What the figures were taken with."""
    judged = json.loads((JUDGE_FOLDER / "judge.json").read_text())["scores"]
    return {
        "models": studio.describe(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "the judge on real renders": judged["clean"],
        "the judge's rejections": judged["rejected, mean"],
        "side of enlarged pictures": upscaled_side,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="score", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=SMALL)
    parser.add_argument("--upscaler-dir", type=Path, default=UPSCALER, help="left out where missing")
    parser.add_argument("--upscaled-side", type=int, default=UPSCALED_SIDE, help="of the enlarged pictures, in pixels")
    parser.add_argument("--limit", type=int, help="at most so many prompts per stratum, inpaintings and upscalings")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for score.json and score.md")
    parser.add_argument("--sheet", type=Path, help="also save all pictures as one PNG")
    options = parser.parse_args(arguments)

    studio, judge = Studio(options.model_dir, options.upscaler_dir), load_judge()
    scores: Scores = {"conditions": conditions(studio, options.upscaled_side)}
    scores["prompts"] = score_prompts(studio, judge, options.limit, options.sheet)
    scores["inpainting"] = score_inpaintings(studio, judge, options.limit or INPAINTINGS, options.sheet)
    if studio.can_upscale:
        scores["upscaling"] = score_upscalings(studio, options.limit or UPSCALINGS, options.upscaled_side)
    write_results(scores, options.out)
    print(markdown(scores))


if __name__ == "__main__":
    main()
