"""Three grey boxes with scattered things or towers of blocks, 400 x 100 px, and statements that are true or false.

The manner of NLVR (Suhr et al., ACL 2017), drawn and worded anew. All questions are for training only.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from foveate.world.canvas import Canvas
from foveate.world.scene import Draft, Options, Picture, Question
from foveate.world.statements import statements
from foveate.world.vocabulary import COLOURS
from foveate.world.words import BOX_SHAPES

WIDTH, HEIGHT, BOX, PITCH = 400, 100, 100, 150
PAINTS = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}
SIZES = (10, 20, 30)
"""Sides in pixels of small, medium and large things; blocks of towers are medium squares."""
NUM_STATEMENTS = 8


class Item(NamedTuple):
    """One thing: its look, its left top corner within its box and its side, in units."""

    shape: str
    colour: str
    x: int
    y: int
    side: int

    @property
    def walls(self) -> tuple[str, ...]:
        """The edges of the box that it touches."""
        touches = {
            "left": self.x <= 0,
            "right": self.x + self.side >= BOX,
            "top": self.y <= 0,
            "bottom": self.y + self.side >= BOX,
        }
        return tuple(name for name, yes in touches.items() if yes)


def _tower(rng: random.Random) -> list[Item]:
    """One to four blocks, base first, a thin gap between them."""
    return [Item("square", rng.choice(tuple(PAINTS)), 40, BOX - 20 - 21 * i, 20) for i in range(rng.randint(1, 4))]


def _scatter(rng: random.Random) -> list[Item]:
    """One to eight things that do not overlap, a third of them at a wall."""
    items: list[Item] = []
    for _ in range(rng.randint(1, 8)):
        for _ in range(12):
            side = rng.choice(SIZES)
            free = BOX - side
            x, y = rng.randint(1, free - 1), rng.randint(1, free - 1)
            at_wall = rng.random()
            if at_wall < 0.2:
                x = rng.choice((0, free))
            if 0.15 < at_wall < 0.36:
                y = rng.choice((0, free, free))
            if not any(_close(o, x, y, side) for o in items):
                items.append(Item(rng.choice(BOX_SHAPES), rng.choice(tuple(PAINTS)), x, y, side))
                break
    return items


def _close(o: Item, x: int, y: int, side: int) -> bool:
    """Whether a square at (x, y) would overlap `o` or nearly touch it."""
    return o.x - side - 2 < x < o.x + o.side + 2 and o.y - side - 2 < y < o.y + o.side + 2


class Layout(NamedTuple):
    """What is in the three boxes; of towers, base first."""

    towers: bool
    boxes: list[list[Item]]

    def truth(self) -> dict[str, object]:
        """The ground truth on a grid of 20 units."""
        kept = [sorted([i.shape, i.colour, i.side, i.x // 20, i.y // 20] for i in box) for box in self.boxes]
        return {"towers": self.towers, "boxes": kept}

    def paint(self, options: Options) -> Picture:
        """One picture; `options.size` is its height."""
        canvas = Canvas((128, 128, 128), options.size, (WIDTH, HEIGHT))
        for i, box in enumerate(self.boxes):
            left = i * PITCH
            canvas.rect((211, 211, 211), left, 0, left + BOX, HEIGHT)
            for item in box:
                _draw(canvas, item, left)
        return [canvas.array()], [canvas.boxes]


def layout(rng: random.Random) -> Layout:
    """Three towers (60 %), or three boxes of scattered things."""
    towers = rng.random() < 0.6
    return Layout(towers, [_tower(rng) if towers else _scatter(rng) for _ in range(3)])


def boxes(rng: random.Random, options: Options) -> Draft:
    """Three boxes of towers (60 %) or of scattered things, with about eight statements, half of them true."""
    plan = layout(rng)

    def ask() -> list[Question]:
        size = sum(map(len, plan.boxes))
        return [
            Question("statement", ((f"{text} True or false?", "true" if true else "false"),), 0.5, size, form, True)
            for form, text, true in statements(rng, plan.boxes, plan.towers, NUM_STATEMENTS)
        ]

    return Draft(plan.truth(), ask, lambda: plan.paint(options))


def _draw(canvas: Canvas, item: Item, left: int) -> None:
    name = item.colour if item.colour in COLOURS else None
    x0, y0, side, rgb = left + item.x, item.y, item.side, PAINTS[item.colour]
    if item.shape == "square":
        canvas.rect(rgb, x0, y0, x0 + side, y0 + side)
    else:
        canvas.stamp(item.shape, rgb, x0, y0, side)
    canvas.record(x0, y0, x0 + side, y0 + side, item.shape, name)
