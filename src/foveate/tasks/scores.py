"""How an answer is judged: a scorer takes the prediction and the accepted answers, and returns 0.0 to 1.0.

`exact` is the default. Tools that name the same metric differ, so each rule set has a name of its own in `SCORERS`: the
bare name is the benchmark's official rule, a suffix names the tool whose variant it is. A task names its scorer, a row
of the user's data overrides it (`"scorer": "anls"`), and `--scorer` overrides both.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from foveate.errors import InputError
from foveate.registry import Registry

Scorer = Callable[..., float]
"""(prediction, accepted answers) -> score; a scorer with a parameter `choices` is told {letter: text} as well."""

_HERE = "foveate.tasks"
SCORERS = Registry(
    "scorer",
    {
        "exact": f"{_HERE}.scores:exact_match",
        "vqa": f"{_HERE}.vqa:vqa_accuracy",
        "vqa-v2": f"{_HERE}.vqa:vqa_accuracy_v2",
        "vqa-vlmevalkit": f"{_HERE}.vqa:vqa_accuracy_vlmevalkit",
        "anls": f"{_HERE}.strings:anls",
        "relaxed": f"{_HERE}.strings:relaxed_accuracy",
        "relaxed-vlmevalkit": f"{_HERE}.strings:relaxed_accuracy_vlmevalkit",
        "ocrbench": f"{_HERE}.strings:ocrbench",
        "ocrbench-hme": f"{_HERE}.strings:ocrbench_hme",
        "mcq": f"{_HERE}.choices:mcq",
        "mcq-lmms": f"{_HERE}.choices:mcq_lmms",
        "mcq-mmbench": f"{_HERE}.choices:mcq_mmbench",
        "mcq-mmmu": f"{_HERE}.choices:mcq_mmmu",
        "mcq-scienceqa": f"{_HERE}.choices:mcq_scienceqa",
        "mcq-videomme": f"{_HERE}.choices:mcq_videomme",
        "mmmu-open": f"{_HERE}.openended:mmmu_open",
        "pope": f"{_HERE}.yesno:pope",
        "pope-lmms": f"{_HERE}.yesno:pope_lmms",
        "pope-vlmevalkit": f"{_HERE}.yesno:pope_vlmevalkit",
    },
)

_ARTICLES = frozenset({"a", "an", "the"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NOT_IN_A_NUMBER = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<![^\s])-(?!\d)|[^\w\s.\-+]|_")


def normalise(text: str) -> str:
    """The form in which answers are compared.

    1. Unicode NFKC, case folded. 2. Punctuation is dropped; the point inside a number, hyphens inside words and a sign
    before a number stay; commas between thousands go ("1,000" = "1000"). 3. The articles a, an, the are dropped as
    whole words, unless nothing else would be left (a sign that reads "A" is an answer). 4. Single spaces.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = _NOT_IN_A_NUMBER.sub(" ", _THOUSANDS.sub("", text)).split()
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals any of the normalised `answers`, else 0.0."""
    found = normalise(prediction)
    return float(any(found == normalise(answer) for answer in answers))


def judge(scorer: str, prediction: str, answers: Sequence[str], choices: Mapping[str, str] | None = None) -> float:
    """The score of one answer. scorer: a name of `SCORERS`. choices: {letter: text} of a multiple-choice question.

    Raises UnknownNameError.
    """
    function = SCORERS.get(scorer)
    if _takes_choices(function):
        return float(function(prediction, answers, choices=choices))
    return float(function(prediction, answers))


@cache
def _takes_choices(function: Scorer) -> bool:
    return "choices" in inspect.signature(function).parameters


def check_row(scorer: str, choices: Any) -> dict[str, str] | None:
    """The options of a row as {letter: text}. Raises UnknownNameError (scorer) and InputError (options)."""
    SCORERS.get(scorer)
    if choices is None:
        return None
    if isinstance(choices, Mapping):
        found = {str(letter).upper(): str(text) for letter, text in choices.items()}
    elif isinstance(choices, list | tuple):
        found = {chr(ord("A") + i): str(text) for i, text in enumerate(choices)}
    else:
        raise InputError(f"choices is {choices!r}; it must be a list of texts, or an object from letters to texts")
    if not 1 < len(found) <= 26 or not all(re.fullmatch("[A-Z]", letter) for letter in found):
        raise InputError(f"choices must be 2 to 26 options under single letters; found {', '.join(found) or 'none'}")
    return found
