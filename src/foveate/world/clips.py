"""Clips of 8 to 32 frames: things that move, appear one after another, flash, and one frame that holds a digit."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from foveate.world.canvas import Canvas, Rect, Rgb, background, place
from foveate.world.pictures import cell
from foveate.world.scene import Box, Draft, Options, Picture, Question
from foveate.world.vocabulary import CANVAS, COLOURS, DIGITS, DIRECTIONS, INK_ON, RGB, SHAPES

MIN_FRAMES, MAX_FRAMES = 8, 32
MAX_FLASHES = 5
Painter = Callable[[Canvas, Any], None]
"""Draws the state of a frame; equal states look the same."""


def _length(rng: random.Random, options: Options, at_least: int = MIN_FRAMES) -> int:
    return options.frames or rng.randint(max(MIN_FRAMES, at_least), MAX_FRAMES)


def frames_of(paper: Rgb, size: int | None, states: list[tuple[Any, ...]], draw: Painter) -> Picture:
    """One picture a state, drawn by `draw(canvas, state)`; frames with equal states are drawn once and shared."""
    done: dict[tuple[Any, ...], tuple[Any, Any]] = {}
    for state in states:
        if state not in done:
            canvas = Canvas(paper, size)
            draw(canvas, state)
            done[state] = (canvas.array(), canvas.boxes)
    return [done[s][0] for s in states], [done[s][1] for s in states]


def motion(rng: random.Random, options: Options) -> Draft:
    """One to three shapes of different colours that move steadily through the whole clip; every one is asked about."""
    length = _length(rng, options)
    taken: list[Rect] = []
    movers = []
    for colour in rng.sample(COLOURS, rng.randint(1, 3)):
        way = rng.choice(tuple(DIRECTIONS))
        dx, dy = DIRECTIONS[way]
        r = rng.randint(9, 13)
        reach = rng.randint(44, 84)
        for far in (reach, 44, 32):  # a shorter way when there is no room for a long one; paths do not cross
            if spot := place(rng, taken, 2 * r + 1 + far * abs(dx), 2 * r + 1 + far * abs(dy), tries=12):
                x = spot[0] + r + (far if dx < 0 else 0)
                y = spot[1] + r + (far if dy < 0 else 0)
                movers.append((rng.choice(SHAPES), colour, way, x, y, dx * far, dy * far, r))
                break
    paper, _ = background(rng)
    truth = {
        "frames": length,
        "movers": sorted([s, c, way, cell(x, y), (abs(dx) + abs(dy)) // 16] for s, c, way, x, y, dx, dy, _ in movers),
    }

    def ask() -> list[Question]:
        asked = []
        for s, c, way, x, y, dx, dy, _ in movers:
            turn = (f"Which way does the {c} shape move?", way)
            asked.append(Question("motion", (turn,), 1 / 4, length, "way"))
            turn = (f"Where is the {c} shape at the start?", cell(x, y))
            asked.append(Question("motion", (turn,), 1 / 64, length, "start", True))
            turn = (f"Where is the {c} shape at the end?", cell(x + dx, y + dy))
            asked.append(Question("motion", (turn,), 1 / 64, length, "end", True))
            asked.append(Question("shape", ((f"What shape is {c}?", s),), 1 / 6, length, "shape", True))
        return asked

    def paint() -> Picture:
        def draw(canvas: Canvas, state: tuple[float]) -> None:
            for s, c, _, x, y, dx, dy, r in movers:
                canvas.shape(s, RGB[c], x + dx * state[0], y + dy * state[0], r, c)

        return frames_of(paper, options.size, [(i / (length - 1),) for i in range(length)], draw)

    return Draft(truth, ask, paint)


def order(rng: random.Random, options: Options) -> Draft:
    """Three to five shapes that appear one after another, each alone for two frames or more. One question is scored."""
    length = _length(rng, options)
    n = rng.randint(3, min(5, length // 2))
    colours = rng.sample(COLOURS, n)
    shapes = [rng.choice(SHAPES) for _ in colours]
    things = []
    for s, c in zip(shapes, colours):
        r = rng.randint(11, 17)
        things.append((s, c, rng.randint(r + 2, CANVAS - r - 3), rng.randint(r + 2, CANVAS - r - 3), r))
    # Each shape gets two frames; the frames left over go to shapes and to the pauses before, between and after them.
    shown, pauses = [2] * n, [0] * (n + 1)
    for _ in range(length - 2 * n):
        if rng.random() < 0.6:
            shown[rng.randrange(n)] += 1
        else:
            pauses[rng.randrange(n + 1)] += 1
    states: list[tuple[int, ...]] = []
    for i in range(n):
        states += [()] * pauses[i] + [(i,)] * shown[i]
    states += [()] * pauses[n]
    paper, _ = background(rng)
    truth = {"frames": length, "order": [[s, c, cell(x, y)] for s, c, x, y, _ in things], "shown": shown}

    def ask() -> list[Question]:
        asked = [
            Question("order", (("Which colour appears first?", colours[0]),), 1 / 6, length, "first"),
            Question("order", (("Which colour appears last?", colours[-1]),), 1 / 6, length, "last"),
        ]
        for before, after in pairwise(colours):
            turn = (f"Which colour appears right after {before}?", after)
            asked.append(Question("order", (turn,), 1 / 5, length, "after"))
        scored = rng.choice((0, 1, rng.randrange(2, len(asked))))
        asked = [q._replace(auxiliary=i != scored) for i, q in enumerate(asked)]
        for before, after in pairwise(colours):
            turn = (f"Which colour appears right before {after}?", before)
            asked.append(Question("order", (turn,), 1 / 5, length, "before", True))
        asked.append(Question("order", (("Which shape appears first?", shapes[0]),), 1 / 6, length, "shape", True))
        asked.append(Question("order", (("How many shapes appear?", str(n)),), 1 / 3, length, "many", True))
        return asked

    def paint() -> Picture:
        def draw(canvas: Canvas, state: tuple[int, ...]) -> None:
            for i in state:
                s, c, x, y, r = things[i]
                canvas.shape(s, RGB[c], x, y, r, c)

        return frames_of(paper, options.size, states, draw)

    return Draft(truth, ask, paint)


def flash(rng: random.Random, options: Options) -> Draft:
    """Two colours that flash at their places, each a uniform 0 to 5 times; a flash and a pause last 2 frames or more.

    Fewer flashes fit a clip of a given length below 18 frames; the count is then uniform up to what fits.
    """
    most = min(MAX_FLASHES, (options.frames + 2) // 4) if options.frames else MAX_FLASHES
    counts = [rng.randint(0, most) for _ in range(2)]
    length = _length(rng, options, 4 * max(counts) - 2)
    colours = rng.sample(COLOURS, 2)
    taken: list[Rect] = []
    things = []
    for colour in colours:
        r = rng.randint(13, 19)
        spot = place(rng, taken, 2 * r + 1, 2 * r + 1, tries=200)
        assert spot is not None  # two shapes always fit
        things.append((rng.choice(SHAPES), colour, spot[0] + r, spot[1] + r, r))
    timing = [_flashes(rng, k, length) for k in counts]
    states = [tuple(on[t] for on in timing) for t in range(length)]
    paper, _ = background(rng)
    truth = {"frames": length, "flashes": sorted([s, c, cell(x, y), k] for (s, c, x, y, _), k in zip(things, counts))}

    def ask() -> list[Question]:
        asked = [
            Question("event_count", ((f"How many times does the {c} shape flash?", str(k)),), 1 / 6, length, "flashes")
            for c, k in zip(colours, counts)
        ]
        c = rng.choice([c for c in COLOURS if c not in colours])
        turn = (f"How many times does the {c} shape flash?", "0")
        asked.append(Question("event_count", (turn,), 1 / 6, length, "flashes", True))
        for (s, c, x, y, _), k in zip(things, counts):
            if k:
                turn = (f"Where is the {c} shape?", cell(x, y))
                asked.append(Question("event_count", (turn,), 1 / 64, length, "where", True))
                asked.append(Question("shape", ((f"What shape is {c}?", s),), 1 / 6, length, "shape", True))
        if counts[0] != counts[1]:
            more = colours[counts[1] > counts[0]]
            turn = ("Which colour flashes more often?", more)
            asked.append(Question("event_count", (turn,), 1 / 6, length, "more", True))
        return asked

    def paint() -> Picture:
        def draw(canvas: Canvas, state: tuple[bool, ...]) -> None:
            for on, (s, c, x, y, r) in zip(state, things):
                if on:
                    canvas.shape(s, RGB[c], x, y, r, c)

        return frames_of(paper, options.size, states, draw)

    return Draft(truth, ask, paint)


def _flashes(rng: random.Random, count: int, length: int) -> list[bool]:
    """On or off for each frame: `count` runs of 2 to 4 frames with pauses of 2 or more between them."""
    on = [2] * count
    pauses = [0] + [2] * (count - 1) + [0]
    for _ in range(length - sum(on) - sum(pauses) if count else 0):
        run = rng.randrange(count)
        if on[run] < 4 and rng.random() < 0.35:
            on[run] += 1
        else:
            pauses[rng.randrange(count + 1)] += 1
    states: list[bool] = []
    for pause, run in zip(pauses, on):
        states += [False] * pause + [True] * run
    return states + [False] * (length - len(states))


def needle(rng: random.Random, options: Options) -> Draft:
    """A few shapes that stand or drift, and one single frame with a coloured sign that bears a large digit."""
    length = _length(rng, options)
    at = rng.randrange(length)
    digit = rng.choice(DIGITS)
    x, y, size = place_sign(rng)
    half_w, half_h = _half_sign(size)
    paper, _ = background(rng)
    colour = rng.choice(COLOURS)
    taken: list[Rect] = []
    shapes = []
    for c in rng.sample(COLOURS, rng.randint(0, 3)):
        r = rng.randint(8, 13)
        if spot := place(rng, taken, 2 * r + 1, 2 * r + 1):
            drift = rng.choice((0.0, 0.0, 20.0, -20.0))
            shapes.append((rng.choice(SHAPES), c, spot[0] + r, spot[1] + r, r, drift))
    states = [(i, i == at) for i in range(length)]
    truth = {
        "frames": length,
        "needle": [digit, colour, at, cell(x, y)],
        "others": sorted([s, c, cell(a, b)] for s, c, a, b, _, _ in shapes),
    }

    def ask() -> list[Question]:
        third = ("start", "middle", "end")[min(2, 3 * at // length)]
        when = ("When does the digit appear: start, middle or end?", third)
        return [
            Question("needle", (("Which digit appears in the clip?", digit),), 1 / 10, length, "digit"),
            Question("needle", (("What colour is the sign?", colour),), 1 / 6, length, "colour", True),
            Question("needle", (when,), 1 / 3, length, "when", True),
            Question("needle", (("Where is the digit?", cell(x, y)),), 1 / 64, length, "where", True),
        ]

    def paint() -> Picture:
        def draw(canvas: Canvas, state: tuple[int, bool]) -> None:
            i, now = state
            for s, c, a, b, r, drift in shapes:
                a = min(max(a + drift * i / length, r), CANVAS - r - 1)
                canvas.shape(s, RGB[c], a, b, r, c)
            if now:  # over the shapes; what it covers is not there to be seen
                canvas.boxes = [box for box in canvas.boxes if not _inside(box, canvas.k, x, y, half_w, half_h)]
                draw_sign(canvas, digit, colour, x, y, size)

        return frames_of(paper, options.size, states, draw)

    return Draft(truth, ask, paint)


def _half_sign(size: int) -> tuple[int, int]:
    """Half the width and height of the sign around a digit of that font size."""
    return round(size * 0.36), round(size * 0.44)


def place_sign(rng: random.Random) -> tuple[int, int, int]:
    """Centre and font size of a sign that lies in the picture as a whole."""
    size = rng.randint(48, 68)
    half_w, half_h = _half_sign(size)
    return rng.randint(half_w + 3, CANVAS - half_w - 3), rng.randint(half_h + 3, CANVAS - half_h - 3), size


def draw_sign(canvas: Canvas, digit: str, colour: str, x: int, y: int, size: int) -> None:
    """A plate with a large digit on it."""
    half_w, half_h = _half_sign(size)
    canvas.rect(RGB[colour], x - half_w, y - half_h, x + half_w, y + half_h, colour)
    canvas.text(digit, INK_ON[colour], x, y, size)


def _inside(box: Box, k: float, x: float, y: float, half_w: float, half_h: float) -> bool:
    """Whether the sign covers the centre of a box."""
    return abs((box.x0 + box.x1) / 2 - x * k) < half_w * k and abs((box.y0 + box.y1) / 2 - y * k) < half_h * k
