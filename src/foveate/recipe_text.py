"""The one-line form of a recipe: `uniform(keep=0.5) + rtn(bits=4, parts=[llm, vision_tower]) + int8`.

    recipe := method ("+" method)*          method := name [ "(" [name "=" value ("," name "=" value)*] ")" ]
    value  := number | true | false | none | word | 'text' | "text" | "[" [value ("," value)*] "]"

Every error is a RecipeError that names the column (from 1) and, for an unknown name, the nearest known one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, NoReturn

from foveate.errors import FoveateError, RecipeError
from foveate.method import Method, nearest
from foveate.registry import METHODS

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))|(?P<word>[A-Za-z_][\w-]*)"
    r"|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<sign>[-+(),=\[\]])"
)
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


def parse_recipe(text: str) -> tuple[Method, ...]:
    """The methods that `text` names; none for an empty text or "none"."""
    return _Parser(text).recipe()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._at = text, [], 0
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                self._fail(position + 1, f"{text[position]!r} is not expected")
            if match.lastgroup != "space":
                self._tokens.append(_Token(str(match.lastgroup), match.group(), position + 1))
            position = match.end()
        self._tokens.append(_Token("end", "", len(text) + 1))

    def recipe(self) -> tuple[Method, ...]:
        words = [token.text for token in self._tokens[:-1]]
        if not words or words == ["none"]:
            return ()
        methods = [self._method()]
        while self._next.kind != "end":
            self._sign("+", "'+' and another method, or the end")
            methods.append(self._method())
        return tuple(methods)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._next
        self._at += token.kind != "end"
        return token

    def _method(self) -> Method:
        name = self._word("the name of a method")
        try:
            cls = METHODS.get(name.text)
        except FoveateError as error:
            self._fail(name.column, str(error))
        params: dict[str, Any] = {}
        if self._next.text == "(":
            self._take()
            while self._next.text != ")":
                key = self._word(f"a parameter of {name.text}, or ')'")
                if key.text not in cls.parameters():
                    self._fail(
                        key.column,
                        f"{name.text} has no parameter {key.text!r}{nearest(key.text, cls.parameters())}",
                    )
                if key.text in params:
                    self._fail(key.column, f"{key.text} is given twice")
                self._sign("=", f"'=' after {key.text!r}")
                params[key.text] = self._value()
                if self._next.text != ")":
                    self._sign(",", "',' or ')'")
            self._take()
        try:
            return cls.from_params(params)
        except RecipeError as error:
            self._fail(name.column, str(error))

    def _value(self) -> Any:
        token = self._take()
        if token.kind == "number":
            return float(token.text) if any(c in token.text for c in ".eE") else int(token.text)
        if token.kind == "word":
            return _WORDS.get(token.text.lower(), token.text)
        if token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        if token.text == "[":
            items: list[Any] = []
            while self._next.text != "]":
                items.append(self._value())
                if self._next.text != "]":
                    self._sign(",", "',' or ']'")
            self._take()
            return items
        self._fail(token.column, f"a value is expected, found {_shown(token)}")

    def _word(self, wanted: str) -> _Token:
        token = self._take()
        if token.kind != "word":
            self._fail(token.column, f"{wanted} is expected, found {_shown(token)}")
        return token

    def _sign(self, sign: str, wanted: str) -> None:
        token = self._take()
        if token.text != sign or token.kind != "sign":
            self._fail(token.column, f"{wanted} is expected, found {_shown(token)}")

    def _fail(self, column: int, message: str) -> NoReturn:
        raise RecipeError(f"recipe {self._text!r}, column {column}: {message}")


def _shown(token: _Token) -> str:
    return "the end" if token.kind == "end" else repr(token.text)
