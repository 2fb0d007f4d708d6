"""The contact sheet holds every picture."""

import io

from PIL import Image

from cli.contact_sheet import MARGIN, SIDE, contact_sheet


def picture(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_small_and_large_pictures_fit_their_squares() -> None:
    red, green = (255, 0, 0), (0, 255, 0)
    data = contact_sheet([("small", picture((128, 64), red)), ("large", picture((512, 512), green))])
    sheet = Image.open(io.BytesIO(data))
    middle = MARGIN + SIDE // 2
    assert sheet.getpixel((middle, middle)) == red
    assert sheet.getpixel((middle + SIDE + MARGIN, middle)) == green
    assert sheet.width == 2 * SIDE + 3 * MARGIN
