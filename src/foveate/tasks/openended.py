"""Open answers by the rules of MMMU: candidates and numbers parsed from a free text.

Source: MMMU, arXiv 2311.16502, evaluation utilities of MMMU-Benchmark/MMMU (as lmms-eval carries them). Kept: the text
is lower-cased before it is cut into sentences, so only line feeds cut it; numbers are rounded to two places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Candidate = str | float
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBER_FORMS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # thousands
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # powers of ten
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # the rest
)


def numbers(text: str) -> list[str]:
    """All numbers in a text, form by form."""
    return [found for form in _NUMBER_FORMS for found in form.findall(text)]


def normalise_open(text: str) -> list[Candidate]:
    """A number rounded to two places, or the lower-case text; a single character with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def key_answers(response: str) -> list[str]:
    """The shortest tail after a cue word of each line ("so ...", "is ...", in the last line also "= ..."), or all."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    found = []
    for place, line in enumerate(lines):
        cues = (*_CUES, "=") if place == len(lines) - 1 else _CUES
        tails = [line.rsplit(cue, 1)[-1].strip() for cue in cues if cue in line]
        best = ""
        for tail in tails:  # an empty tail gives way to the next, as in the official loop
            if not best or len(tail) < len(best):
                best = tail
        if best and best not in _TRIVIAL:
            found.append(best)
    return found or [response]


def parse_open(response: str) -> set[Candidate]:
    """Every candidate of a response: key answers and the numbers in them, normalised."""
    keys = key_answers(response)
    texts = [*keys, *(number for key in keys for number in numbers(key))]
    return {candidate for text in texts for candidate in normalise_open(text)}


def mmmu_open(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when a number equals a reference, or a reference stands in a text candidate."""
    wanted = [candidate for answer in answers for candidate in normalise_open(answer)]
    texts = [answer for answer in wanted if isinstance(answer, str)]
    for candidate in parse_open(prediction):
        if any(answer in candidate for answer in texts) if isinstance(candidate, str) else candidate in wanted:
            return 1.0
    return 0.0
