"""Maps as a picture: a strip for each image, the image at the left, blocks from left to right."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lamina.explain.seen import Explanation, Seen
from lamina.text import printable

#: pixels: the side of a map, what lies between two, around all, and the height of a line of text
CELL, GAP, MARGIN, LINE = 112, 6, 12, 16

#: from little to much; lighter and lighter, so that it can be told without colours, too
_ANCHORS = ((20, 18, 70), (58, 46, 140), (42, 112, 142), (60, 160, 110), (170, 205, 70), (255, 246, 190))
_INK, _SOFT, _EMPTY, _PAPER = (27, 31, 36), (92, 101, 112), (238, 240, 243), (255, 255, 255)

#: share of a map's colour where it lies over the image
_OVER = 0.7


def colours(count: int = 256) -> np.ndarray:
    """Return the colour map (count, 3), uint8."""
    places = np.linspace(0, 1, len(_ANCHORS))
    steps = np.linspace(0, 1, count)
    return (
        np.stack([np.interp(steps, places, part) for part in zip(*_ANCHORS, strict=True)], axis=1).round().astype("u1")
    )


def stretched(values: np.ndarray) -> np.ndarray:
    """Return values stretched to [0, 1]; zeros where all are alike.

    >>> stretched(np.array([[2.0, 6.0], [3.0, 2.0]])).tolist()
    [[0.0, 1.0], [0.25, 0.0]]
    """
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def size_of(blocks: int, rows: int) -> tuple[int, int]:
    """Return the width and height of a strip, in pixels.

    Args:
        rows: of maps: 2 where there are cosines, too, else 1.
    """
    width = 2 * MARGIN + CELL * (blocks + 1) + GAP * blocks
    return width, 2 * MARGIN + LINE + rows * (CELL + 2 * LINE) + LINE * (rows == 1)


def strip(found: Explanation, seen: Seen) -> Image.Image:
    """Return the strip of one image."""
    maps = seen.maps
    blocks = len(maps.each)
    rows = [(f"attention of {found.attends}", maps.attention.numpy(), [_share(v) for v in maps.on_prompts.tolist()])]
    if not any(maps.tokens) and not any(maps.prefixes):
        rows = [(*rows[0][:2], [""] * blocks)]
    if found.compared:
        rows.insert(0, ("cosine to prompts", maps.cosine.numpy(), [""] * blocks))
    sheet = Image.new("RGB", size_of(blocks, len(rows)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    picture = Image.fromarray(np.ascontiguousarray(seen.pixels.permute(1, 2, 0).numpy()))
    picture = picture.resize((CELL, CELL), Image.Resampling.BICUBIC)
    top = MARGIN + 2 * LINE
    sheet.paste(picture, (MARGIN, top))
    for line, text in enumerate((seen.said, printable(seen.path))):
        _write(pen, font, (MARGIN, top + CELL + 1 + line * LINE), text, _SOFT if line else _INK, fit=CELL)
    for block in range(blocks):
        _write(pen, font, (_left(block), MARGIN), f"block {block}", _SOFT)
    for title, values, captions in rows:
        _write(pen, font, (_left(0), top - LINE), title, _INK)
        for block in range(blocks):
            sheet.paste(_over(picture, values[block]), (_left(block), top))
            _write(pen, font, (_left(block), top + CELL + 1), captions[block], _SOFT)
        top += CELL + 2 * LINE
    return sheet


def grid(strips: Sequence[Image.Image]) -> Image.Image:
    """Return strips of one width, one below the other."""
    sheet = Image.new("RGB", (strips[0].width, sum(each.height for each in strips)), _PAPER)
    top = 0
    for each in strips:
        sheet.paste(each, (0, top))
        top += each.height
    return sheet


def png(image: Image.Image) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _left(block: int) -> int:
    return MARGIN + (CELL + GAP) * (block + 1)


def _share(value: float) -> str:
    return f"prompts {100 * value:.1f} %"


def _over(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay a map over the image; a plain cell where there is no map."""
    if not np.isfinite(values).all():
        return Image.new("RGB", (CELL, CELL), _EMPTY)
    smooth = Image.fromarray(stretched(values).astype(np.float32)).resize((CELL, CELL), Image.Resampling.BILINEAR)
    table = colours()
    places = (np.asarray(smooth).clip(0, 1) * (len(table) - 1)).round().astype(np.int64)
    return Image.blend(picture.convert("L").convert("RGB"), Image.fromarray(table[places]), _OVER)


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    place: tuple[int, int],
    text: str,
    ink: tuple[int, int, int],
    fit: int | None = None,
) -> None:
    """Write one line; if it must fit into so many pixels, its end is what stays."""
    short = text
    while fit is not None and pen.textlength(short, font) > fit and len(text) > 1:
        text = text[1:]
        short = f"…{text}"
    pen.text(place, short, ink, font)
