"""Decoding large latents piece by piece: overlapping tiles, blended linearly where they overlap.

A decoder with attention and group norms sees all of its input, so that tiles differ a little in tint from the whole;
the blending leaves no seam. Memory and the time of one piece stay bounded whatever the picture's size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WHOLE = 1024 * 1024
"""Pictures of at most so many pixels are decoded at once: up to SDXL's, the largest native size."""
TILE = 64
OVERLAP = 16


def spans(length: int, tile: int = TILE, overlap: int = OVERLAP) -> list[tuple[int, int]]:
    """(begin, end) of equally long tiles that cover `length`, neighbours sharing at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    return [(begin, begin + tile) for begin in (round(i * (length - tile) / (count - 1)) for i in range(count))]


class TiledDecoding:
    """`step` until `done`; then `pixels` [1, 3, f h, f w]. Small latents are one step."""

    def __init__(self, decode: Callable[[Tensor], Tensor], latents: Tensor, factor: int) -> None:
        """`decode` turns [1, z, h, w] into [1, 3, `factor` h, `factor` w]."""
        self._decode = decode
        self._latents = latents
        self._factor = factor
        height, width = latents.shape[-2:]
        whole = height * width * factor**2 <= WHOLE
        rows, columns = ([(0, side)] if whole else spans(side) for side in (height, width))
        self._tiles = [(row, column) for row in rows for column in columns]
        self._next = 0
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    @property
    def done(self) -> bool:
        return self._next == len(self._tiles)

    def step(self) -> None:
        """Decodes one tile."""
        (top, bottom), (left, right) = self._tiles[self._next]
        self._next += 1
        pixels = self._decode(self._latents[:, :, top:bottom, left:right])
        if len(self._tiles) == 1:
            self._sum = pixels
            return
        f, (height, width) = self._factor, self._latents.shape[-2:]
        if self._sum is None or self._weight is None:
            self._sum = pixels.new_zeros(1, pixels.shape[1], f * height, f * width)
            self._weight = pixels.new_zeros(1, 1, f * height, f * width)
        ramp = _ramp(top, bottom, height, f)[:, None] * _ramp(left, right, width, f)[None, :]
        ramp = ramp.to(pixels)
        area = (slice(None), slice(None), slice(f * top, f * bottom), slice(f * left, f * right))
        self._sum[area] += ramp * pixels
        self._weight[area] += ramp

    @property
    def pixels(self) -> Tensor:
        assert self._sum is not None
        return self._sum if self._weight is None else self._sum / self._weight


def _ramp(begin: int, end: int, length: int, factor: int) -> Tensor:
    """Weights of a tile's pixels along one axis: rising over the overlap, unless it begins or ends the picture."""
    size, fade = factor * (end - begin), factor * OVERLAP
    positions = torch.arange(size) + 0.5
    rising = (positions / fade).clamp(max=1) if begin > 0 else torch.ones(size)
    falling = ((size - positions) / fade).clamp(max=1) if end < length else torch.ones(size)
    return torch.minimum(rising, falling)
