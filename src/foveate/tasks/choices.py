"""Multiple choice: which letter a free text means, by the rules of each tool.

Read in MMMU's and lmms-eval's utilities (arXiv 2311.16502), VLMEvalKit (arXiv 2407.11691), MMBench (arXiv 2307.06281),
Video-MME (arXiv 2405.21075) and ScienceQA (arXiv 2209.09513); the golden vectors come from their code. `mcq` is
VLMEvalKit's rule without its judge: deterministic, letter first, then the text of an option.

Every parser takes the response and {letter: text of the option} and returns a letter, "Z" for a refusal, or "" when it
finds none. MMMU then draws at random; here such an answer scores the expected value of the draw, so nothing is random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Choices = Mapping[str, str]

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_NEAR_END = 5
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def infer_option(response: str, choices: Choices) -> str:
    """VLMEvalKit: the only option letter among the words, if it is one of the last four (or all before it are); else
    the letter after "answer is"."""
    if _API_FAILURE in response:
        return ""
    if any(refusal in response for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", response).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _NEAR_END:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    stated = _ANSWER_IS.search(response)
    return stated[1].upper() if stated and stated[1].upper() in choices else ""


def infer_text(response: str, choices: Choices, *, bounded: bool = True) -> str:
    """The only option whose text stands in the response; bounded: not in one over twice as long as all options."""
    response = response.lower()
    if bounded and len(response) > 2 * sum(map(len, choices.values())):
        return ""
    found = [letter for letter, text in choices.items() if text.lower() in response]
    return found[0] if len(found) == 1 else ""


def infer(response: str, choices: Choices) -> str:
    """VLMEvalKit: `infer_option`, then `infer_text`."""
    return infer_option(response, choices) or infer_text(response, choices)


def infer_mmbench(response: str, choices: Choices, letters: str = "ABCDE") -> str:
    """MMBench in lmms-eval: the only letter that is a word (an "A" in a longer text is an article), then with a mark
    around it, then the text of an option."""
    if _API_FAILURE not in response:
        words = response.split()
        for before, after in (("", ""), *_MARKS):
            found = [letter for letter in letters if f"{before}{letter}{after}" in words]
            article = not before and not after and "A" in words and len(words) > 3
            if len(found) == 1 and not article:
                return found[0]
    return infer_text(response, choices, bounded=False)


_MARKS = (*(("", mark) for mark in (".", ",", ":", ")", ").")), ("(", ")"), ("(", ")."))
_MARKS += tuple((":", mark) for mark in ("", ",", ".", ")", ")."))


def parse_mmmu(response: str, choices: Choices, *, lmms: bool = False) -> str:
    """MMMU: "(A)", then " A ", then the text of an option in answers of more than five words; of several the last.

    lmms: the variant of lmms-eval, where no blank is needed before the letter, and "A." counts too.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    forms = ["({})", "{} " if lmms else " {} ", *(["{}."] if lmms else [])]
    for form in forms:
        found = [letter for letter in choices if form.format(letter) in response]
        if found:
            # All but the bracketed form are placed by the letter between blanks, wherever they were found.
            place = "({})" if form == "({})" else " {} "
            return max(found, key=lambda letter: response.rfind(place.format(letter)))
    if len(response.split()) > 5:
        low = response.lower()
        found = [letter for letter, text in choices.items() if text.lower() in low]
        if found:
            return max(found, key=lambda letter: low.rfind(choices[letter].lower()))
    return ""


_STEMS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{the}{stem} is" for the in ("the ", "") for stem in _STEMS),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def extract_lmms(response: str, choices: Choices) -> str:
    """lmms-eval: the letter in the form that is trusted most; in the same form the last.

    Forms, best first: at the start, at the end, after a phrase such as "the answer is", "(A)", "A.", "A:", "A)", "A ",
    and any capital when there is nothing else.
    """
    text = response.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not response.strip():
        return ""
    text, bare = f" {text} ", text.strip()
    found: list[tuple[int, int, str]] = []  # (trust, position, letter)
    for letter in choices:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            place = text.find(letter, start + len(phrase)) if start >= 0 else -1
            if place >= 0:
                found.append((7, place, letter))
        for trust, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
            place = text.rfind(form.format(letter))
            if place >= 0:
                found.append((trust, place, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in choices if letter in text]
    return max(found, key=lambda entry: entry[:2])[2] if found else ""


_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def extract_videomme(response: str, letters: str = "ABCDE") -> str:
    """VLMEvalKit's rule for videos: known openings removed, then the first capital A to E, wherever it stands."""
    text = response.strip()
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    found = re.search(f"[{letters}]", text)
    if found:
        return found[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in letters if text.lower() in f"({letter})".lower()), "")


# ---- scorers


def _gold(answers: Sequence[str], choices: Choices) -> set[str]:
    """The letters of the accepted answers, which may be given as letters or as texts of options."""
    by_text = {text.strip().lower(): letter for letter, text in choices.items()}
    letters = [answer.strip().strip("().").upper() for answer in answers]
    return {by_text.get(answer.strip().lower(), letter) for answer, letter in zip(answers, letters)}


def _options(choices: Choices | None) -> Choices:
    """The options; without any the letters A to D, whose texts no answer holds."""
    return choices or dict.fromkeys("ABCD", "\0")


def mcq(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 when VLMEvalKit's rule reads the right letter."""
    options = _options(choices)
    return float(infer(prediction, options) in _gold(answers, options))


def mcq_mmbench(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 when the rule of lmms-eval's MMBench reads the right letter."""
    options = _options(choices)
    return float(infer_mmbench(prediction, options) in _gold(answers, options))


def mcq_mmmu(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 when MMMU's rule reads the right letter; what it would guess scores one over the number of options."""
    options = _options(choices)
    letter = parse_mmmu(prediction, options)
    return float(letter in _gold(answers, options)) if letter else 1 / len(options)


def mcq_lmms(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 when the extraction of lmms-eval reads the right letter."""
    options = _options(choices)
    return float(extract_lmms(prediction, options) in _gold(answers, options))


def mcq_videomme(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 when VLMEvalKit's rule for videos reads the right letter."""
    return float(extract_videomme(prediction) in _gold(answers, _options(choices)))


def mcq_scienceqa(prediction: str, answers: Sequence[str], choices: Choices | None = None) -> float:
    """1.0 for the bare letter in any case, or a text that begins with it and a point (ScienceQA in lmms-eval)."""
    gold = _gold(answers, _options(choices))
    bare = prediction.strip()
    if bare.upper() in gold:
        return 1.0
    return float(len(prediction) >= 2 and prediction[0] in gold and prediction[1] == ".")
