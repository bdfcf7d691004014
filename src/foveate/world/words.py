"""Words for quantities, things and places in the boxes of `boxes`, each with the test that it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from foveate.world.boxes import Item

Box = Sequence["Item"]
Test = Callable[["Item"], bool]
Counts = Callable[[int], "bool | None"]
"""Whether a quantity fits a number; None where readers would not agree."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BOX_COLOURS = ("black", "blue", "yellow")
BOX_SHAPES = ("circle", "square", "triangle")
_SIDES = {"small": 10, "medium": 20, "big": 30}


class Quantity(NamedTuple):
    """Words for a number of things ("at least two", True when a plural noun follows) and which numbers fit."""

    words: str
    plural: bool
    fits: Counts


class Noun(NamedTuple):
    """Words for a kind of thing and the test for it. `after` follows the noun: "touching the edge"."""

    singular: str
    plural: str
    after: str
    test: Test

    def worded(self, plural: bool) -> str:
        return " ".join(filter(None, (self.plural if plural else self.singular, self.after)))

    def count(self, items: Sequence[Item]) -> int:
        return sum(map(self.test, items))


def number(rng: random.Random, n: int) -> str:
    return str(n) if rng.random() < 0.4 or n >= len(_WORDS) else _WORDS[n]


def exactly(n: int) -> Counts:
    return lambda k: k == n


def least(n: int) -> Counts:
    return lambda k: k >= n


def most(n: int) -> Counts:
    return lambda k: k <= n


def bare(n: int) -> Counts:
    """ "There are two": true for two, false for fewer; for more, readers do not agree."""
    return lambda k: None if k > n else k == n


def quantity(rng: random.Random, near: int, *, zero: bool = True, a: bool = True, top: int = 9) -> Quantity:
    """A random quantity whose number is `near` or next to it, so that it is about as often true as false."""
    n = max(1, min(top, near + rng.choice((-1, -1, 0, 0, 0, 1, 1))))
    kind = rng.random()
    if a and (kind < 0.22 or (near == 0 and kind < 0.4)):
        return Quantity("a", False, least(1))
    if zero and kind < 0.28:
        return Quantity("no", False, exactly(0))
    if kind < 0.52:
        words = rng.choice(("exactly", "exactly", "only")) + " " + number(rng, n)
        return Quantity(words, n > 1, exactly(n))
    if kind < 0.72:
        word = rng.choice(("at least", "at least", "atleast"))
        return Quantity(f"{word} {number(rng, n)}", n > 1, least(n))
    if kind < 0.76:
        return Quantity(f"at most {number(rng, n)}", n > 1, most(n))
    if kind < 0.82:
        return Quantity(f"more than {number(rng, n)}", n > 1, least(n + 1))
    if kind < 0.84 and n > 1:
        return Quantity(f"less than {number(rng, n)}", True, most(n - 1))
    return Quantity(number(rng, n), n > 1, bare(n))


def article(text: str) -> str:
    """Mend "a" before a vowel."""
    return " ".join(
        "an" if word == "a" and after[:1] in ("a", "e", "i", "o") else word
        for word, after in zip(text.split(" "), [*text.split(" ")[1:], ""])
    )


def noun(rng: random.Random, items: Sequence[Item], towers: bool, place: bool = True) -> Noun:
    """A kind of thing, most often one that is there: size, colour, shape and place are each said or not."""
    seen = rng.choice(items) if rng.random() < 0.85 else None
    colour = (seen.colour if seen else rng.choice(BOX_COLOURS)) if rng.random() < (0.85 if towers else 0.75) else ""
    if towers:
        name = rng.choice(("block", "block", "block", "item", "square"))
        return Noun(f"{colour} {name}".strip(), f"{colour} {name}s".strip(), "", lambda i: colour in ("", i.colour))
    shape = (seen.shape if seen else rng.choice(BOX_SHAPES)) if rng.random() < 0.6 else ""
    word = shape or rng.choice(("item", "item", "object", "object", "shape"))
    if not colour and not shape and rng.random() < 0.7:  # "an object" alone says little
        colour = rng.choice(BOX_COLOURS)
    size = rng.choice(tuple(_SIDES)) if rng.random() < 0.08 else ""
    if size and seen:
        size = next(name for name, side in _SIDES.items() if side == seen.side)
    after, where = place_words(rng) if place and rng.random() < 0.35 else ("", None)

    def test(i: Item) -> bool:
        return (
            colour in ("", i.colour)
            and shape in ("", i.shape)
            and (not size or i.side == _SIDES[size])
            and (where is None or where(i))
        )

    front = " ".join(filter(None, (size, colour, word)))
    return Noun(front, front + "s", after, test)


def place_words(rng: random.Random) -> tuple[str, Test]:
    """Words about walls, and their test."""
    touching = rng.choice(("touching", "touching", "touching", "closely touching"))
    edge = rng.choice(("the edge", "the edge", "the wall", "an edge", "the side"))
    kind = rng.random()
    if kind < 0.5:
        return f"{touching} {edge}", lambda i: bool(i.walls)
    if kind < 0.68:
        return rng.choice(
            ("not touching any edge", "not touching the edge", "not touching the wall")
        ), lambda i: not i.walls
    if kind < 0.8:
        word = rng.choice(("the bottom", "the base", "the bottom of a box"))
        return f"{touching} {word}", lambda i: "bottom" in i.walls
    if kind < 0.87:
        return f"{touching} {rng.choice(('the top', 'the top of a box'))}", lambda i: "top" in i.walls
    if kind < 0.94:
        side = rng.choice(("left", "right"))
        return f"{touching} the {side} {rng.choice(('wall', 'wall of a box', 'side'))}", lambda i: side in i.walls
    return f"{touching} {rng.choice(('a corner', 'the corner'))}", lambda i: len(i.walls) > 1
