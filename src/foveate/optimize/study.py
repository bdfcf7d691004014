"""The log of a search: every score of every recipe in one SQLite file, written as it comes.

A search that is killed at any moment goes on from it: what was asked is not asked again, and because a strategy depends
on what was seen and its seed alone, the search ends as if nothing had happened. The file belongs to one set of
conditions (model, questions, seed, version); under others it is an error, never a mixture.

    conditions(key, value)              events(at, text)                         costs(recipe, kind, content)
    trials(recipe, split, started)      scores(recipe, split, place, score)
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.errors import InputError

FILE = "study.db"
_TABLES = """
create table if not exists conditions (key text primary key, value text not null);
create table if not exists trials (recipe text, split text, started real, primary key (recipe, split));
create table if not exists scores (
    recipe text, split text, place integer, score real, primary key (recipe, split, place)
);
create table if not exists costs (recipe text, kind text, content text, primary key (recipe, kind));
create table if not exists events (at real, text text);
"""


class Study:
    """The log in `path`, or in memory for None. conditions: what the scores hang on; another value is an InputError.

    resumed: whether the file held scores already.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, str] | None = None) -> None:
        self.path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(":memory:" if path is None else path)
            self._db.executescript(_TABLES)
            self._check(dict(conditions or {}))
            self.resumed = self._db.execute("select count(*) from scores").fetchone()[0] > 0
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the log of the search, {path}, cannot be used: {error}; remove it, or choose -o"
            ) from None

    def _check(self, conditions: dict[str, str]) -> None:
        stored = dict(self._db.execute("select key, value from conditions"))
        for key, value in conditions.items():
            if stored and stored.get(key) != value:
                raise InputError(
                    f"{self.path} is the log of another search: its {key} is {stored.get(key)!r}, now it is {value!r}; "
                    f"remove it to start anew, or choose another -o"
                )
        with self._db:
            self._db.executemany("insert or replace into conditions values (?, ?)", conditions.items())

    def scores(self) -> dict[tuple[str, str], dict[int, float]]:
        """(recipe, split) -> {place of the question: score} of everything that was logged."""
        found: dict[tuple[str, str], dict[int, float]] = {}
        for recipe, split, place, score in self._db.execute("select recipe, split, place, score from scores"):
            found.setdefault((recipe, split), {})[place] = score
        return found

    def add(self, recipe: str, split: str, scores: Mapping[int, float]) -> None:
        """Log scores; they are on disk when this returns. Raises InputError when the disk is full."""
        rows = [(recipe, split, place, score) for place, score in scores.items()]
        self._write(
            ("insert or ignore into trials values (?, ?, ?)", [(recipe, split, time.time())]),
            ("insert or replace into scores values (?, ?, ?, ?)", rows),
        )

    def cost(self, recipe: str, kind: str) -> dict[str, Any] | None:
        """A measured cost that was logged, or None."""
        row = self._db.execute("select content from costs where recipe = ? and kind = ?", (recipe, kind)).fetchone()
        return None if row is None else json.loads(row[0])

    def add_cost(self, recipe: str, kind: str, content: Mapping[str, Any]) -> None:
        """Log a measured cost under a kind of cost."""
        self._write(("insert or replace into costs values (?, ?, ?)", [(recipe, kind, json.dumps(content))]))

    def event(self, text: str) -> None:
        """Log one line of what happened."""
        self._write(("insert into events values (?, ?)", [(time.time(), text)]))

    def events(self) -> list[str]:
        """The lines that were logged, oldest first."""
        return [text for (text,) in self._db.execute("select text from events order by rowid")]

    def _write(self, *statements: tuple[str, list[tuple[Any, ...]]]) -> None:
        try:
            with self._db:
                for statement, rows in statements:
                    self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise InputError(
                f"cannot write the log of the search, {self.path}: {error}; free space, then resume"
            ) from None

    def close(self) -> None:
        """Everything is on disk; the file is one file again."""
        self._db.close()


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values: the same values give the same text in any process."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
