"""Images of videos: a contact sheet of one, and several one above the other at the same times."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.files.whole import atomic_path

PAPER = (255, 255, 255)
INK = (28, 30, 34)
FAINT = (120, 124, 132)
_MARGIN = 24
_GAP = 8


@dataclass
class FrameSampler:
    """Keeps evenly spaced frames of a video that is written in pieces.

    Attributes:
        total: frames of the video.
        count: frames that are kept, first and last among them; all of a video that has no more.
        frames: the kept frames so far, uint8 [H, W, 3].
    """

    total: int
    count: int
    frames: list[np.ndarray] = field(default_factory=list)
    _seen: int = field(default=0, init=False)

    @property
    def indices(self) -> list[int]:
        """Numbers of the kept frames."""
        return spaced(self.total, self.count)

    def add(self, frames: np.ndarray) -> None:
        """Take the next frames, uint8 [t, H, W, 3]."""
        wanted = set(self.indices)
        self.frames += [frame.copy() for i, frame in enumerate(frames, start=self._seen) if i in wanted]
        self._seen += len(frames)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One video of a comparison: its name, a line beneath the name, and its frames, uint8 [H, W, 3]."""

    name: str
    note: str
    frames: Sequence[np.ndarray]


def spaced(total: int, count: int) -> list[int]:
    """`count` numbers from 0 to total - 1, evenly spaced, with both ends; all of them if there are no more."""
    if total <= count:
        return list(range(total))
    if count == 1:
        return [total // 2]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def contact_sheet(
    frames: Sequence[np.ndarray], times: Sequence[float], captions: Sequence[str] | None = None
) -> Image.Image:
    """Frames [H, W, 3] in reading order, each above its time in seconds, and above its caption if there are captions."""
    cells = [_cell(frame, smallest=128, widest=416) for frame in frames]
    width, height = cells[0].size
    columns = _columns(len(cells), width, height)
    rows = math.ceil(len(cells) / columns)
    label = 24 if captions is None else 44
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + columns * (width + _GAP) - _GAP, 2 * _MARGIN + rows * (height + label + _GAP) - _GAP),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for i, (cell, time) in enumerate(zip(cells, times, strict=True)):
        x = _MARGIN + i % columns * (width + _GAP)
        y = _MARGIN + i // columns * (height + label + _GAP)
        sheet.paste(cell, (x, y))
        draw.text((x + width // 2, y + height + 5), f"{time:.2f} s", FAINT, _font(14), anchor="ma")
        if captions is not None:
            text = _shortened(captions[i], width, _font(13))
            draw.text((x + width // 2, y + height + 24), text, INK, _font(13), anchor="ma")
    return sheet


def comparison(rows: Sequence[Row], times: Sequence[float], *, title: str, subtitle: str, width: int) -> Image.Image:
    """Videos one above the other, about `width` pixels wide: each column is one moment, each row is named at its left."""
    names, head, foot = 170, 92, 34
    columns = len(times)
    room = (width - names - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    cells = [[_cell(frame, smallest=room, widest=room) for frame in row.frames] for row in rows]
    cell_width, cell_height = cells[0][0].size
    picture = Image.new(
        "RGB",
        (
            2 * _MARGIN + names + columns * (cell_width + _GAP) - _GAP,
            head + len(rows) * (cell_height + _GAP) - _GAP + foot + _MARGIN // 2,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN - 2), title, INK, _font(24))
    draw.text((_MARGIN, _MARGIN + 32), subtitle, FAINT, _font(15))
    left = _MARGIN + names
    for number, (row, line) in enumerate(zip(rows, cells, strict=True)):
        y = head + number * (cell_height + _GAP)
        middle = y + cell_height // 2
        draw.text((_MARGIN, middle - 3), row.name, INK, _font(19), anchor="ls")
        draw.text((_MARGIN, middle + 6), row.note, FAINT, _font(14), anchor="la")
        for column, cell in enumerate(line):
            picture.paste(cell, (left + column * (cell_width + _GAP), y))
    bottom = head + len(rows) * (cell_height + _GAP)
    for column, time in enumerate(times):
        x = left + column * (cell_width + _GAP) + cell_width // 2
        draw.text((x, bottom), f"{time:.1f} s", FAINT, _font(14), anchor="ma")
    return picture


def write_picture(path: Path, picture: Image.Image, *, replace: bool = True) -> None:
    """Write a PNG atomically."""
    with atomic_path(path, replace=replace) as part:
        picture.save(part, format="png", optimize=True)


def _cell(frame: np.ndarray, *, smallest: int, widest: int) -> Image.Image:
    """A frame enlarged by a whole number until both sides are `smallest`, or made smaller to at most `widest`."""
    image = Image.fromarray(frame)
    if image.width > widest:
        return image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    # A whole number of pixels per pixel keeps small videos sharp instead of blurred.
    factor = max(1, min(math.ceil(smallest / min(image.size)), widest // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _columns(count: int, width: int, height: int) -> int:
    """Columns that fill their last row if possible and make a sheet of about 3 : 2."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = rows * columns - count
        return abs(math.log(columns * width / (rows * height) / 1.5)) + empty / columns

    return min(range(1, count + 1), key=cost)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Truncate a text to `width` pixels, with dots at the end."""
    if font.getlength(text) <= width:
        return text
    end = next(end for end in range(len(text) - 1, -1, -1) if end == 0 or font.getlength(f"{text[:end]}...") <= width)
    return f"{text[:end].rstrip()}..."
