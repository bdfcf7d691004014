"""One shape on a pale ground, 64 px: the world of easy-VQA, drawn anew. All questions are for training only."""

from __future__ import annotations

import random

from foveate.world.canvas import Canvas
from foveate.world.scene import Box, Draft, Options, Picture, Question
from foveate.world.vocabulary import COLOURS

SIDE = 64
PAINTS = {
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
FORMS = ("circle", "rectangle", "triangle")
_WHAT = ("what shape is in the image?", "what shape is present?", "what shape does the image contain?")
_IS = (
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is a {} present?",
)
_IS_NOT = (
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
    "is no {} present?",
)


def single(rng: random.Random, options: Options) -> Draft:
    """A circle, triangle or rectangle of one of eight colours, with about ten questions, half of them yes or no."""
    form, colour = rng.choice(FORMS), rng.choice(tuple(PAINTS))
    w, h = rng.randint(9, 32), rng.randint(9, 32)
    if form != "rectangle":
        h = w
    x, y = rng.uniform(0, SIDE - w - 1), rng.uniform(0, SIDE - h - 1)
    paper = tuple(rng.randint(226, 255) for _ in range(3))

    def ask() -> list[Question]:
        def turn(question: str, answer: str, chance: float) -> Question:
            return Question("shape", ((question, answer),), chance, 1, "single", True)

        asked = [
            turn(rng.choice(("what color is the shape?", "what is the color of the shape?")), colour, 1 / 8),
            turn(rng.choice((f"what color is the {form}?", f"what is the color of the {form}?")), colour, 1 / 8),
            turn(f"what is the {colour} shape?", form, 1 / 3),
            turn(rng.choice(_WHAT), form, 1 / 3),
        ]
        for true, names, suffix in ((form, FORMS, ""), (colour, tuple(PAINTS), " shape")):
            for truly in (True, False, True, False)[: 2 if suffix == "" else 4]:
                name = true if truly else rng.choice([n for n in names if n != true])
                denied = rng.random() < 0.5
                text = rng.choice(_IS_NOT if denied else _IS).format(name + suffix)
                asked.append(turn(text, "yes" if truly != denied else "no", 1 / 2))
        return asked

    def paint() -> Picture:
        canvas = Canvas(paper, options.size, (SIDE, SIDE))
        k = canvas.k
        box = (x * k, y * k, (x + w) * k, (y + h) * k)
        if form == "circle":
            canvas.pen.ellipse(box, fill=PAINTS[colour])
        elif form == "rectangle":
            canvas.pen.rectangle(box, fill=PAINTS[colour])
        else:
            canvas.pen.polygon(
                [((box[0] + box[2]) / 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=PAINTS[colour]
            )
        shape = {"rectangle": "square"}.get(form, form)
        known = colour if colour in COLOURS else None
        return [canvas.array()], [[Box(box[0], box[1], box[2] + 1, box[3] + 1, shape, known)]]

    truth = {"shape": form, "colour": colour, "size": [w // 4, h // 4], "at": [int(x // 4), int(y // 4)]}
    return Draft(truth, ask, paint)
