"""Several pictures on one sheet, each above its caption."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 256
MARGIN = 16
CAPTION = 28
PAPER, INK = (250, 250, 248), (40, 40, 40)


def contact_sheet(pictures: Sequence[tuple[str, bytes]]) -> bytes:
    """A PNG of the (caption, picture file) pairs in one row, each picture fitted into a square of `SIDE` pixels."""
    step = SIDE + MARGIN
    sheet = Image.new("RGB", (MARGIN + step * len(pictures), 2 * MARGIN + SIDE + CAPTION), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (caption, data) in enumerate(pictures):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = SIDE / max(picture.size)
        smaller = scale < 1
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted = picture.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)
        left = MARGIN + step * index
        sheet.paste(fitted, (left + (SIDE - fitted.width) // 2, MARGIN + (SIDE - fitted.height) // 2))
        draw.text((left, MARGIN + SIDE + 8), caption, font=font, fill=INK)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
