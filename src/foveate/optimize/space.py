"""The space that is searched: every registered method that fits the model, with the values its parameters may take.

A method declares its own ranges with a class attribute `space = {parameter: (values, mild to strong)}`, and keeps out
of the default space with `searched = False`. Without a declaration they follow from its socket: a reduction is tried
over kept fractions, a weight method with a `bits` parameter at 8 and at 4 bits, everything else as it stands.

A recipe of the space has a slot for each method that it may hold: two of reduce and of weights, one of cache. The order
of two methods of one socket is part of the recipe; pairs that cannot stand together are not in the space. The user pins
(in every recipe), forbids and adds methods or single settings.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foveate.adapters.shape import SITES
from foveate.errors import FoveateError, RecipeError
from foveate.recipe import Recipe, conflict
from foveate.registry import METHODS

if TYPE_CHECKING:
    from foveate.vlm import VLM

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
BITS = (8, 4)
PARTS = ("llm", "vision_tower", "mm_projector")
SLOTS = ("reduce", "reduce", "weights", "weights", "cache")
"""The sockets that are searched, in the order in which a recipe writes them."""
MOST_VARIANTS = 60
"""Settings of one method; a larger grid is thinned evenly."""


def ranges(method: type) -> dict[str, tuple[Any, ...]]:
    """The values to try for each parameter of a method class; parameters that are not named keep their defaults."""
    declared = getattr(method, "space", None)
    if declared is not None:
        return dict(declared() if callable(declared) else declared)
    if method.socket == "reduce" and "keep" in method.parameters():
        return {"keep": KEEPS}
    if method.socket == "weights" and "bits" in method.parameters():
        return {"bits": BITS, **({"parts": (PARTS[:1], PARTS)} if "parts" in method.parameters() else {})}
    return {}


def variants(method: type) -> list[Any]:
    """Every instance of a method class within its ranges; combinations that the method refuses are left out.

    Raises the refusal when none is left.
    """
    values, found, refusal = ranges(method), [], None
    points = list(itertools.product(*values.values()))
    for index in _evenly(len(points), MOST_VARIANTS):
        try:
            found.append(method.from_params(dict(zip(values, points[index]))))
        except RecipeError as error:
            refusal = error
    if not found and refusal:
        raise refusal
    return found


def _evenly(n: int, most: int) -> list[int]:
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


GROUPS = (16, 8, 0)
"""Sizes of a group that are tried where a method's own does not divide the inputs of a layer; 0 is one for a row."""
CALIBRATED = "calibrated: tried in the place of an uncalibrated method of as many bits or zeros; --add it to search it"


def fitting(vlm: VLM, names: Sequence[str] | None = None) -> tuple[list[type], dict[str, str]]:
    """(method classes that work on the model, {name: reason} of the others). names: default all that are registered
    and do not keep out of the search. Methods that calibrate take seconds to minutes for each setting, so that they
    come in later (`upgrades`)."""
    found, refused = [], {}
    for name in names or METHODS.names():
        method = METHODS.get(name)
        if method.socket not in SLOTS or (names is None and not getattr(method, "searched", True)):
            continue
        if names is None and getattr(method, "needs_data", False):
            refused[name] = CALIBRATED
            continue
        try:
            first, *others = variants(method)
            if settled(first, vlm) is None and not any(settled(other, vlm) for other in others):
                first.check(vlm)
            found.append(method)
        except FoveateError as error:
            refused[name] = str(error)
    return found, refused


def settled(method: Any, vlm: VLM) -> Any | None:
    """The method if it fits the model, else with smaller groups if that is what it takes (4304 inputs of a tower are no
    multiple of 32, for example), else None."""
    for group in (None, *GROUPS):
        params = {} if group is None else {"group": group}
        if params and not isinstance(getattr(method, "group", None), int):
            return None
        try:
            other = replace(method, **params) if params else method
            other.check(vlm)
        except FoveateError:
            continue
        return other
    return None


Genome = tuple[int, ...]
"""An option of each slot, by index; 0 is nothing."""


@dataclass
class Space:
    """slots: for each slot its options, texts of one method each; "" is nothing. compatible: whether two method texts
    may stand in one recipe in this order."""

    slots: list[list[str]]
    sockets: tuple[str, ...] = SLOTS
    compatible: Callable[[str, str], bool] = lambda first, second: True
    _genomes: dict[str, Genome] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Combinations, those among them that cannot stand together or say the same included."""
        total = 1
        for options in self.slots:
            total *= len(options)
        return total

    def text(self, genome: Genome) -> str | None:
        """The recipe of a genome; None when its methods cannot stand together, "" for the dense model."""
        parts = [(self.sockets[i], self.slots[i][g]) for i, g in enumerate(genome) if self.slots[i][g]]
        for (socket, first), (other, second) in itertools.combinations(parts, 2):
            if socket == other and (name_of(first) == name_of(second) or not self.compatible(first, second)):
                return None
        text = " + ".join(part for _, part in parts)
        self._genomes.setdefault(text, genome)
        return text

    def genome(self, text: str) -> Genome | None:
        """The genome of a recipe of this space, None for another one."""
        if text not in self._genomes:
            for genome in self._singles():
                self.text(genome)
            parts, slots = [part for part in text.split(" + ") if part], iter(range(len(self.slots)))
            genome = [options.index("") if "" in options else 0 for options in self.slots]
            for part in parts:
                slot = next((i for i in slots if part in self.slots[i]), None)
                if slot is None:
                    return None
                genome[slot] = self.slots[slot].index(part)
            if self.text(tuple(genome)) != text:
                return None
            self._genomes[text] = tuple(genome)
        return self._genomes[text]

    def _base(self) -> list[int]:
        return [options.index("") if "" in options else 0 for options in self.slots]

    def _singles(self) -> Iterator[Genome]:
        base = self._base()
        for slot, options in enumerate(self.slots):
            for index in range(len(options)):
                yield tuple(index if i == slot else g for i, g in enumerate(base))

    def singles(self) -> list[str]:
        """The recipes with one method beside those that are pinned."""
        return list(dict.fromkeys(text for g in self._singles() if (text := self.text(g))))

    def recipes(self, most: int, rng: random.Random) -> list[str]:
        """Up to `most` different recipes: all of a small space in order, else the singles and random ones."""
        if self.size <= most:
            every = itertools.product(*(range(len(options)) for options in self.slots))
            return list(dict.fromkeys(text for genome in every if (text := self.text(genome))))
        found = dict.fromkeys(self.singles())
        for _ in range(4 * most):
            if len(found) >= most:
                break
            text = self.text(self.draw(rng))
            if text:
                found[text] = None
        return list(found)

    def draw(self, rng: random.Random) -> Genome:
        """A random genome: in each slot nothing with probability one third, else a method, then one of its settings."""
        genome = []
        for options in self.slots:
            names = list(dict.fromkeys(name_of(option) for option in options if option))
            if "" in options and (not names or rng.random() < 1 / 3):
                genome.append(options.index(""))
                continue
            name = rng.choice(names)
            genome.append(rng.choice([i for i, option in enumerate(options) if option and name_of(option) == name]))
        return tuple(genome)


def name_of(method: str) -> str:
    """The name in a method's text."""
    return method.partition("(")[0]


def build_space(
    vlm: VLM,
    methods: Sequence[type],
    *,
    pin: Sequence[str] = (),
    forbid: Sequence[str] = (),
    add: Sequence[str] = (),
) -> Space:
    """The space of these method classes on a model.

    pin, forbid, add: names, or texts of one method with its parameters. A pinned method is in every recipe. Raises
    RecipeError (text, more pinned methods than slots), UnsupportedError (an added method that does not fit).
    """
    options: dict[str, list[str]] = {socket: [] for socket in SLOTS}
    for method in methods:
        fits = [other.text() for variant in variants(method) if (other := settled(variant, vlm))]
        options[method.socket] += dict.fromkeys(fits)
    for text in add:
        socket, settings = _settings(text, vlm)
        options[socket] += [setting for setting in settings if setting not in options[socket]]
    forbidden = [_named(text, "--forbid") for text in forbid]
    pinned: dict[str, list[list[str]]] = {socket: [] for socket in SLOTS}
    for text in pin:
        socket, settings = _settings(text, vlm)
        pinned[socket].append(settings)
    slots = []
    for socket in SLOTS:
        if pinned[socket]:
            slots.append(pinned[socket].pop(0))
        else:
            slots.append(["", *(text for text in options[socket] if not any(_matches(text, f) for f in forbidden))])
    left = next((socket for socket, texts in pinned.items() if texts), None)
    if left:
        raise RecipeError(f"--pin: more methods of the socket {left!r} than a recipe holds ({SLOTS.count(left)})")
    space = Space(slots, compatible=_compatible(vlm))
    if not any(len(options) > 1 or options[0] for options in space.slots):
        raise RecipeError("the space is empty: no method fits this model, or --forbid left none; see foveate methods")
    return space


def _fits(method: Any, vlm: VLM) -> bool:
    try:
        method.check(vlm)
    except FoveateError:
        return False
    return True


def upgrades(vlm: VLM, recipe: str, most: int) -> list[str]:
    """The recipe with its uncalibrated weight method replaced by up to `most` calibrated ones as small."""
    parsed, found = Recipe.parse(recipe), []
    free = [method for method in parsed.of("weights") if not getattr(method, "needs_data", False)]
    plain = next((m for m in free if isinstance(getattr(m, "bits", None), int) or m.name == "magnitude"), None)
    if plain is None:
        return []
    key = "sparsity" if plain.name == "magnitude" else "bits"
    for name in METHODS.names():
        method = METHODS.get(name)
        known = method.parameters()
        if method.socket != "weights" or not getattr(method, "needs_data", False) or key not in known:
            continue
        if key == "sparsity" and not getattr(method, "searched", True):
            continue
        params = {
            key: getattr(plain, key)
            for key in ("bits", "group", "sparsity", "parts")
            if key in known and hasattr(plain, key)
        }
        try:
            better = Recipe(tuple(method.from_params(params) if m is plain else m for m in parsed))
            better.check(vlm)
        except FoveateError:
            continue
        found.append(better.text())
    return found[:most]


def _one(text: str) -> Any:
    methods = Recipe.parse(text).methods
    if len(methods) != 1:
        raise RecipeError(f"{text!r} holds {len(methods)} methods; give one at a time")
    if methods[0].socket not in SLOTS:
        raise RecipeError(f"{methods[0].name} is of the socket {methods[0].socket!r}, which is not searched")
    return methods[0]


def _named(text: str, flag: str) -> str:
    """A registered name as it is, or the canonical text of one setting."""
    if "(" not in text:
        METHODS.get(text)  # an unknown name is an error
        return text
    return _one(text).text()


def _matches(option: str, pattern: str) -> bool:
    return option == pattern or ("(" not in pattern and name_of(option) == pattern)


def _settings(text: str, vlm: VLM) -> tuple[str, list[str]]:
    """(socket, settings) of a pinned method: the one that is given, or all of a name."""
    found = [_one(text)] if "(" in text else variants(METHODS.get(text))
    found[0].check(vlm)
    found = [method for method in found if _fits(method, vlm)]
    if found[0].socket not in SLOTS:
        raise RecipeError(f"{found[0].name} is of the socket {found[0].socket!r}, which is not searched")
    return found[0].socket, [method.text() for method in found]


def _compatible(vlm: VLM) -> Callable[[str, str], bool]:
    """Whether two methods of one socket may stand in one recipe in this order: the rules of `Recipe.check`, with what a
    method needs by itself worked out once, because a space holds a great many pairs."""
    methods: dict[str, Any] = {}
    places: dict[str, list[tuple[int, int]]] = {}

    def place(text: str) -> list[tuple[int, int]]:
        """Where a reduction acts, in order."""
        if text not in places:
            methods[text] = method = _one(text)
            steps = method.steps(vlm.adapter.shape) if method.socket == "reduce" else ()
            places[text] = [(SITES.index(step.site), step.layer) for step in steps]
        return places[text]

    def check(first: str, second: str) -> bool:
        own, others = place(first), place(second)
        if set(own) & set(others) or (own and others and own[0] > others[0]):
            return False
        return not conflict(methods[first], methods[second])

    return check
