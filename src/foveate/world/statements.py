"""A small grammar of statements about three boxes of things, evaluated on the ground truth.

A form picks what it is about from the scene, counts it, and then words a quantity so that the statement is true or
false as wanted: numbers lie near the true ones, and each form is true half of the time. Wordings that people read in
two ways ("there are two ..." where there are three) are used only where both readings agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from foveate.world.words import (
    BOX_COLOURS,
    Box,
    Quantity,
    article,
    bare,
    least,
    noun,
    number,
    place_words,
    quantity,
)

if TYPE_CHECKING:
    pass

# ---- properties of one box or tower: words that follow "with", and a test that may abstain

Property = tuple[str, Callable[[Box], "bool | None"]]


def _both(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def box_property(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Property:
    """Something that a box may hold, worded after a box of the scene."""
    model = rng.choice(boxes)
    kind = rng.random()
    name = rng.choice(("item", "block")) if towers else rng.choice(("item", "object"))
    if kind < 0.12:
        return _listed(rng, model, towers, name)
    if kind < 0.4:
        thing = noun(rng, model, towers)
        q = quantity(rng, thing.count(model), top=6)
        return f"{q.words} {thing.worded(q.plural)}", lambda b: q.fits(thing.count(b))
    if kind < 0.55:
        c1, c2 = rng.sample(BOX_COLOURS, 2)
        words, tests = [], []
        for c in (c1, c2):
            thing = noun(rng, [i for i in model if i.colour == c] or model, towers, place=False)
            q = quantity(rng, thing.count(model), top=5)
            words.append(f"{q.words} {thing.worded(q.plural)}")
            tests.append((q, thing))
        if tests[0][1].singular == tests[1][1].singular:
            return box_property(rng, boxes, towers)
        return " and ".join(words), lambda b: _both(*(q.fits(thing.count(b)) for q, thing in tests))
    if kind < 0.63:
        c = rng.choice(model).colour
        return rng.choice((f"only {c} {name}s", f"{name}s of only {c} color")), lambda b: {i.colour for i in b} == {c}
    if kind < 0.72:
        c1, c2 = rng.sample(BOX_COLOURS, 2)
        if len(have := sorted({i.colour for i in model})) == 2 and rng.random() < 0.7:
            c1, c2 = rng.sample(have, 2)
        words_ = rng.choice((f"only {c1} and {c2} {name}s", f"{name}s of only {c1} and {c2} color"))
        return words_, lambda b: {i.colour for i in b} == {c1, c2}
    if kind < 0.82:
        n = len({i.colour for i in model}) if rng.random() < 0.7 else rng.randint(1, 3)
        words_ = {
            1: rng.choice((f"{name}s of only one color", f"all {name}s of the same color")),
            2: rng.choice((f"{name}s of 2 different colors", f"{name}s of exactly two colors")),
            3: rng.choice((f"{name}s of all 3 different colors", f"{name}s of all three colors")),
        }[n]
        # One thing alone: are its colours "the same"? Readers do not agree.
        return words_, lambda b: None if n == 1 and len(b) == 1 else len({i.colour for i in b}) == n
    if kind < 0.9 or not towers:
        q = quantity(rng, len(model), zero=False, a=False, top=8)
        if rng.random() < 0.15:
            return f"multiple {name}s", lambda b: len(b) > 1
        if not towers and rng.random() < 0.4:
            thing = noun(rng, model, towers)
            n = max(1, len(model) + rng.choice((-1, 0, 0)))
            words_ = f"exactly {number(rng, n)} {name}{'s' * (n > 1)}, one of which is a {thing.worded(False)}"
            return words_, lambda b: len(b) == n and thing.count(b) >= 1
        return f"{q.words} {name}{'s' * q.plural}", lambda b: q.fits(len(b))
    c = rng.choice((model[-1].colour, rng.choice(BOX_COLOURS)))
    if rng.random() < 0.5:
        return f"a {c} {name} on top", lambda b: b[-1].colour == c
    n = max(1, len(model) + rng.choice((-1, 0, 0, 0)))
    return (
        f"{number(rng, n)} {name}{'s' * (n > 1)} and a {c} {name} on top",
        lambda b: len(b) == n and b[-1].colour == c,
    )


def _listed(rng: random.Random, model: Box, towers: bool, name: str) -> Property:
    """A list of kinds, a number and its colours, or what some of a number of things are like."""
    kind = rng.random()
    n = max(1, len(model) + rng.choice((-1, 0, 0, 0, 1)))
    things = f"{number(rng, n)} {name}{'s' * (n > 1)}"
    if kind < 0.35:
        seen = rng.choices(model, k=3) if rng.random() < 0.85 else rng.choices(model, k=2)
        kinds = {(i.colour, i.shape) for i in seen}
        if len(kinds) > 1:
            if rng.random() < 0.4:  # one kind that may not be there
                kinds.remove(rng.choice(sorted(kinds)))
                kinds.add((rng.choice(BOX_COLOURS), rng.choice([i.shape for i in model])))
            words_ = [f"a {colour} {'block' if towers else shape}" for colour, shape in sorted(kinds)]
            rng.shuffle(words_)
            listed = " and ".join(filter(None, (", ".join(words_[:-1]), words_[-1])))
            return listed, lambda b: kinds <= {(i.colour, i.shape) for i in b}
    if kind < 0.7:
        have = sorted({i.colour for i in model})
        c1, c2 = have if len(have) == 2 and rng.random() < 0.8 else rng.sample(BOX_COLOURS, 2)
        colour = rng.choice(("color", "color", "colour"))
        words = rng.choice((f"{things} of only {c1} and {c2} {colour}", f"only {things} of {c1} and {c2} {colour}"))
        return words, lambda b: len(b) == n and {i.colour for i in b} == {c1, c2}
    thing = noun(rng, model, towers, place=False)
    k = max(1, thing.count(model) + rng.choice((-1, 0, 0, 0)))
    if k >= n:
        return things, lambda b: len(b) == n if len(b) <= n else None
    which = f"are {thing.plural}" if k > 1 else f"is a {thing.singular}"
    return f"{things}, {number(rng, k)} of which {which}", lambda b: len(b) == n and thing.count(b) == k


def tower_property(rng: random.Random, boxes: Sequence[Box]) -> Property:
    """Something that a tower may have, worded after a tower of the scene."""
    model = rng.choice(boxes)
    kind = rng.random()
    if kind < 0.42:
        at = rng.choice((0, -1))
        c = model[at].colour if rng.random() < 0.6 else rng.choice(BOX_COLOURS)
        where = rng.choice(("base", "bottom", "base")) if at == 0 else "top"
        if rng.random() < 0.12:
            return f"a {c} {where}", lambda b: b[at].colour == c
        return f"a {c} block at the {where}", lambda b: b[at].colour == c
    if kind < 0.57:
        q = quantity(rng, len(model), zero=False, a=False, top=4)
        return f"{q.words} block{'s' * q.plural}", lambda b: q.fits(len(b))
    if kind < 0.72:
        at = rng.choice((0, -1))
        c = model[at].colour if rng.random() < 0.7 else rng.choice(BOX_COLOURS)
        q = quantity(rng, len(model), zero=False, a=False, top=4)
        where = "base" if at == 0 else "top"
        words = rng.choice(
            (
                f"{q.words} block{'s' * q.plural} with a {c} block at the {where}",
                f"{q.words} block{'s' * q.plural} having a {c} block at the {where}",
                f"a {c} block at the {where} and {q.words} block{'s' * q.plural}",
            )
        )
        return words, lambda b: _both(q.fits(len(b)), b[at].colour == c)
    if kind < 0.75:
        c, n = rng.choice(model).colour, rng.choice((2, 2, 3))
        words = rng.choice((f"{number(rng, n)} {c} blocks stacked together", f"{number(rng, n)} {c} blocks together"))
        return words, lambda b: None if _run(b, c) > n else _run(b, c) == n
    if kind < 0.82 and len(model) > 1:
        i = rng.randrange(len(model) - 1)
        low, high = (model[i].colour, model[i + 1].colour) if rng.random() < 0.7 else rng.choices(BOX_COLOURS, k=2)
        word = rng.choice(("over", "on", "on top of", "above"))
        return f"a {high} block {word} a {low} block", lambda b: _on(b, high, low, word)
    return box_property(rng, boxes, True)


def _run(box: Box, colour: str) -> int:
    """The most blocks of one colour in a row."""
    return max((len(list(run)) for c, run in groupby(i.colour for i in box) if c == colour), default=0)


def _on(box: Box, high: str, low: str, word: str) -> bool | None:
    """Whether a block of colour `high` is on one of colour `low`; "above" may mean anywhere above."""
    pairs = [(a.colour, b.colour) for i, a in enumerate(box) for b in box[i + 1 :]]
    next_to = any((a.colour, b.colour) == (low, high) for a, b in pairwise(box))
    anywhere = (low, high) in pairs
    return next_to if word != "above" or next_to == anywhere else None


def _holds(prop: Property, boxes: Sequence[Box]) -> int | None:
    """In how many boxes a property holds; None when it is unclear in one."""
    marks = [prop[1](b) for b in boxes]
    return None if None in marks else sum(map(bool, marks))


# ---- forms: a statement and its truth, or None

Statement = tuple[str, "bool | None"]


def _there(rng: random.Random, plural: bool) -> str:
    return f"{rng.choice(('There', 'There', 'there'))} {'are' if plural else 'is'}"


def count_items(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    items = [i for b in boxes for i in b]
    thing = noun(rng, items, towers)
    k = thing.count(items)
    q = quantity(rng, k)
    return f"{_there(rng, q.plural)} {q.words} {thing.worded(q.plural)}", q.fits(k)


def count_boxes(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    if towers and rng.random() < 0.75:
        prop, name = tower_property(rng, boxes), "tower"
    else:
        prop, name = box_property(rng, boxes, towers), rng.choice(("box", "box", "box", "grey box", "grey square"))
    k = _holds(prop, boxes)
    if k is None:
        return "", None
    q = Quantity("a", False, least(1)) if rng.random() < 0.5 else quantity(rng, k, top=3)
    many = q.plural
    name += ("es" if name.endswith("x") else "s") * many
    verb = rng.choice(
        ("with", "with", "with", "that contain" if many else "that contains", "which have" if many else "which has")
    )
    if rng.random() < 0.12 and q.words != "no":
        start = q.words if q.words != "a" else "one"
        fits = q.fits if q.words != "a" else bare(1)
        verb = rng.choice(("have", "contain") if many else ("has", "contains"))
        return f"{start.capitalize()} {name} {verb} {prop[0]}", fits(k)
    return f"{_there(rng, many)} {q.words} {name} {verb} {prop[0]}", q.fits(k)


def every_box(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    prop = tower_property(rng, boxes) if towers and rng.random() < 0.6 else box_property(rng, boxes, towers)
    k = _holds(prop, boxes)
    if k is None:
        return "", None
    name = rng.choice(("tower", "tower", "box") if towers else ("box", "grey box", "grey box"))
    names = name + ("es" if name.endswith("x") else "s")
    start = rng.choice((f"Each {name} has", f"Each {name} contains", f"Every {name} has", f"All {names} have",
                        f"All 3 {names} have", f"All three {names} contain"))  # fmt: skip
    if rng.random() < 0.3 and prop[0].startswith("a ") and " and " not in prop[0]:
        return f"There is {prop[0]} in each {name}", k == 3
    return f"{start} {prop[0]}", k == 3


def all_items(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    """Universal statements about the things of one kind, of which there is at least one."""
    items = [i for b in boxes for i in b]
    thing = noun(rng, items, towers, place=False)
    mine = [i for i in items if thing.test(i)]
    if not mine:
        return "", None
    kind = rng.random()
    if kind < 0.3 or towers:
        if len(mine) == 1:
            return "", None
        homes = sum(any(map(thing.test, b)) for b in boxes)
        return rng.choice(
            (f"All {thing.plural} are in the same box", f"all the {thing.plural} are in one box")
        ), homes == 1
    if kind < 0.8:
        words, where = place_words(rng)
        if len(mine) == 1:
            return "", None
        if words.startswith("not"):
            start = rng.choice((f"{thing.plural} are", f"All {thing.plural} are"))
            free = sum(map(where, mine))  # "all are not": none is, or not all are? Only where both agree
            return f"{start} {words}", None if 0 < free < len(mine) else free > 0
        if rng.random() < 0.4:
            return f"{rng.choice(('None of the', 'none of the'))} {thing.plural} are {words}", not any(map(where, mine))
        return f"{rng.choice(('All', 'All the', 'all'))} {thing.plural} are {words}", all(map(where, mine))
    shape = rng.choice(mine).shape
    if thing.singular.endswith(shape):
        return "", None
    if len(mine) == 1:
        return f"The only {thing.singular} is a {shape}", mine[0].shape == shape
    return f"All {thing.plural} are {shape}s", all(i.shape == shape for i in mine)


def block_on_block(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    low, high = rng.choices(BOX_COLOURS, k=2)
    if len(tall := rng.choice(boxes)) > 1 and rng.random() < 0.4:
        i = rng.randrange(len(tall) - 1)
        low, high = tall[i].colour, tall[i + 1].colour
    if rng.random() < 0.15:
        word = rng.choice(("below", "under"))
        marks = [_on(b, low, high, "above") for b in boxes]
        text = f"a {high} block {word} a {low} block"
    else:
        word = rng.choice(("on", "on", "over", "above", "above", "on top of", "directly above"))
        marks = [_on(b, high, low, word) for b in boxes]
        text = f"a {high} block {word} a {low} block"
    if None in marks and True not in marks:
        return "", None
    k = sum(m is True for m in marks)
    if rng.random() < 0.5:
        return f"{_there(rng, False)} {text}", k > 0
    if None in marks:
        return "", None
    q = quantity(rng, k, zero=False, a=False, top=3)
    name = "towers" if q.plural else "tower"
    return f"{_there(rng, q.plural)} {q.words} {name} {rng.choice(('with', 'having'))} {text}", q.fits(k)


def base_or_top(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    """ "There are two yellow blocks as the base of a tower with at least three blocks"."""
    at = rng.choice((0, -1))
    c = rng.choice(boxes)[at].colour if rng.random() < 0.75 else rng.choice(BOX_COLOURS)
    mine = [b for b in boxes if b[at].colour == c]
    tail = ""
    if rng.random() < 0.5:
        model = rng.choice(mine or boxes)
        size = quantity(rng, len(model), zero=False, a=False, top=4)
        marks = [size.fits(len(b)) for b in mine]
        if None in marks:
            return "", None
        mine = [b for b, m in zip(mine, marks) if m]
        tail = f" with {size.words} block{'s' * size.plural}"
    q = quantity(rng, len(mine), top=3)
    where = "base" if at == 0 else "top"
    return f"{_there(rng, q.plural)} {q.words} {c} block{'s' * q.plural} as the {where} of a tower{tail}", q.fits(
        len(mine)
    )


def the_tower(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    """A definite tower: the only one of its height, or the tallest or smallest."""
    n = len(rng.choice(boxes))
    heights = [len(b) for b in boxes]
    kind = rng.random()
    if kind < 0.6 and heights.count(n) == 1:
        box, name = boxes[heights.index(n)], f"the tower with {number(rng, n)} block{'s' * (n > 1)}"
    elif kind < 0.8 and heights.count(max(heights)) == 1:
        box, name = boxes[heights.index(max(heights))], rng.choice(("the tallest tower", "the highest tower"))
    elif heights.count(min(heights)) == 1:
        box, name = boxes[heights.index(min(heights))], rng.choice(("the shortest tower", "the smallest tower"))
    else:
        return "", None
    at = rng.choice((0, -1))
    c = box[at].colour if rng.random() < 0.5 else rng.choice(BOX_COLOURS)
    where = "base" if at == 0 else "top"
    return f"{name} has a {c} block at the {where}", box[at].colour == c


def towers_alike(rng: random.Random, boxes: Sequence[Box], towers: bool) -> Statement:
    heights = [len(b) for b in boxes]
    kinds = len(set(heights))
    kind = rng.random()
    if kind < 0.3:
        c = rng.choice(rng.choice(boxes)).colour
        k = sum(all(i.colour == c for i in b) for b in boxes)
        return f"{_there(rng, False)} a {c} tower", k > 0
    if kind < 0.5:
        at = rng.randrange(1, 3)
        c = rng.choice(BOX_COLOURS)
        k = sum(len(b) > at and b[at].colour == c for b in boxes)
        return (
            f"There is a tower where the {('', 'second', 'third')[at]} block from the base is {c}",
            k > 0,
        )
    if kind < 0.65:
        words = rng.choice(("two towers with the same height", "two towers of the same height"))
        return f"There are {words}", None if kinds == 1 else kinds == 2
    if kind < 0.8:
        return rng.choice(("All towers have the same height", "all towers are of the same height")), kinds == 1
    if kind < 0.9:
        return rng.choice(("All towers have different heights", "the towers are all of different height")), kinds == 3
    tops = {b[-1].colour for b in boxes} if rng.random() < 0.5 else None
    if tops is not None:
        return "All towers have the same color at the top", len(tops) == 1
    return "All towers have the same color at the base", len({b[0].colour for b in boxes}) == 1


_SCATTER_FORMS = (count_items, count_items, count_items, count_boxes, count_boxes, every_box, all_items)
_TOWER_FORMS = (
    *(count_boxes,) * 5,
    *(block_on_block,) * 2,
    *(base_or_top,) * 2,
    count_items,
    every_box,
    the_tower,
    towers_alike,
    all_items,
)


def statements(rng: random.Random, boxes: Sequence[Box], towers: bool, n: int) -> Iterator[tuple[str, str, bool]]:
    """About n different (form, statement, truth), each wanted true or false by a coin.

    boxes: three lists of things; of towers, base first.
    """
    seen: set[str] = set()
    for _ in range(n):
        form = rng.choice(_TOWER_FORMS if towers else _SCATTER_FORMS)
        wanted = rng.random() < 0.5
        for _ in range(40):
            text, true = form(rng, boxes, towers)
            if true is wanted and text not in seen and not _empty(text):
                seen.add(text)
                yield form.__name__, _finish(rng, text), wanted
                break


def _empty(text: str) -> bool:
    """Whether a statement says next to nothing: "there is an item"."""
    return text.lower() in _EMPTY or text.endswith(("one of which is a item", "one of which is a object"))


_EMPTY = {
    f"there is {q} {name}" for q in ("a", "no") for name in ("item", "object", "shape", "block", "square")
}  # fmt: skip


def _finish(rng: random.Random, text: str) -> str:
    """Articles mended, and a full stop in half of the statements, as people write them."""
    return article(text) + "." * (rng.random() < 0.5)
