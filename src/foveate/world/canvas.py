"""Fast drawing: shapes and characters are masks that are made once and pasted, with antialiased edges.

Layouts are in units of a 128-unit square; a `Canvas` of another size scales positions, sizes and boxes alike.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.world.scene import Box
from foveate.world.vocabulary import CANVAS, DARK_INK, LIGHT_INK

Rgb = tuple[int, int, int]
_SMOOTH = 4  # shapes are drawn this many times larger and averaged down


@lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _digit_box(size: int) -> tuple[int, int]:
    """Top and bottom of the digits of a font size, so that every string of that size has one height."""
    _, top, _, bottom = _font(size).getbbox("0123456789")
    return int(top), int(bottom)


@lru_cache(maxsize=4096)
def _glyph(char: str, size: int) -> tuple[Image.Image, int]:
    """Mask of one character, as high as the digits of that size, and its advance width in pixels."""
    font = _font(size)
    top, bottom = _digit_box(size)
    width = max(1, round(font.getlength(char)))
    mask = Image.new("L", (width, bottom - top))
    ImageDraw.Draw(mask).text((0, -top), char, fill=255, font=font)
    return mask, width


@lru_cache(maxsize=4096)
def _shape(shape: str, side: int) -> Image.Image:
    """Mask of a shape in a square of `side` pixels."""
    radius = (side - 1) / 2
    big = Image.new("L", (side * _SMOOTH, side * _SMOOTH))
    pen = ImageDraw.Draw(big)
    e = side * _SMOOTH - 1
    if shape == "circle":
        pen.ellipse([0, 0, e, e], fill=255)
    elif shape == "ring":
        pen.ellipse([0, 0, e, e], outline=255, width=max(2 * _SMOOTH, round(radius * _SMOOTH * 0.42)))
    elif shape == "square":
        d = round(radius * _SMOOTH * 0.12)
        pen.rectangle([d, d, e - d, e - d], fill=255)
    elif shape == "triangle":
        pen.polygon([(e / 2, 0), (0, e), (e, e)], fill=255)
    elif shape == "diamond":
        pen.polygon([(e / 2, 0), (0, e / 2), (e / 2, e), (e, e / 2)], fill=255)
    elif shape == "cross":
        a, b = e * 0.34, e * 0.66
        pen.rectangle([0, a, e, b], fill=255)
        pen.rectangle([a, 0, b, e], fill=255)
    else:
        raise AssertionError(shape)
    return big.reduce(_SMOOTH)


def text_width(text: str, size: int) -> int:
    """Width of `text` in units at font size `size` (in units)."""
    return sum(_glyph(char, size)[1] for char in text)


def text_height(size: int) -> int:
    """Height of digits in units at font size `size`."""
    top, bottom = _digit_box(size)
    return bottom - top


class Canvas:
    """One picture in the making, with the ground-truth boxes of what was drawn on it.

    size: side in pixels, of a square of CANVAS units; `units` (width, height) for other formats, where size is the
    height. All arguments of the methods are in units; recorded boxes are in pixels.
    """

    def __init__(self, background: Rgb, size: int | None = None, units: tuple[int, int] = (CANVAS, CANVAS)) -> None:
        self.k = (size or units[1]) / units[1]
        self.image = Image.new("RGB", (round(units[0] * self.k), round(units[1] * self.k)), background)
        self.pen = ImageDraw.Draw(self.image)
        self.boxes: list[Box] = []

    def shape(self, shape: str, rgb: Rgb, x: float, y: float, radius: float, colour: str | None = None) -> None:
        """A shape centred at (x, y); recorded when `colour`, its name, is given."""
        k = self.k
        r = max(1, round(radius * k))
        left, top = round(x * k) - r, round(y * k) - r
        self.image.paste(rgb, (left, top), _shape(shape, 2 * r + 1))
        if colour:
            self.boxes.append(Box(left, top, left + 2 * r + 1, top + 2 * r + 1, shape, colour))

    def stamp(self, shape: str, rgb: Rgb, x0: float, y0: float, side: float) -> None:
        """A shape that fills the square at (x0, y0); not recorded."""
        k = self.k
        mask = _shape(shape, max(2, round((x0 + side) * k) - round(x0 * k)))
        self.image.paste(rgb, (round(x0 * k), round(y0 * k)), mask)

    def record(self, x0: float, y0: float, x1: float, y1: float, shape: str | None, colour: str | None) -> None:
        """Note what was drawn where."""
        k = self.k
        self.boxes.append(Box(round(x0 * k), round(y0 * k), round(x1 * k), round(y1 * k), shape, colour))

    def rect(self, rgb: Rgb, x0: float, y0: float, x1: float, y1: float, colour: str | None = None) -> None:
        """A filled rectangle, half open; recorded when `colour`, its name, is given."""
        k = self.k
        box = (round(x0 * k), round(y0 * k), round(x1 * k), round(y1 * k))
        self.image.paste(rgb, box)
        if colour:
            self.boxes.append(Box(*box, None, colour))

    def line(self, rgb: Rgb, points: list[tuple[float, float]], width: float = 1) -> None:
        k = self.k
        self.pen.line([(x * k, y * k) for x, y in points], fill=rgb, width=max(1, round(width * k)), joint="curve")

    def text(self, text: str, rgb: Rgb, x: float, y: float, size: float, record: bool = True) -> None:
        """`text` centred at (x, y), one recorded Box a character."""
        px = max(4, round(size * self.k))
        glyphs = [_glyph(char, px) for char in text]
        left = round(x * self.k - sum(width for _, width in glyphs) / 2)
        height = glyphs[0][0].height
        top = round(y * self.k - height / 2)
        for index, (char, (mask, width)) in enumerate(zip(text, glyphs)):
            self.image.paste(rgb, (left, top), mask)
            if record:
                self.boxes.append(Box(left, top, left + width, top + height, None, None, char, index))
            left += width

    def array(self) -> np.ndarray:
        """The picture as uint8 [height, width, 3], writable, so that torch.from_numpy takes it silently."""
        return np.array(self.image)


def background(rng: random.Random) -> tuple[Rgb, Rgb]:
    """A dark or light grey, and the ink that is read on it."""
    dark = rng.random() < 0.5
    v = rng.randrange(0, 51) if dark else rng.randrange(205, 256)
    return (v, v, v), (LIGHT_INK if dark else DARK_INK)


Rect = tuple[float, float, float, float]


def place(
    rng: random.Random, taken: list[Rect], w: float, h: float, margin: int = 2, tries: int = 25, side: int = CANVAS
) -> tuple[int, int] | None:
    """A free top left corner for a w x h rectangle, appended to `taken`; None when `tries` corners were not free."""
    for _ in range(tries):
        x = 2 + int(rng.random() * (side - w - 3))
        y = 2 + int(rng.random() * (side - h - 3))
        for x0, y0, x1, y1 in taken:
            if x < x1 + margin and x0 < x + w + margin and y < y1 + margin and y0 < y + h + margin:
                break
        else:
            taken.append((x, y, x + w, y + h))
            return x, y
    return None
