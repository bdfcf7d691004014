"""Training-only scenes that lead up to a scored skill: signs in short clips, and small tables read in every way.

Nothing here is scored. A skill that asks for one thing in many places (a digit in one frame of 32, one cell of 16)
does not start by itself; these scenes ask for the same thing where there is less to search, many times a scene.
"""

from __future__ import annotations

import random

from foveate.world.canvas import Canvas, background
from foveate.world.charts import draw_table, layout_table
from foveate.world.clips import MAX_FRAMES, MIN_FRAMES, draw_sign, frames_of, place_sign
from foveate.world.pictures import cell
from foveate.world.scene import Draft, Options, Picture, Question
from foveate.world.vocabulary import COLOURS, DIGITS


def signs(rng: random.Random, options: Options) -> Draft:
    """One to four signs like the needle's, each alone for 1 to 4 frames of a clip of 2 to 32 frames (training only)."""
    n = rng.choice((1, 1, 1, 2, 3, 4))
    length = options.frames or (
        rng.randint(max(2, n), 8) if rng.random() < 0.7 else rng.randint(MIN_FRAMES, MAX_FRAMES)
    )
    shown, pauses = [1] * n, [0] * (n + 1)
    for _ in range(length - n):
        k = rng.randrange(n)
        if shown[k] < 4 and rng.random() < 0.4:
            shown[k] += 1
        else:
            pauses[rng.randrange(n + 1)] += 1
    states: list[tuple[int, ...]] = []
    for i in range(n):
        states += [()] * pauses[i] + [(i,)] * shown[i]
    states += [()] * pauses[n]
    plates = [(rng.choice(DIGITS), colour, *place_sign(rng)) for colour in rng.sample(COLOURS, n)]
    paper, _ = background(rng)
    truth = {"frames": length, "signs": [[p[0], p[1], cell(p[2], p[3])] for p in plates], "shown": shown}

    def ask() -> list[Question]:
        asked = []
        for digit, colour, x, y, _ in plates:
            turn = (f"Which digit is on the {colour} sign?", digit)
            asked.append(Question("needle", (turn,), 1 / 10, length, "on", True))
            turn = (f"Where is the {colour} sign?", cell(x, y))
            asked.append(Question("needle", (turn,), 1 / 64, length, "where", True))
        if n == 1:
            digit, colour, x, y, _ = plates[0]
            for text, answer, chance in (
                ("Which digit appears in the clip?", digit, 1 / 10),
                ("What colour is the sign?", colour, 1 / 6),
                ("Where is the digit?", cell(x, y), 1 / 64),
            ):
                asked.append(Question("needle", ((text, answer),), chance, length, "needle", True))
        else:
            asked.append(
                Question("needle", (("Which digit appears first?", plates[0][0]),), 1 / 10, length, "first", True)
            )
            asked.append(
                Question("needle", (("Which digit appears last?", plates[-1][0]),), 1 / 10, length, "last", True)
            )
        return asked

    def paint() -> Picture:
        def draw(canvas: Canvas, state: tuple[int, ...]) -> None:
            for i in state:
                draw_sign(canvas, *plates[i])

        return frames_of(paper, options.size, states, draw)

    return Draft(truth, ask, paint)


def grid(rng: random.Random, options: Options) -> Draft:
    """Tables, half of them of 2 x 2, asked for every cell, its place, and whole rows and columns (training only)."""
    small = rng.random() < 0.5
    shape = (2, 2) if small else (rng.randint(2, 4), rng.randint(2, 4))
    plan = layout_table(rng, options, *shape)

    def ask() -> list[Question]:
        asked = []
        rows, columns = range(plan.rows), range(plan.columns)
        for r in rows:
            for c in columns:
                where = f"row {plan.head(r)}, column {c + 1}?"
                turn = (f"What is in {where}", plan.cells[r][c])
                asked.append(
                    Question("table", (turn,), 1 / len(options.alphabet), plan.rows * plan.columns, "cell", True)
                )
                turn = (f"Where is {where}", cell(*plan.centre(r, c)))
                asked.append(Question("relation", (turn,), 1 / 64, plan.rows * plan.columns, "where", True))
        for r in rows:
            turn = (f"What is in row {plan.head(r)}?", " ".join(plan.cells[r]))
            asked.append(Question("table", (turn,), 0.0, plan.columns, "row", True))
        for c in columns:
            turn = (f"What is in column {c + 1}?", " ".join(plan.cells[r][c] for r in rows))
            asked.append(Question("table", (turn,), 0.0, plan.rows, "column", True))
        return asked

    def paint() -> Picture:
        canvas = Canvas(plan.paper, options.size)
        draw_table(canvas, plan)
        return [canvas.array()], [canvas.boxes]

    return Draft({"cells": plan.cells, "heads": plan.heads or []}, ask, paint)
