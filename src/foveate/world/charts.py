"""Charts and tables: coloured bars, coloured lines over six positions, and tables of single characters."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from foveate.world.canvas import Canvas, Rgb, background
from foveate.world.pictures import cell
from foveate.world.scene import Draft, Options, Picture, Question
from foveate.world.vocabulary import CANVAS, COLOURS, RGB

TOP = 9
"""Values of bars and points are 1 to TOP."""
POSITIONS = 6
"""Points of a line chart."""


def _blend(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`share` of a and the rest of b."""
    r, g, bl = (round(x * share + y * (1 - share)) for x, y in zip(a, b))
    return r, g, bl


def _axes(canvas: Canvas, paper: Rgb, ink: Rgb, left: float, base: float, unit: float) -> None:
    """Two axes and a grid line for each value; the line of value 5 is stronger, so that values can be read off."""
    faint, strong = _blend(ink, paper, 0.16), _blend(ink, paper, 0.5)
    for value in range(1, TOP + 1):
        y = base - value * unit
        canvas.rect(strong if value == 5 else faint, left, y, CANVAS - 2, y + 1)
    canvas.rect(ink, left, base, CANVAS - 2, base + 1)
    canvas.rect(ink, left - 1, base - TOP * unit - 2, left, base + 1)


def bars(rng: random.Random, options: Options) -> Draft:
    """Three to five bars of different colours and heights 1 to 9. Scored: all values, or the tallest and shortest."""
    n = rng.randint(3, 5)
    colours = rng.sample(COLOURS, n)
    heights = rng.sample(range(1, TOP + 1), n)
    by_value = rng.random() < 0.6
    unit = rng.choice((11, 12))
    base, left = CANVAS - rng.randint(5, 10), rng.randint(6, 12)
    step = (CANVAS - left - 4) / n
    width = round(step * rng.uniform(0.5, 0.85))
    paper, ink = background(rng)

    def ask() -> list[Question]:
        asked = [
            Question("bar", ((f"What is the value of the {c} bar?", str(h)),), 1 / 9, n, "value", not by_value)
            for c, h in zip(colours, heights)
        ]
        by_height = sorted(zip(heights, colours))
        asked.append(Question("bar", (("Which bar is tallest?", by_height[-1][1]),), 1 / 6, n, "extreme", by_value))
        asked.append(Question("bar", (("Which bar is shortest?", by_height[0][1]),), 1 / 6, n, "extreme", by_value))
        (h1, c1), (h2, c2) = rng.sample(by_height, 2)
        turn = (f"Is the {c1} bar taller than the {c2} bar?", "yes" if h1 > h2 else "no")
        asked.append(Question("bar", (turn,), 1 / 2, n, "taller", True))
        asked.append(Question("bar", (("How many bars are there?", str(n)),), 1 / 3, n, "bars", True))
        return asked

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        _axes(canvas, paper, ink, left - 3, base, unit)
        for i, (colour, height) in enumerate(zip(colours, heights)):
            x = round(left + i * step)
            canvas.rect(RGB[colour], x, base - height * unit, x + width, base, colour)
        return [canvas.array()], [canvas.boxes]

    truth = {"bars": [[c, h] for c, h in zip(colours, heights)], "scale": [unit, left // 3]}
    return Draft(truth, ask, paint)


def lines(rng: random.Random, options: Options) -> Draft:
    """One to three lines over positions 1 to 6. Scored: value at a position, position of the peak, rise or fall."""
    return _lines(rng, options, _line_questions)


def plot(rng: random.Random, options: Options) -> Draft:
    """The charts of `lines`, asked for every point, its value and its place, and for whole lines (training only)."""
    return _lines(rng, options, _point_questions)


Lines = list[tuple[str, list[int], list[tuple[float, float]]]]
"""(colour, values, centres of the points in units) of each line."""


def _line_questions(rng: random.Random, chart: Lines) -> list[Question]:
    n = len(chart)
    asked: list[Question] = []
    for colour, row, _ in chart:
        trend = "rise" if row[-1] > row[0] else "fall"
        turn = (f"Does the {colour} line rise or fall overall?", trend)
        asked.append(Question("line", (turn,), 1 / 2, n, "trend"))
        turn = (f"Where is the {colour} line highest?", str(row.index(max(row)) + 1))
        asked.append(Question("line", (turn,), 1 / POSITIONS, n, "peak"))
        if row.count(min(row)) == 1:
            turn = (f"Where is the {colour} line lowest?", str(row.index(min(row)) + 1))
            asked.append(Question("line", (turn,), 1 / POSITIONS, n, "trough", True))
        for i in rng.sample(range(POSITIONS), 3):
            turn = (f"How high is the {colour} line at {i + 1}?", str(row[i]))
            asked.append(Question("line", (turn,), 1 / TOP, n, "value"))
    # Which line is highest tells that its colour is there, as the other questions do: training only.
    for i in rng.sample(range(POSITIONS), 2 if n > 1 else 0):
        column = sorted((row[i], colour) for colour, row, _ in chart)
        if column[-1][0] > column[-2][0]:
            turn = (f"Which line is highest at {i + 1}?", column[-1][1])
            asked.append(Question("line", (turn,), 1 / 6, n, "top", True))
    return asked


def _point_questions(rng: random.Random, chart: Lines) -> list[Question]:
    n = len(chart)
    asked: list[Question] = []
    for colour, row, points in chart:
        for i, (value, point) in enumerate(zip(row, points)):
            turn = (f"How high is the {colour} line at {i + 1}?", str(value))
            asked.append(Question("line", (turn,), 1 / TOP, n, "value", True))
            turn = (f"Where is the {colour} line at {i + 1}?", cell(*point))
            asked.append(Question("relation", (turn,), 1 / 64, n, "where", True))
        turn = (f"How high is the {colour} line?", " ".join(map(str, row)))
        asked.append(Question("line", (turn,), 0.0, n, "values", True))
    return asked


def _lines(rng: random.Random, options: Options, questions: Callable[[random.Random, Lines], list[Question]]) -> Draft:
    n = rng.randint(1, 3)
    colours = rng.sample(COLOURS, n)
    values: list[list[int]] = []
    while len(values) < n:
        row = _walk(rng)
        if all(a != b for other in values for a, b in zip(row, other)):  # no point hides another
            values.append(row)
    unit = 11
    base, left = CANVAS - 16, rng.randint(7, 11)
    step = (CANVAS - left - 12) / (POSITIONS - 1)
    paper, ink = background(rng)
    spots = [[(left + 4 + i * step, base - v * unit) for i, v in enumerate(row)] for row in values]

    def ask() -> list[Question]:
        return questions(rng, list(zip(colours, values, spots)))

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        _axes(canvas, paper, ink, left - 2, base, unit)
        for i in range(POSITIONS):
            canvas.text(str(i + 1), ink, left + 4 + i * step, base + 9, 12)
        for colour, points in zip(colours, spots):
            canvas.line(RGB[colour], points, 2)
            for x, y in points:
                canvas.shape("circle", RGB[colour], x, y, 3, colour)
        return [canvas.array()], [canvas.boxes]

    return Draft({"lines": sorted([c, *row] for c, row in zip(colours, values))}, ask, paint)


def _walk(rng: random.Random) -> list[int]:
    """Six values 1 to 9 with one peak at a uniform place and ends that differ by 3 or more, rising half of the time."""
    peak = rng.randrange(POSITIONS)
    while True:
        row = [rng.randint(1, TOP) for _ in range(POSITIONS)]
        at = row.index(max(row))
        row[at], row[peak] = row[peak], row[at]
        if row.count(row[peak]) == 1 and abs(row[0] - row[-1]) >= 3:
            return row


class Table(NamedTuple):
    """A table's cells, its row headers (None: numbers), and where everything stands, in units."""

    cells: list[list[str]]
    heads: list[str] | None
    left: int
    top: int
    width: int
    height: int
    size: int
    paper: Rgb
    ink: Rgb

    @property
    def rows(self) -> int:
        return len(self.cells)

    @property
    def columns(self) -> int:
        return len(self.cells[0])

    def head(self, row: int) -> str:
        """What questions call a row."""
        return self.heads[row] if self.heads else str(row + 1)

    def centre(self, row: int, column: int) -> tuple[float, float]:
        """The middle of a cell; row or column -1 is a header."""
        x = _HEAD / 2 if column < 0 else _HEAD + (column + 0.5) * self.width
        y = _HEAD / 2 if row < 0 else _HEAD + (row + 0.5) * self.height
        return self.left + x, self.top + y


_HEAD = 20
"""Units of a row's or a column's header."""


def layout_table(rng: random.Random, options: Options, rows: int, columns: int) -> Table:
    """A table of that shape with random cells, headers and place."""
    cells = [[rng.choice(options.alphabet) for _ in range(columns)] for _ in range(rows)]
    heads = rng.sample(COLOURS, rows) if rng.random() < 0.4 else None
    w = min(34, (CANVAS - _HEAD - 6) // columns) - rng.randint(0, 3)
    h = min(30, (CANVAS - _HEAD - 6) // rows) - rng.randint(0, 3)
    left = rng.randint(2, CANVAS - _HEAD - columns * w - 3)
    top = rng.randint(2, CANVAS - _HEAD - rows * h - 3)
    return Table(cells, heads, left, top, w, h, rng.randint(18, 22), *background(rng))


def draw_table(canvas: Canvas, plan: Table) -> None:
    left, top, w, h, paper, ink = plan.left, plan.top, plan.width, plan.height, plan.paper, plan.ink
    shade, rule = _blend(ink, paper, 0.25), _blend(ink, paper, 0.6)
    right, bottom = left + _HEAD + plan.columns * w, top + _HEAD + plan.rows * h
    canvas.rect(shade, left, top, right, top + _HEAD)
    canvas.rect(shade, left, top, left + _HEAD, bottom)
    for r in range(plan.rows):
        y = top + _HEAD + r * h
        if plan.heads:
            canvas.rect(RGB[plan.heads[r]], left + 1, y + 1, left + _HEAD, y + h, plan.heads[r])
        else:
            canvas.text(plan.head(r), ink, *plan.centre(r, -1), 15)
        for c in range(plan.columns):
            canvas.text(plan.cells[r][c], ink, *plan.centre(r, c), plan.size)
    for c in range(plan.columns):
        canvas.text(str(c + 1), ink, *plan.centre(-1, c), 15)
    for x in [left] + [left + _HEAD + c * w for c in range(plan.columns + 1)]:
        canvas.rect(rule, x, top, x + 1, bottom + 1)
    for y in [top] + [top + _HEAD + r * h for r in range(plan.rows + 1)]:
        canvas.rect(rule, left, y, right + 1, y + 1)


def table(rng: random.Random, options: Options) -> Draft:
    """2 to 4 rows and columns of single characters; rows have numbers or colours as headers. Every cell is asked."""
    plan = layout_table(rng, options, rng.randint(2, 4), rng.randint(2, 4))
    rows, columns = plan.rows, plan.columns

    def ask() -> list[Question]:
        spots = [(r, c) for r in range(rows) for c in range(columns)]
        asked = []
        for r, c in rng.sample(spots, min(len(spots), 12)):
            turn = (f"What is in row {plan.head(r)}, column {c + 1}?", plan.cells[r][c])
            asked.append(Question("table", (turn,), 1 / len(options.alphabet), rows * columns, "cell"))
        asked.append(Question("table", (("How many rows are there?", str(rows)),), 1 / 3, rows, "rows", True))
        turn = ("How many columns are there?", str(columns))
        asked.append(Question("table", (turn,), 1 / 3, columns, "columns", True))
        return asked

    def paint() -> Picture:
        canvas = Canvas(plan.paper, options.size)
        draw_table(canvas, plan)
        return [canvas.array()], [canvas.boxes]

    return Draft({"cells": plan.cells, "heads": plan.heads or []}, ask, paint)
