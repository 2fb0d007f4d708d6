"""Tiled decoding covers every pixel, agrees with the whole where it can, and leaves no seam."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models import tiling
from models.tiling import OVERLAP, TILE, TiledDecoding, spans

FACTOR = 2


def enlarge(latents: Tensor) -> Tensor:
    """A decoder without memory of its surroundings."""
    return latents[:, :3].repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2)


def decoded(latents: Tensor) -> tuple[Tensor, int]:
    decoding, steps = TiledDecoding(enlarge, latents, FACTOR), 0
    while not decoding.done:
        decoding.step()
        steps += 1
    return decoding.pixels, steps


@pytest.mark.parametrize("length", [1, TILE, TILE + 1, 97, 112, 113, 500])
def test_spans_cover_with_enough_overlap(length: int) -> None:
    found = spans(length)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert {end - begin for begin, end in found} == {min(TILE, length)}
    assert all(end - begin >= OVERLAP for (_, end), (begin, _) in pairwise(found))


@pytest.mark.parametrize(("factor", "size"), [(8, (128, 128)), (8, (64, 128)), (4, (256, 256)), (2, (300, 400))])
def test_native_sizes_are_decoded_at_once(factor: int, size: tuple[int, int]) -> None:
    """As the original code and diffusers decode them: 1024x1024 of SDXL, 512x1024, 1024x1024 of an upscaler."""
    sizes = []

    def decode(latents: Tensor) -> Tensor:
        sizes.append(latents.shape[-2:])
        return latents

    decoding = TiledDecoding(decode, torch.zeros(1, 4, *size), factor)
    decoding.step()
    assert decoding.done
    assert sizes == [size]


@pytest.mark.parametrize("size", [(97, 96), (150, 70), (40, 300)])
def test_a_local_decoder_gives_the_same_in_tiles(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "WHOLE", 96 * 96 * FACTOR**2)
    latents = torch.randn(1, 4, *size)
    pixels, steps = decoded(latents)
    assert steps > 1
    torch.testing.assert_close(pixels, enlarge(latents), rtol=0, atol=1e-5)


def test_tiles_of_different_tint_fade_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "WHOLE", 0)
    shades = iter((0.0, 1.0))
    decoding = TiledDecoding(
        lambda x: torch.full((1, 3, x.shape[2], x.shape[3]), next(shades)), torch.zeros(1, 4, 8, 100), 1
    )
    while not decoding.done:
        decoding.step()
    line = decoding.pixels[0, 0, 0]
    assert line[0] == 0
    assert line[-1] == 1
    assert float(line.diff().max()) < 2 / OVERLAP
