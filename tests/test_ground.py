"""The ground: one registry with helpful errors, and progress that tells the truth after a resume."""

from __future__ import annotations

import pytest

from foveate.errors import FoveateError, UnknownNameError
from foveate.progress import Progress
from foveate.registry import METHODS, Registry


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'unifrom': did you mean 'uniform'.*\? known: .*fastv"):
        METHODS.get("unifrom")
    with pytest.raises(FoveateError, match=r"unknown dish 'zzzzzz': known: soup$"):
        Registry("dish", {"soup": "json:dumps"}).get("zzzzzz")


def test_an_entry_is_imported_when_it_is_asked_for() -> None:
    registry = Registry("thing", {"late": "json:dumps", "broken": "no.such.module:x"})
    assert registry.names() == ["broken", "late"]  # naming imports nothing
    assert registry.get("late")([1]) == "[1]"
    with pytest.raises(ModuleNotFoundError):
        registry.get("broken")


def test_a_name_is_given_once() -> None:
    registry = Registry("thing")

    @registry.register("one")
    def first() -> None: ...

    assert registry.get("one") is first and "one" in registry and "two" not in registry
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("one", print)


def test_the_time_left_counts_only_what_this_run_did(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("foveate.progress.time.monotonic", lambda: next(clock))
    bar = Progress("stage", 100, done=80, every=5.0)
    bar.update(90)
    assert capsys.readouterr().err == "stage 90/100 · 10 s left\n"  # 10 of 10 s, not 90 in 10 s


def test_a_quiet_bar_prints_nothing(capsys) -> None:
    bar = Progress("stage", 2, every=0.0, quiet=True)
    bar.advance()
    bar.close()
    assert capsys.readouterr().err == ""
