"""Holes for training inpainting: around the object, rectangles and ellipses anywhere."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def draw_mask(side: int, box: npt.NDArray[np.integer], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """[side, side] of 0 (keep) and 1 (repaint). `box` is the object's (left, top, right, bottom) in pixels."""
    kind = rng.random()
    if kind < 0.5:
        margin = int(rng.integers(side // 32, side // 8 + 1))
        left, top, right, bottom = (int(edge) for edge in box)
        edges = (left - margin, top - margin, right + margin, bottom + margin)
    else:
        width, height = (int(v) for v in rng.integers(side // 4, side * 7 // 8, 2))
        left, top = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
        edges = (left, top, left + width, top + height)
    left, top, right, bottom = (min(max(edge, 0), side) for edge in edges)
    mask = np.zeros((side, side), dtype=np.uint8)
    if kind < 0.8:
        mask[top:bottom, left:right] = 1
        return mask
    y, x = np.mgrid[0:side, 0:side] + 0.5
    inside = ((x - (left + right) / 2) / ((right - left) / 2)) ** 2 + (
        (y - (top + bottom) / 2) / ((bottom - top) / 2)
    ) ** 2
    mask[inside <= 1] = 1
    return mask
