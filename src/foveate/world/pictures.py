"""Pictures of coloured shapes, of many small shapes to count, and of labels to read."""

from __future__ import annotations

import random
from itertools import combinations

from foveate.world.canvas import Canvas, Rect, background, place, text_height, text_width
from foveate.world.scene import Draft, Options, Picture, Question
from foveate.world.vocabulary import (
    CANVAS,
    CELLS,
    COLOURS,
    INK_ON,
    LIGHT_INK,
    MARK_RGB,
    ORDINALS,
    RGB,
    SHAPES,
)

Thing = tuple[str, str, float, float, int]
"""(shape, colour, centre x, centre y, radius)"""
Text = tuple[str, float, float, int]
"""(characters, centre x, centre y, font size)"""
Mark = tuple[str, int, int]
"""(digit, left, top)"""
Label = tuple[str, str, int, int, int, int, int, bool]
"""(colour, characters, left, top, width, height, font size, whether it is small text)"""

_CELL = CANVAS / CELLS
_COUNT_GRID = 7  # cells a side of the counting scenes: 49 places of 18 units
MAX_COUNT = 6
SMALL = 10
"""Font size of small text and of the mark: digits 7 to 8 pixels high at 128 px, not legible at 64 px."""


def cell(x: float, y: float) -> str:
    """The grid cell of a point as the answer of "where" questions: column, then row."""
    return f"{min(CELLS - 1, int(x // _CELL))} {min(CELLS - 1, int(y // _CELL))}"


def truth_of(things: list[Thing]) -> list[list[object]]:
    """Shapes in canonical form: sorted, on the grid, without size or jitter."""
    return sorted([s, c, int(x // _CELL), int(y // _CELL)] for s, c, x, y, _ in things)


def string_chance(length_low: int, length_high: int, alphabet: int) -> float:
    """What the best constant guess scores on strings whose length and characters are uniform."""
    return 1 / (length_high - length_low + 1) / alphabet**length_low


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` is relative to `b`, or None when that is not clear at a glance."""
    dx, dy = a[2] - b[2], a[3] - b[3]
    if max(abs(dx), abs(dy)) < 1.4 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def random_string(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def pairs_of_colour_and_shape(rng: random.Random, n: int, by_shape: bool) -> list[tuple[str, str]]:
    """n (shape, colour) pairs: the key attribute without repeats, the other independent, so that it stays a guess."""
    if by_shape:
        return [(s, rng.choice(COLOURS)) for s in rng.sample(SHAPES, n)]
    return [(rng.choice(SHAPES), c) for c in rng.sample(COLOURS, n)]


def place_things(
    rng: random.Random, pairs: list[tuple[str, str]], taken: list[Rect], low: int, high: int
) -> list[Thing]:
    """The pairs at free places with radii in low..high; a pair for which there is no room is left out."""
    things: list[Thing] = []
    for shape, colour in pairs:
        r = rng.randint(low, high)
        spot = place(rng, taken, 2 * r + 1, 2 * r + 1)
        if spot:
            things.append((shape, colour, spot[0] + r, spot[1] + r, r))
    return things


def draw_things(canvas: Canvas, things: list[Thing]) -> None:
    for s, c, x, y, r in things:
        canvas.shape(s, RGB[c], x, y, r, c)


def presence(rng: random.Random, things: list[Thing]) -> list[Question]:
    """Training-only yes/no questions, half of them yes: a colour, a shape, and a colour with a shape."""
    colours, shapes = {t[1] for t in things}, {t[0] for t in things}
    both = {(t[1], t[0]) for t in things}
    wanted = rng.choice(COLOURS), rng.choice(SHAPES)
    if rng.random() < 0.5 or len(both) < 2:
        pair = rng.choice(sorted(both))
    else:  # a colour and a shape that are both there, mostly not as one thing
        pair = (rng.choice(sorted(colours)), rng.choice(sorted(shapes)))
    found = (
        (f"a {wanted[0]} shape", wanted[0] in colours),
        (f"a {wanted[1]}", wanted[1] in shapes),
        (f"a {pair[0]} {pair[1]}", pair in both),
    )
    return [
        Question("shape", ((f"Is there {what.replace('a orange', 'an orange')}?", "yes" if yes else "no"),),
                 0.5, len(things), "presence", True)
        for what, yes in found
    ]  # fmt: skip


def scene(rng: random.Random, options: Options) -> Draft:
    """Two to six shapes, and often a large string, a small string and the tiny teal mark with a digit.

    Half of the scenes are keyed by shape (no shape twice, colours independent), half by colour. Only questions that
    name the key are scored, so that no scored question names another's answer.
    """
    by_shape = rng.random() < 0.5
    n = rng.randint(2, 6)
    taken: list[Rect] = []
    mark: Mark | None = None
    large: Text | None = None
    small: Text | None = None
    if rng.random() < 0.35:
        text, size = random_string(rng, options.alphabet, 2, 4), rng.randint(18, 24)
        w, h = text_width(text, size) + 4, text_height(size) + 4
        if spot := place(rng, taken, w, h):
            large = (text, spot[0] + w / 2, spot[1] + h / 2, size)
    if rng.random() < 0.35:
        text, size = random_string(rng, options.alphabet, 1, 2), SMALL
        w, h = text_width(text, size) + 4, text_height(size) + 4
        if spot := place(rng, taken, w, h):
            small = (text, spot[0] + w / 2, spot[1] + h / 2, size)
    if rng.random() < 0.7 and (spot := place(rng, taken, 11, 13)):
        mark = (str(rng.randrange(10)), *spot)
    things = place_things(rng, pairs_of_colour_and_shape(rng, n, by_shape), taken, 7, 14 if n < 5 else 12)
    paper, ink = background(rng)
    truth = {
        "things": truth_of(things),
        "large": large and large[0],
        "small": small and small[0],
        "mark": mark and [mark[0], cell(mark[1], mark[2])],
    }

    def ask() -> list[Question]:
        return _scene_questions(rng, things, by_shape, large, small, mark, len(options.alphabet))

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        draw_things(canvas, things)
        for text in (large, small):
            if text:
                canvas.text(text[0], ink, *text[1:])
        if mark:
            draw_mark(canvas, *mark)
        return [canvas.array()], [canvas.boxes]

    return Draft(truth, ask, paint)


def draw_mark(canvas: Canvas, digit: str, x: float, y: float) -> None:
    """The tiny mark: 11 x 13 units, 0.9 % of the picture."""
    canvas.rect(MARK_RGB, x, y, x + 11, y + 13)
    canvas.text(digit, LIGHT_INK, x + 5.5, y + 6.5, SMALL)


def _scene_questions(
    rng: random.Random,
    things: list[Thing],
    by_shape: bool,
    large: Text | None,
    small: Text | None,
    mark: Mark | None,
    letters: int,
) -> list[Question]:
    n = len(things)
    asked: list[Question] = []
    shapes = [t[0] for t in things]
    colours = [t[1] for t in things]
    places = [cell(t[2], t[3]) for t in things]
    for t in things:
        shape, colour, x, y, _ = t
        if shapes.count(shape) == 1:
            turn = (f"What colour is the {shape}?", colour)
            asked.append(Question("colour", (turn,), 1 / 6, n, "colour", not by_shape))
        if colours.count(colour) == 1:
            asked.append(Question("shape", ((f"What shape is {colour}?", shape),), 1 / 6, n, "shape", by_shape))
        name = f"the {shape}" if by_shape else f"the {colour} shape"
        asked.append(Question("relation", ((f"Where is {name}?", cell(x, y)),), 1 / 64, n, "where", True))
        if rng.random() < 0.5 and places.count(cell(x, y)) == 1:
            turn = (f"What is at {cell(x, y)}?", f"{colour} {shape}")
            asked.append(Question("shape", (turn,), 1 / 36, n, "at", True))
    clear = [(a, b, where) for a, b in combinations(rng.sample(things, n), 2) if (where := relation(a, b))]
    for a, b, where in clear[:5]:
        if by_shape:
            text = f"Where is the {a[0]} relative to the {b[0]}?"
        else:
            text = f"Where is the {a[1]} shape relative to the {b[1]} one?"
        asked.append(Question("relation", ((text, where),), 1 / 4, n, "relation"))
    if things:
        asked += presence(rng, things)
    if large:
        turn = ("What does the big text say?", large[0])
        asked.append(Question("text_large", (turn,), string_chance(2, 4, letters), len(large[0]), "plain"))
    if small:
        turn = ("What does the small text say?", small[0])
        asked.append(Question("text_small", (turn,), string_chance(1, 2, letters), len(small[0]), "plain"))
    if mark:
        asked.append(Question("mark", (("Which digit is on the mark?", mark[0]),), 1 / 10, n, "mark"))
        asked.append(Question("mark", (("Where is the mark?", cell(mark[1], mark[2])),), 1 / 64, n, "where", True))
    return asked


def count(rng: random.Random, options: Options) -> Draft:
    """Up to 18 small shapes. Three colours have independent uniform counts of 0 to 6 and are scored; all are asked."""
    chosen = rng.sample(COLOURS, 3)
    counts = {c: rng.randint(0, MAX_COUNT) for c in chosen}
    # A few shapes of a fourth colour, at no cost for the balance of the scored three.
    fourth = rng.choice([c for c in COLOURS if c not in counts])
    colours = [c for c in chosen for _ in range(counts[c])]
    colours += [fourth] * rng.randint(0, max(0, min(3, 16 - len(colours))))
    kinds = rng.sample(SHAPES, rng.randint(1, 3))
    # Few shapes may be larger: the grid is coarser then.
    grid = 5 if len(colours) <= 9 and rng.random() < 0.6 else _COUNT_GRID
    step = CANVAS / grid
    things: list[Thing] = []
    for colour, place_ in zip(colours, rng.sample(range(grid * grid), len(colours))):
        r = rng.randint(5, 9 if grid == 5 else 7)
        free = step / 2 - r - 1
        x = round((place_ % grid + 0.5) * step + rng.uniform(-free, free))
        y = round((place_ // grid + 0.5) * step + rng.uniform(-free, free))
        things.append((rng.choice(kinds), colour, x, y, r))
    paper, _ = background(rng)

    def ask() -> list[Question]:
        have = [t[1] for t in things]
        asked = [
            Question("count", ((f"How many {c} shapes are there?", str(have.count(c))),), 1 / 7, have.count(c), "count",
                     c not in counts)
            for c in COLOURS
        ]  # fmt: skip
        shapes = [t[0] for t in things]
        for s in sorted({*kinds, rng.choice(SHAPES)}):
            if shapes.count(s) <= 9:
                turn = (f"How many {s}s are there?".replace("crosss", "crosses"), str(shapes.count(s)))
                asked.append(Question("count", (turn,), 1 / 7, shapes.count(s), "count_shape", True))
        for t in rng.sample(things, min(3, len(things))):
            turn = (f"What is at {cell(t[2], t[3])}?", f"{t[1]} {t[0]}")
            if sum(cell(u[2], u[3]) == cell(t[2], t[3]) for u in things) == 1:
                asked.append(Question("shape", (turn,), 1 / 36, len(things), "at", True))
        return asked

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        draw_things(canvas, things)
        return [canvas.array()], [canvas.boxes]

    return Draft({"things": truth_of(things)}, ask, paint)


def tags(rng: random.Random, options: Options) -> Draft:
    """Labels of the six colours: large strings of 2 to 4 characters, single ones for training, tiny ones of 1 or 2."""
    plan = []
    for _ in COLOURS:
        kind = rng.random()
        if kind < 0.12:
            plan.append((1, 1, rng.randint(18, 24)))
        elif kind < 0.66:
            plan.append((2, 4, rng.randint(17, 22)))
        else:
            plan.append((1, 2, SMALL))
    return _labels(rng, options, plan)


def digits(rng: random.Random, options: Options) -> Draft:
    """Labels of the six colours with one character each, a third of them tiny: where reading starts (training only)."""
    return _labels(rng, options, [(1, 1, SMALL if rng.random() < 0.35 else rng.randint(18, 24)) for _ in COLOURS])


def _labels(rng: random.Random, options: Options, wanted: list[tuple[int, int, int]]) -> Draft:
    """One label of each colour; wanted: (shortest, longest, size) of its text."""
    plan = []
    for colour, (low, high, size) in zip(COLOURS, wanted):
        text, small = random_string(rng, options.alphabet, low, high), size == SMALL
        w = text_width(text, size) + (5 if small else rng.randint(6, 11))
        h = text_height(size) + (5 if small else rng.randint(6, 11))
        plan.append((w, h, colour, text, size, small))
    plan.sort(key=lambda p: -p[0])  # wide labels first, while there is room
    taken: list[Rect] = []
    labels: list[Label] = []
    for w, h, colour, text, size, small in plan:
        if spot := place(rng, taken, w, h):
            labels.append((colour, text, spot[0], spot[1], w, h, size, small))
    paper, _ = background(rng)
    truth = {"labels": sorted([c, t, small, cell(x + w / 2, y + h / 2)] for c, t, x, y, w, h, _, small in labels)}

    def ask() -> list[Question]:
        return _tag_questions(rng, labels, len(options.alphabet))

    def paint() -> Picture:
        canvas = Canvas(paper, options.size)
        for colour, text, x, y, w, h, size, _ in labels:
            canvas.rect(RGB[colour], x, y, x + w, y + h, colour)
            canvas.text(text, INK_ON[colour], x + w / 2, y + h / 2, size)
        return [canvas.array()], [canvas.boxes]

    return Draft(truth, ask, paint)


def _tag_questions(rng: random.Random, labels: list[Label], letters: int) -> list[Question]:
    asked: list[Question] = []
    for colour, text, x, y, w, h, _, small in labels:
        n = len(text)
        if small:
            turn = (f"What is the small {colour} text?", text)
            asked.append(Question("text_small", (turn,), string_chance(1, 2, letters), n, "label"))
        else:
            turn = (f"What does the {colour} label say?", text)
            asked.append(Question("text_large", (turn,), string_chance(2, 4, letters), n, "label", n == 1))
        skill = "text_small" if small else "text_large"
        if n > 1:
            for i in rng.sample(range(n), 1 if small else 2):
                turn = (f"What is the {ORDINALS[i]} digit of the {colour} label?", text[i])
                asked.append(Question(skill, (turn,), 1 / letters, n, "character", True))
        if rng.random() < 0.3:
            turn = (f"Where is the {colour} label?", cell(x + w / 2, y + h / 2))
            asked.append(Question("relation", (turn,), 1 / 64, n, "where", True))
        if rng.random() < 0.2:
            turn = (f"How many digits has the {colour} label?", str(n))
            asked.append(Question(skill, (turn,), 1 / 4, n, "length", True))
    return asked
