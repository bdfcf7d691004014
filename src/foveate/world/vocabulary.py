"""The words of the drawn world: skills, colours, shapes and where they stand in a picture."""

from __future__ import annotations

SKILLS = (
    "colour",
    "shape",
    "count",
    "relation",
    "text_large",
    "text_small",
    "mark",
    "bar",
    "line",
    "table",
    "compare",
    "dialogue",
    "motion",
    "order",
    "event_count",
    "needle",
)
"""What the drawn world asks about and scores."""
CLIP_SKILLS = ("motion", "order", "event_count", "needle")
"""The skills whose question is about a clip."""

RGB = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "purple": (160, 60, 205),
    "orange": (240, 140, 30),
}
COLOURS = tuple(RGB)
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
DIGITS = "0123456789"
MARK_RGB = (0, 120, 120)
"""Teal, which no shape, label or bar has: only the tiny mark."""
DARK_INK, LIGHT_INK = (0, 0, 0), (255, 255, 255)
INK_ON = {c: DARK_INK if c in ("yellow", "orange", "green") else LIGHT_INK for c in COLOURS}
"""Colour of the characters on a label of each colour."""

RELATIONS = ("left", "right", "above", "below")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WHICH = ("first", "second", "both", "neither")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

CANVAS = 128
"""Side of the square in which scenes are laid out; `size` scales the drawing, not the scene."""
CELLS = 8
"""Auxiliary "where" questions answer with a cell "x y" of a CELLS x CELLS grid over the picture."""
