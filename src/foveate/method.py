"""What every method of every socket is: a frozen dataclass of its parameters that knows its name and its needs.

A method is used in three ways that mean the same: as an object (`with foveate.uniform(keep=0.5).attach(vlm): ...`),
as text (`vlm.ask(..., reduce="uniform(keep=0.5)")`) and as a line of a recipe. Neither torch nor a model is needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from foveate.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from foveate.vlm import VLM

SOCKETS = ("reduce", "cache", "weights", "decode")

_ATTACHED: ContextVar[tuple[tuple[Any, Method], ...]] = ContextVar("foveate_attached", default=())


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass is a frozen dataclass of parameters with these class attributes:

    name: what recipes write. socket: one of SOCKETS. sites: where it acts. signals: what it must be told; an entry
    "a|b" is satisfied by whichever of the two the model offers first. adapters: families it works on, ("*",) for all.
    status: "stable" or "experimental". summary: one line for `foveate methods`. shown: parameters that the text form
    gives even at their defaults.

    A value of the wrong type raises RecipeError that names method, parameter and value.
    """

    name: ClassVar[str]
    socket: ClassVar[str]
    sites: ClassVar[tuple[str, ...]] = ()
    signals: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[tuple[str, ...]] = ("*",)
    status: ClassVar[str] = "stable"
    summary: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # recipes write lists; a frozen dataclass holds tuples, so that it hashes
                object.__setattr__(self, field.name, value := tuple(value))
            if not _fits(value, hints[field.name]):
                wanted = _described(hints[field.name])
                raise RecipeError(f"{self.name}: {field.name} is {value!r}; it must be {wanted}")

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Parameter names with their defaults (`dataclasses.MISSING` where one must be given)."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Method:
        """The method with these parameters. Raises RecipeError: unknown name (with the nearest), or one missing."""
        known = cls.parameters()
        for name in params:
            if name not in known:
                raise RecipeError(f"{cls.name} has no parameter {name!r}{nearest(name, known)}")
        missing = [name for name, default in known.items() if default is dataclasses.MISSING and name not in params]
        if missing:
            raise RecipeError(f"{cls.name} needs {' and '.join(missing)}, for example {cls.name}({missing[0]}=0.5)")
        return cls(**params)

    def params(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, and those in `shown`, as plain JSON values."""
        defaults = self.parameters()
        names = dict.fromkeys([*self.shown, *defaults])
        values = {name: getattr(self, name) for name in names}
        told = {n: v for n, v in values.items() if n in self.shown or not _same(v, defaults[n])}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., parameter: value, ...} with the parameters that `params` gives."""
        return {"name": self.name, **self.params()}

    def text(self) -> str:
        """The recipe line of this method, for example "uniform(keep=0.5)"."""
        inside = ", ".join(f"{name}={format_value(value)}" for name, value in self.params().items())
        return f"{self.name}({inside})" if inside else self.name

    def carried(self) -> tuple[Method, dict[str, dict[str, Any]]]:
        """This method as a checkpoint's recipe names it, and the JSON files, by name, that stand beside the recipe."""
        return self, {}

    def found_in(self, folder: Path) -> Method:
        """The opposite of `carried`: this method as read from the recipe of a checkpoint in `folder`."""
        return self

    def check(self, vlm: VLM) -> None:
        """Raise UnsupportedError if this method cannot work on `vlm`, saying what is missing."""
        adapter = vlm.adapter
        if "*" not in self.adapters and adapter.family not in self.adapters:
            raise UnsupportedError(
                f"{self.name} does not work on {adapter.family!r} models; it works on {', '.join(self.adapters)}"
            )

    @contextmanager
    def attach(self, vlm: VLM) -> Iterator[VLM]:
        """Use this method for every request to `vlm` inside the block, in this thread or task only.

        Raises RecipeError for a weights method (it makes another model: use `Recipe.apply`), and as `check` does.
        """
        if self.socket == "weights":
            raise RecipeError(
                f"{self.name} changes weights, so it cannot be attached; use Recipe.parse(...).apply(vlm)"
            )
        self.check(vlm)
        token = _ATTACHED.set((*_ATTACHED.get(), (vlm, self)))
        try:
            yield vlm
        finally:
            _ATTACHED.reset(token)


def attached(vlm: VLM, socket: str) -> tuple[Method, ...]:
    """The methods of `socket` that are attached to `vlm` where this is called, outermost first."""
    return tuple(method for owner, method in _ATTACHED.get() if owner is vlm and method.socket == socket)


def signal_for(need: str, offered: typing.Collection[str] | typing.Callable[[str], bool]) -> str | None:
    """The first of the alternatives in `need` ("a|b") that is in `offered`, or that `offered` says yes to, or None."""
    has = offered if callable(offered) else offered.__contains__
    return next((name for name in need.split("|") if has(name)), None)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The tail of an error about an unknown name: "; did you mean 'keep'?" or the list of known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else "; it takes none"


def format_value(value: Any) -> str:
    """A parameter value in recipe text: true, none, 0.5, bare words, 'quoted' where a bare word would be misread."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(format_value(item) for item in value)}]"
    if isinstance(value, str):
        bare = value.isidentifier() and value.lower() not in ("true", "false", "none", "nan", "inf")
        return value if bare else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return repr(value)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default  # 1 and 1.0 and true are three things in a recipe


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return any(_same(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(item, inner) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (None, type(None)):
        return value is None
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    """A type hint in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(part) for part in args)
    if origin is typing.Literal:
        return " or ".join(map(format_value, args))
    if origin is tuple:
        return f"a list, each item {_described(args[0])}"
    words = {int: "an integer", float: "a number", str: "a word", bool: "true or false", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
