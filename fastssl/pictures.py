"""Draws a page of named columns: pixels as they are, small tables of numbers, text. Pillow only.

A page is data (`Page`), which tests read; `draw` makes one image of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1600  # pixels of the whole page, where the columns can be made to fit
GAP = 3  # pixels between two frames
MARGIN = 20  # pixels between two columns and around the page
WHITE, PALE, GRAY, BLACK = (255, 255, 255), (225, 225, 225), (105, 105, 105), (25, 25, 25)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a column shows of one image, from top to bottom; any part may be missing.

    With numbers next to frames, what follows the frames stands beside them.
    """

    frames: np.ndarray | None = None  # uint8 [F, h, w, 3]
    captions: tuple[str, ...] = ()  # one under each frame, or none at all
    across: int = 1  # frames in a line
    numbers: np.ndarray | None = None  # int [rows, columns]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One kind of thing for every image; the frames of its cells are of one size."""

    name: str
    note: str  # in gray under the name; may be empty
    cells: tuple[Cell, ...]
    height: float = 1.0  # of its pictures, where others have 1


@dataclass(frozen=True)
class Page:
    """A heading above columns."""

    title: str
    lines: tuple[str, ...]
    columns: tuple[Column, ...]

    def texts(self) -> list[str]:
        """All lines that are written on it, but for tables of numbers."""
        found = [self.title, *self.lines]
        for column in self.columns:
            found += [column.name, column.note]
            for cell in column.cells:
                found += [*cell.captions, *cell.lines]
        return [line for text in found for line in text.split("\n")]


def draw(page: Page) -> Image.Image:
    """The page on white, at most `WIDTH` pixels wide unless its columns are too many."""
    height = 200  # pixels that a picture, or a block of patches, should about fill
    while True:
        blocks = [_column(column, height) for column in page.columns]
        width = sum(rows[0].width for rows in blocks) + MARGIN * (len(blocks) + 1)
        if width <= WIDTH or height < 60:
            break
        height = int(height * 0.9)
    columns = [_stacked(rows, 0) for rows in _aligned(blocks)]
    body = _beside(columns, MARGIN)
    heading = [_text(page.title, 24, BLACK, WIDTH)]
    heading += [_text(line, 14, GRAY, max(body.width, 700)) for line in page.lines]
    whole = _stacked([_stacked(heading, 6), body], 14)
    return _padded(whole, whole.width + 2 * MARGIN, whole.height + 2 * MARGIN, MARGIN, MARGIN)


def _column(column: Column, height: int) -> list[Image.Image]:
    """The heading and every cell, all of one width."""
    height = int(height * column.height)
    cells = [_cell(cell, height) for cell in column.cells]
    width = max(80, *(cell.width for cell in cells))
    name = _text(column.name, 16, BLACK, width)
    heading = _stacked([name, _text(_note(column, height), 12, GRAY, max(width, name.width))], 3)
    rows = [heading, *cells]
    width = max(row.width for row in rows)
    return [_padded(row, width, row.height) for row in rows]


def _note(column: Column, height: int) -> str:
    """The column's note, and how much larger or smaller its pixels are drawn."""
    frames = column.cells[0].frames
    if frames is None:
        return column.note
    scale = _scale(frames, column.cells[0].across, height)
    if scale == 1:
        return column.note
    drawn = f"drawn {scale:.0f} x larger" if scale > 1 else f"drawn at {scale:.0%}"
    return f"{column.note}, {drawn}".lstrip(", ")


def _aligned(blocks: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """Every row as high as its highest cell, with a line above all but the heading."""
    result: list[list[Image.Image]] = [[] for _ in blocks]
    for number, row in enumerate(zip(*blocks, strict=True)):
        height = max(cell.height for cell in row) + 2 * GAP
        for column, cell in zip(result, row, strict=True):
            padded = _padded(cell, cell.width, height + GAP, 0, 2 * GAP)
            if number:
                ImageDraw.Draw(padded).line([(0, 0), (cell.width, 0)], PALE)
            column.append(padded)
    return result


def _cell(cell: Cell, height: int) -> Image.Image:
    parts = []
    if cell.frames is not None and cell.numbers is not None:
        rest = _cell(replace(cell, frames=None, captions=()), height)
        return _beside([_frames(cell, cell.frames, height), rest], 3 * GAP)
    if cell.frames is not None:
        parts.append(_frames(cell, cell.frames, height))
    if cell.numbers is not None:
        parts.append(_table(cell.numbers))
    widest = max(130, *(part.width for part in parts)) if parts else 130
    if cell.lines or not parts:
        parts.append(_text("\n".join(cell.lines), 13, BLACK, widest))
    return _stacked(parts, GAP)


def _frames(cell: Cell, frames: np.ndarray, height: int) -> Image.Image:
    """All frames, line by line, each with its caption under it."""
    scale = _scale(frames, cell.across, height)
    tiles = [_picture(pixels, scale) for pixels in frames]
    if cell.captions:
        captions = [_text(caption, 13, BLACK, WIDTH) for caption in cell.captions]
        width = max(each.width for each in (*tiles, *captions)) + GAP
        tiles = [
            _padded(_stacked([tile, caption], 1), width, tile.height + caption.height + 1)
            for tile, caption in zip(tiles, captions, strict=True)
        ]
    starts = range(0, len(tiles), cell.across)
    return _stacked([_beside(tiles[start : start + cell.across], GAP) for start in starts], GAP)


def _scale(frames: np.ndarray, across: int, height: int) -> float:
    """By how much frames are enlarged, a whole number, or shrunk, below 1."""
    lines = -(-len(frames) // across)
    aim = height / max(lines, min(across, 2))
    side = max(frames.shape[1:3])
    return max(1, round(aim / side)) if side < 1.5 * aim else aim / side


def _picture(pixels: np.ndarray, scale: float) -> Image.Image:
    """Enlarged without interpolation, which would hide what is wrong with pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if scale != 1:
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, how)
    # a thin line around it: white pixels would be lost on the page
    framed = Image.new("RGB", (image.width + 2, image.height + 2), PALE)
    framed.paste(image, (1, 1))
    return framed


def _table(numbers: np.ndarray) -> Image.Image:
    """Numbers in boxes."""
    font = ImageFont.load_default(size=14)
    side = 12 + int(max(font.getlength(str(number)) for number in numbers.flat))
    rows, columns = numbers.shape
    image = Image.new("RGB", (columns * side + 1, rows * side + 1), WHITE)
    pen = ImageDraw.Draw(image)
    for (row, column), number in np.ndenumerate(numbers):
        x, y = column * side, row * side
        pen.rectangle((x, y, x + side, y + side), outline=GRAY)
        pen.text((x + side / 2, y + side / 2), str(number), BLACK, font, anchor="mm")
    return image


def _text(text: str, size: int, color: tuple[int, int, int], width: int) -> Image.Image:
    """Text, wrapped between words to `width` pixels; a longer word stays whole."""
    font = ImageFont.load_default(size=size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    step = round(size * 1.25)
    widest = 1 + int(max(font.getlength(line) for line in lines))
    image = Image.new("RGB", (widest, step * len(lines)), WHITE)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, number * step), line, color, font)
    return image


def _beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Left to right, aligned at the top."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGB", (width, max(image.height for image in images)), WHITE)
    x = 0
    for image in images:
        joined.paste(image, (x, 0))
        x += image.width + gap
    return joined


def _stacked(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Top to bottom, aligned at the left."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    joined = Image.new("RGB", (max(image.width for image in images), height), WHITE)
    y = 0
    for image in images:
        joined.paste(image, (0, y))
        y += image.height + gap
    return joined


def _padded(image: Image.Image, width: int, height: int, x: int = 0, y: int = 0) -> Image.Image:
    """On white, `x` and `y` from the upper left corner."""
    larger = Image.new("RGB", (width, height), WHITE)
    larger.paste(image, (x, y))
    return larger
