"""How an answer is judged: a scorer takes the prediction and the accepted answers, and returns 0.0 to 1.0.

`exact` is the default. Benchmarks with rules of their own register a scorer in `SCORERS` and name it in their task.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from foveate.registry import Registry

Scorer = Callable[[str, Sequence[str]], float]

SCORERS = Registry("scorer", {"exact": "foveate.tasks.scores:exact_match"})

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
