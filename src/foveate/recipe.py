"""`Recipe`: an ordered list of methods from all sockets. Its text, YAML and JSON forms are the same thing.

vlm = Recipe.parse("uniform(keep=0.5) + rtn(bits=4) + int8").apply(vlm)
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.adapters.shape import SITES
from foveate.errors import CheckpointError, FoveateError, RecipeError
from foveate.method import Method
from foveate.recipe_text import parse_recipe
from foveate.registry import METHODS

if TYPE_CHECKING:
    from torch import nn

    from foveate.vlm import VLM

FILE = "recipe.json"


def methods() -> list[dict[str, Any]]:
    """Every registered method: name, socket, sites, signals, adapters, status, summary; by socket and name."""
    found = [METHODS.get(name) for name in METHODS.names()]
    keys = ("name", "socket", "sites", "signals", "adapters", "status", "summary")
    rows = [{key: _plain(getattr(method, key)) for key in keys} for method in found]
    return sorted(rows, key=lambda row: (row["socket"], row["name"]))


@dataclass(frozen=True)
class Recipe:
    """Methods in the order in which they apply. An empty recipe is falsy and leaves a model as it is."""

    methods: tuple[Method, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """From one line, as `foveate.recipe_text` describes it. Raises RecipeError that names the column."""
        return cls(parse_recipe(text))

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """From `to_dict`, or what YAML and JSON files hold: text, or a list of texts and {"name": ..., key: value}.

        A list entry may also be {name: {key: value}}. Raises RecipeError.
        """
        if isinstance(data, dict):
            if "methods" not in data and "recipe" not in data:
                raise RecipeError(f"a recipe file needs the key 'methods'; found {', '.join(map(str, data)) or 'none'}")
            data = data["methods"] if "methods" in data else data["recipe"]
        if isinstance(data, str):
            return cls.parse(data)
        if not isinstance(data, list):
            raise RecipeError(f"a recipe is a text or a list of methods, not {type(data).__name__}")
        return cls(tuple(method for entry in data for method in _entry(entry)))

    def text(self) -> str:
        """The one-line form; `parse` reads it back."""
        return " + ".join(method.text() for method in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """{"methods": [{"name": ..., parameter: value}, ...]}; most parameters at their defaults are left out."""
        return {"methods": [method.to_dict() for method in self.methods]}

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    def __add__(self, other: Recipe) -> Recipe:
        return Recipe(self.methods + other.methods)

    def of(self, socket: str) -> tuple[Any, ...]:
        """Its methods of one socket, in order."""
        return tuple(method for method in self.methods if method.socket == socket)

    def without(self, socket: str) -> Recipe:
        """The same without its methods of one socket."""
        return Recipe(tuple(method for method in self.methods if method.socket != socket))

    # ---- on a model

    def check(self, vlm: VLM) -> None:
        """Raise RecipeError or UnsupportedError if this cannot be applied to `vlm`, beside what was applied before."""
        whole = vlm.recipe + self
        for first, second in combinations(whole.methods, 2):
            reason = conflict(first, second)
            if reason:
                way_out = "turn them round" if "order" in reason else "drop one of them"
                raise RecipeError(f"{first.text()} and {second.text()} {reason}; {way_out}")
        check_reducers(whole.of("reduce"), vlm)
        for method in self.methods:
            if method.socket != "reduce":
                method.check(vlm)

    def apply(self, vlm: VLM, *, quiet: bool = False, state: Path | None = None, progress: bool = False) -> VLM:
        """A new VLM with this recipe on top; `vlm` stays as it is. Prints the effect on standard error.

        Copy on write: layers that no method replaces share their tensors with `vlm`, so train neither of the two while
        the other is in use. state: a folder from which a calibration that was killed is resumed (see
        `foveate.weights.calibrate`). progress: show that of a calibration even when `quiet`. Raises as `check`, and as
        `calibrate.compress_`.
        """
        from foveate.vlm import VLM

        self.check(vlm)
        model = vlm.model
        if self.of("weights"):
            shared = [*model.parameters(), *model.buffers()]
            model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
        after = VLM(vlm.adapter.with_model(model), vlm.name, vlm.recipe + self)
        if self.of("weights"):
            from foveate.weights.calibrate import compress_

            after.calibration = {
                **vlm.calibration,
                **compress_(after, self.of("weights"), state=state, quiet=quiet and not progress),
            }
        if self and not quiet:
            from foveate.effect import effect

            print(effect(vlm, after).text(), file=sys.stderr)
        return after

    def prepare_(self, parts: dict[str, nn.Module]) -> None:
        """Give the parts of an empty model the layers that this recipe's checkpoint has tensors for."""
        for method in self.of("weights"):
            method.prepare_(parts)

    # ---- in a checkpoint

    def to_json(self, family: str) -> dict[str, Any]:
        """The content of recipe.json in a checkpoint of `family`."""
        from foveate import __version__

        told = Recipe(tuple(method.carried()[0] for method in self.methods))
        return {"foveate": __version__, "family": family, "recipe": told.text(), **told.to_dict()}

    def files(self) -> dict[str, dict[str, Any]]:
        """The JSON files, by name, that its methods keep in a checkpoint."""
        return {name: content for method in self.methods for name, content in method.carried()[1].items()}

    @classmethod
    def restore(cls, folder: Path, family: str) -> Recipe:
        """The recipe that a checkpoint of `family` was saved with, empty if none. Raises CheckpointError."""
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(data, dict) and data.get("family", family) != family:
                raise RecipeError(f"it was made for {data['family']!r} models, the checkpoint is {family!r}")
            return cls(tuple(method.found_in(folder) for method in cls.from_dict(data)))
        except (OSError, ValueError, FoveateError) as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from None


def conflict(first: Method, second: Method) -> str:
    """Why two methods cannot stand in one recipe, or ""."""
    if first.socket != second.socket:
        reducer, cache = (first, second) if first.socket == "reduce" else (second, first)
        if "cache" in reducer.sites and reducer.socket == "reduce" and getattr(cache, "evicts", False):
            return f"do not go together: {reducer.name} chooses among cached tokens, {cache.name} forgets some"
        return ""
    if first.socket == "cache":
        return "are both caches, and a request has one"
    if first.socket == "weights":
        part = next((part for part in first.parts if part in second.parts), None)
        if part and first.exclusive == second.exclusive:
            return f"both change the {first.exclusive} of {part}"
        from foveate.weights.base import ORDER

        if part and ORDER.index(first.exclusive) > ORDER.index(second.exclusive):
            return f"change {part} in an order that cannot work: {' before '.join(ORDER)}"
    return ""


def check_reducers(reducers: Sequence[Any], vlm: VLM) -> None:
    """Raise UnsupportedError or RecipeError if these reductions cannot work on `vlm`, one after the other."""
    shape = vlm.adapter.shape
    for method in reducers:
        method.check(vlm)
    acts = [[(SITES.index(step.site), step.layer) for step in method.steps(shape)] for method in reducers]
    for (first, own), (second, others) in combinations(zip(reducers, acts), 2):
        if both := sorted(set(own) & set(others)):
            site, layer = SITES[both[0][0]], both[0][1]
            where = f"layer {layer} of site {site}" if site in ("encoder", "llm") else f"site {site}"
            raise RecipeError(f"{first.text()} and {second.text()} both reduce at {where}; drop one of them")
        if own and others and own[0] > others[0]:
            raise RecipeError(
                f"{second.name} acts at {SITES[others[0][0]]}, before {first.name} at {SITES[own[0][0]]}; "
                f"write {second.name} first"
            )


def _entry(entry: Any) -> tuple[Method, ...]:
    """The methods of one list entry."""
    if isinstance(entry, str):
        return parse_recipe(entry)
    if not isinstance(entry, dict):
        raise RecipeError(f"{entry!r} is no method; write a text or {{'name': ...}}")
    if "name" in entry:
        params = {key: value for key, value in entry.items() if key != "name"}
        return (_method(entry["name"], params),)
    if len(entry) != 1:
        raise RecipeError(f"a method needs the key 'name'; found {', '.join(map(str, entry)) or 'none'}")
    ((name, params),) = entry.items()
    return (_method(name, params or {}),)


def _method(name: Any, params: Any) -> Method:
    if not isinstance(name, str) or not isinstance(params, dict):
        raise RecipeError(f"{name!r} with {params!r} is no method; write {{'name': ..., parameter: value}}")
    return METHODS.get(name).from_params(params)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
