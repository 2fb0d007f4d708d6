"""Trains, scores and freezes the judge: `python -m training.judge_training`. About 10 minutes on one thread."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from training.data.render import Picture
from training.judge import COLOUR_CLASSES, OBJECT_CLASSES, REJECT, Judge, load_judge, to_input
from training.judge_examples import IGNORE, SPOILERS, Labels, jpeg, real_example, spoilt_example

_REAL_SHARE: Final = 0.6
_TRAIN_STREAM, _SCORE_STREAM = 0, 1  # second number of each example's seed: the two never share an example
_HEADS: Final = ("object", "shape colour", "background")
Example = tuple[Picture, Labels]


def train_judge(steps: int, seed: int = 0, batch: int = 64, peak_rate: float = 3e-3) -> Judge:
    """A judge trained on `steps` × `batch` fresh examples; the same arguments give the same judge on one machine."""
    torch.manual_seed(seed)
    judge = Judge()
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=peak_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    started, running = time.monotonic(), 0.0
    for step, (pictures, labels) in enumerate(_batches(steps, seed, batch)):
        x = augment(to_input(pictures)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x)
        loss = _loss(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {running:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    judge.eval()
    return judge


def augment(x: Tensor) -> Tensor:
    """What a faithful generator may still do to a picture: wobble by a pixel, soften, add noise, shift tint, contrast.

    [n, 3, 64, 64] in [-1, 1], of the same range afterwards.
    """
    n, side = x.shape[0], x.shape[-1]
    moves = F.interpolate(torch.randn(n, 2, 6, 6), size=(side, side), mode="bicubic") * 0.012 * torch.rand(n, 1, 1, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, side, side], align_corners=False)
    x = F.grid_sample(x, grid + moves.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x.lerp(soft, torch.rand(n, 1, 1, 1) * 0.8)
    x = x * (1 + 0.16 * (torch.rand(n, 1, 1, 1) - 0.5)) + 0.16 * (torch.rand(n, 3, 1, 1) - 0.5)
    return (x + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def score_judge(judge: Judge, real: int = 3000, per_spoiler: int = 200, seed: int = 0) -> dict[str, object]:
    """The judge on renders that it was not trained on: shares right on real ones, shares rejected per way to spoil."""
    clean = [real_example(np.random.default_rng((seed, _SCORE_STREAM, 0, i))) for i in range(real)]
    torch.manual_seed(seed)
    scores: dict[str, object] = {"real pictures": real, "clean": _shares_right(judge, clean, lambda x: x)}
    scores["augmented"] = _shares_right(judge, [(jpeg(p, 70), labels) for p, labels in clean], augment)
    rejected: dict[str, float] = {}
    for k, kind in enumerate(SPOILERS):
        streams = (np.random.default_rng((seed, _SCORE_STREAM, 1 + k, i)) for i in range(per_spoiler))
        shares = _shares_right(judge, [spoilt_example(rng, kind) for rng in streams], lambda x: x)
        head = {"odd background": "background", "odd shape": "shape colour"}.get(kind, "object")
        rejected[kind] = shares[head]
    scores["rejected"] = rejected
    scores["rejected, mean"] = round(sum(rejected.values()) / len(rejected), 4)
    return scores


def save_judge(judge: Judge, folder: str | Path, notes: dict[str, object]) -> None:
    """Weights in fp16 and judge.json: classes and `notes`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: (t.half() if t.is_floating_point() else t).contiguous() for k, t in judge.state_dict().items()}
    save_file(state, folder / "judge.safetensors")
    card = {"object_classes": OBJECT_CLASSES, "colour_classes": COLOUR_CLASSES, **notes}
    (folder / "judge.json").write_text(json.dumps(card, indent=1) + "\n")


def _batches(steps: int, seed: int, batch: int) -> Iterator[tuple[npt.NDArray[np.uint8], Tensor]]:
    for step in range(steps):
        examples = [_training_example(seed, step * batch + i) for i in range(batch)]
        yield np.stack([picture for picture, _ in examples]), _as_tensor([labels for _, labels in examples])


def _training_example(seed: int, index: int) -> Example:
    rng = np.random.default_rng((seed, _TRAIN_STREAM, index))
    picture, labels = real_example(rng) if rng.random() < _REAL_SHARE else spoilt_example(rng)
    return (jpeg(picture, int(rng.integers(45, 96))), labels) if rng.random() < 0.4 else (picture, labels)


def _as_tensor(labels: list[Labels]) -> Tensor:
    """[n, 3]: the classes of the three heads."""
    return torch.tensor([[one.object, one.colour, one.background] for one in labels])


def _loss(logits: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
    parts = []
    for k, head in enumerate(logits):
        summed = F.cross_entropy(head.float(), labels[:, k], ignore_index=IGNORE, reduction="sum")
        parts.append(summed / len(labels))  # not the mean of what counts: that is empty now and then
    return torch.stack(parts).sum()


def _rate(done: float) -> float:
    """Warm-up over the first 5 %, then half a cosine to zero (Loshchilov and Hutter 2017)."""
    return min(done / 0.05, 1.0) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-4


@torch.no_grad()
def _shares_right(judge: Judge, examples: list[Example], change: Callable[[Tensor], Tensor]) -> dict[str, float]:
    labels = _as_tensor([one for _, one in examples])
    pictures = np.stack([picture for picture, _ in examples])
    guesses = []
    for start in range(0, len(pictures), 100):
        logits = judge(change(to_input(pictures[start : start + 100])))
        guesses.append(torch.stack([head.argmax(1) for head in logits], dim=1))
    counted = labels != IGNORE
    right = (torch.cat(guesses) == labels) & counted
    false_rejects = (torch.cat(guesses)[:, 0] == OBJECT_CLASSES.index(REJECT)).float().mean()
    shares = {
        head: round(float(right[:, k].sum() / counted[:, k].sum()), 4)
        for k, head in enumerate(_HEADS)
        if counted[:, k].any()
    }
    return {**shares, "object falsely rejected": round(float(false_rejects), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("weights/judge"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    judge = train_judge(options.steps, options.seed)
    save_judge(judge, options.out, {})
    scores = score_judge(load_judge(options.out), seed=options.seed)  # of what the file holds, rounding included
    save_judge(judge, options.out, {"seed": options.seed, "steps": options.steps, "scores": scores})
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
