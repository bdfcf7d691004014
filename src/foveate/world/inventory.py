"""The boxes of `boxes`, asked for what is in them: colours, heights and numbers (training only).

"True or false" tells a model one bit about a picture. A colour, a number or the blocks of a whole tower tell it more,
and are what the truth of a statement depends on.
"""

from __future__ import annotations

import random

from foveate.world.boxes import PAINTS, Item, Layout, layout
from foveate.world.scene import Draft, Options, Question
from foveate.world.words import BOX_SHAPES

_PLACES = ("left", "middle", "right")
NUM_QUESTIONS = 16


def inventory(rng: random.Random, options: Options) -> Draft:
    """The pictures of `boxes`, with what is in each box and in all: colours, numbers, whole towers (training only)."""
    plan = layout(rng)

    def ask() -> list[Question]:
        size = sum(map(len, plan.boxes))
        asked = _towers(rng, plan) if plan.towers else _scattered(rng, plan)
        chosen = rng.sample(asked, min(NUM_QUESTIONS, len(asked)))
        return [Question("statement", ((text, answer),), 0.1, size, form, True) for form, text, answer in chosen]

    return Draft(plan.truth(), ask, lambda: plan.paint(options))


Asked = tuple[str, str, str]
"""Form, question, answer."""


def _towers(rng: random.Random, plan: Layout) -> list[Asked]:
    asked: list[Asked] = []
    heights = [len(b) for b in plan.boxes]
    for place, box in zip(_PLACES, plan.boxes):
        colours = [i.colour for i in box]
        asked += [
            ("blocks", f"Which blocks are in the {place} tower?", " ".join(colours)),
            ("height", f"How many blocks are in the {place} tower?", str(len(box))),
            ("base", f"What colour is the base of the {place} tower?", colours[0]),
            ("top", f"What colour is the top of the {place} tower?", colours[-1]),
        ]
    for colour in PAINTS:
        asked += [
            ("colour_blocks", f"How many {colour} blocks are there?", _count(plan, colour)),
            ("bases", f"How many towers have a {colour} block at the base?", _towers_with(plan, 0, colour)),
            ("tops", f"How many towers have a {colour} block at the top?", _towers_with(plan, -1, colour)),
            ("holding", f"How many towers have a {colour} block?", _boxes_with(plan, colour)),
        ]
    high, low = rng.sample(tuple(PAINTS), 2) if rng.random() < 0.7 else [rng.choice(tuple(PAINTS))] * 2
    over = sum(any((b[i].colour, b[i + 1].colour) == (low, high) for i in range(len(b) - 1)) for b in plan.boxes)
    asked.append(("over", f"How many towers have a {high} block on a {low} block?", str(over)))
    n = rng.choice(heights)
    asked += [
        ("of_height", f"How many towers have exactly {n} block{'s' * (n > 1)}?", str(heights.count(n))),
        ("tallest", "How many blocks are in the tallest tower?", str(max(heights))),
        ("all_blocks", "How many blocks are there?", str(sum(heights))),
        ("all_bases", "What colours are the bases?", " ".join(b[0].colour for b in plan.boxes)),
        ("all_tops", "What colours are the tops?", " ".join(b[-1].colour for b in plan.boxes)),
        ("all_heights", "How many blocks are in each tower?", " ".join(map(str, heights))),
    ]
    return asked


def _scattered(rng: random.Random, plan: Layout) -> list[Asked]:
    asked: list[Asked] = [
        ("each", "How many items are in each box?", " ".join(str(len(b)) for b in plan.boxes)),
        ("edge", "How many items are touching the edge?", str(sum(bool(i.walls) for b in plan.boxes for i in b))),
    ]
    for colour in PAINTS:
        each = " ".join(str(sum(i.colour == colour for i in b)) for b in plan.boxes)
        edge = sum(i.colour == colour and bool(i.walls) for b in plan.boxes for i in b)
        asked += [
            ("colour_each", f"How many {colour} items are in each box?", each),
            ("colour_all", f"How many {colour} items are there?", _count(plan, colour)),
            ("colour_edge", f"How many {colour} items are touching the edge?", str(edge)),
            ("holding", f"How many boxes have a {colour} item?", _boxes_with(plan, colour)),
        ]
    for shape in BOX_SHAPES:
        asked += [
            ("shape_all", f"How many {shape}s are there?", _count(plan, shape=shape)),
            ("holding", f"How many boxes have a {shape}?", _boxes_with(plan, shape=shape)),
        ]
        for colour in PAINTS:
            asked.append(("kind_all", f"How many {colour} {shape}s are there?", _count(plan, colour, shape)))
            asked.append(("holding", f"How many boxes have a {colour} {shape}?", _boxes_with(plan, colour, shape)))
    for wall in ("bottom", "top", "left wall", "right wall"):
        name = wall.split()[0]
        found = sum(name in i.walls for b in plan.boxes for i in b)
        asked.append(("wall", f"How many items are touching the {wall}?", str(found)))
    for place, box in zip(_PLACES, plan.boxes):
        asked.append(("items", f"How many items are in the {place} box?", str(len(box))))
        kinds = " ".join(c for c in PAINTS if any(i.colour == c for i in box))
        asked.append(("colours", f"Which colours are in the {place} box?", kinds))
    return asked


def _is(item: Item, colour: str, shape: str) -> bool:
    return colour in ("", item.colour) and shape in ("", item.shape)


def _count(plan: Layout, colour: str = "", shape: str = "") -> str:
    return str(sum(_is(i, colour, shape) for b in plan.boxes for i in b))


def _boxes_with(plan: Layout, colour: str = "", shape: str = "") -> str:
    return str(sum(any(_is(i, colour, shape) for i in b) for b in plan.boxes))


def _towers_with(plan: Layout, at: int, colour: str) -> str:
    return str(sum(b[at].colour == colour for b in plan.boxes))
