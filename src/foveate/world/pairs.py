"""Two pictures to compare, and dialogues whose last turn is understood only with the turns before it."""

from __future__ import annotations

import random

from foveate.world.canvas import Canvas, Rect, background
from foveate.world.pictures import Thing, draw_things, place_things, relation, truth_of
from foveate.world.scene import Draft, Options, Picture, Question
from foveate.world.vocabulary import CELLS, COLOURS, INK_ON, SHAPES

_WHICH = {(True, False): "first", (False, True): "second", (True, True): "both", (False, False): "neither"}


def pair(rng: random.Random, options: Options) -> Draft:
    """Two pictures; each colour is in each of them or not, independently, so that all four answers are as likely.

    Shapes are large, because several images are seen at the base resolution only.
    """
    scenes: list[list[Thing]] = []
    while len(scenes) < 2:
        colours = [c for c in COLOURS if rng.random() < 0.5]
        rng.shuffle(colours)
        taken: list[Rect] = []
        low, high = (10, 15) if len(colours) < 5 else (9, 13)
        things = place_things(rng, [(rng.choice(SHAPES), c) for c in colours], taken, low, high)
        if len(things) == len(colours):  # a shape left out would make its colour rarer than the others
            scenes.append(things)
    papers = [background(rng)[0] for _ in scenes]

    def ask() -> list[Question]:
        n = sum(map(len, scenes))
        have = [{t[1] for t in things} for things in scenes]
        asked = []
        for c in COLOURS:
            text = f"Which picture shows {_a(c)} shape: first, second, both or neither?"
            asked.append(Question("compare", ((text, _WHICH[c in have[0], c in have[1]]),), 1 / 4, n, "which"))
        for things, name in zip(scenes, ("first", "second")):
            shapes = [t[0] for t in things]
            for s, c, *_ in things:
                if shapes.count(s) == 1:
                    turn = (f"What colour is the {s} in the {name} picture?", c)
                    asked.append(Question("compare", (turn,), 1 / 6, n, "colour"))
                turn = (f"What shape is {c} in the {name} picture?", s)
                asked.append(Question("compare", (turn,), 1 / 6, n, "shape", True))
            c = rng.choice(COLOURS)
            turn = (f"Is there {_a(c)} shape in the {name} picture?", "yes" if c in have[name == "second"] else "no")
            asked.append(Question("compare", (turn,), 1 / 2, n, "presence", True))
        return asked

    def paint() -> Picture:
        canvases = [Canvas(paper, options.size) for paper in papers]
        for canvas, things in zip(canvases, scenes):
            draw_things(canvas, things)
        return [c.array() for c in canvases], [c.boxes for c in canvases]

    return Draft({"pictures": [truth_of(things) for things in scenes]}, ask, paint)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def dialogue(rng: random.Random, options: Options) -> Draft:
    """Three or four large shapes, each with a digit on it.

    "And the square?" asks for its colour after a question about a colour, for its digit after one about a digit; "it"
    is the thing of the turn before. One question of a scene is scored: the history of the others holds answers.
    """
    n = rng.randint(3, 4)
    by_shape = rng.random() < 0.5
    taken: list[Rect] = []
    if by_shape:
        wanted = [(s, rng.choice(COLOURS)) for s in rng.sample(SHAPES, n)]
    else:
        wanted = [(rng.choice(SHAPES), c) for c in rng.sample(COLOURS, n)]
    things = place_things(rng, wanted, taken, 15, 18)
    digits = [rng.choice("0123456789") for _ in things]
    paper, _ = background(rng)
    key, other = (0, 1) if by_shape else (1, 0)

    def ask() -> list[Question]:
        if len(things) < 2:
            return []

        def full(thing: Thing, about: str) -> str:
            if about == "digit":
                return f"Which digit is on the {thing[0]}?" if by_shape else f"Which digit is on the {thing[1]} shape?"
            return f"What colour is the {thing[0]}?" if by_shape else f"What shape is {thing[1]}?"

        def value(i: int, about: str) -> str:
            return digits[i] if about == "digit" else things[i][other]

        asked = []
        order = rng.sample(range(len(things)), len(things))
        for about, chance in (("other", 1 / 6), ("digit", 1 / 10)):
            for turns in {2, min(len(order), rng.choice((2, 3)))}:
                chain = rng.sample(order, turns)
                history = [(full(things[chain[0]], about), value(chain[0], about))]
                for i in chain[1:]:
                    name = f"the {things[i][key]}" if by_shape else f"the {things[i][key]} one"
                    history.append((f"And {name}?", value(i, about)))
                form = "digit" if about == "digit" else ("colour" if by_shape else "shape")
                asked.append(Question("dialogue", tuple(history), chance, turns, form))
        # "it" is the thing that the turn before asked about.
        for i in order:
            others = [j for j in order if j != i]
            j = rng.choice(others)
            if where := relation(things[i], things[j]):
                history = [(full(things[i], "other"), value(i, "other"))]
                name = f"the {things[j][key]}" if by_shape else f"the {things[j][key]} one"
                history.append((f"Where is it relative to {name}?", where))
                asked.append(Question("dialogue", tuple(history), 1 / 4, 2, "it"))
        scored = rng.randrange(len(asked))
        asked = [q._replace(auxiliary=i != scored) for i, q in enumerate(asked)]
        for i in order:
            asked.append(Question("mark", ((full(things[i], "digit"), digits[i]),), 1 / 10, n, "on", True))
            skill = "colour" if by_shape else "shape"
            asked.append(Question(skill, ((full(things[i], "other"), value(i, "other")),), 1 / 6, n, skill, True))
        return asked

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        draw_things(canvas, things)
        for (shape, colour, x, y, _), digit in zip(things, digits):
            # A ring is read on the paper inside it; the digit of a triangle sits where it is widest.
            if shape == "ring":
                ink = (255, 255, 255) if paper[0] < 128 else (0, 0, 0)
            else:
                ink = INK_ON[colour]
            canvas.text(digit, ink, x, y + (6 if shape == "triangle" else 0), 14 if shape in ("cross", "ring") else 17)
        return [canvas.array()], [canvas.boxes]

    truth = sorted([s, c, d, int(x * CELLS / 128), int(y * CELLS / 128)] for (s, c, x, y, _), d in zip(things, digits))
    return Draft({"things": truth, "by_shape": by_shape}, ask, paint)
