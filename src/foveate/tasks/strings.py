"""Scores of answers that are strings or numbers: ANLS, relaxed accuracy, OCRBench.

Rules were read in lmms-eval and VLMEvalKit; the golden vectors come from both. Sources: ANLS, arXiv 1907.00490 (ST-VQA,
DocVQA); relaxed accuracy, arXiv 2203.10244 (ChartQA); OCRBench, arXiv 2305.07895.
"""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Sequence

THRESHOLD = 0.5
"""ANLS below this is 0; exactly this stays."""
TOLERANCE = 0.05


def levenshtein(first: str, second: str) -> int:
    """Edits (insert, delete, replace) between two texts, in code points."""
    if len(first) > len(second):
        first, second = second, first
    row = list(range(len(first) + 1))
    for i, there in enumerate(second, 1):
        diagonal, row[0] = row[0], i
        for j, here in enumerate(first, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (here != there))
    return row[-1]


def normalised_distance(prediction: str, answer: str) -> float:
    """Edit distance of the lower-case texts with single spaces, over the length of the longer *raw* text."""
    longest = max(len(prediction), len(answer))
    if not longest:
        return 0.0
    found, wanted = (" ".join(text.strip().lower().split()) for text in (prediction, answer))
    return levenshtein(found, wanted) / longest


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the references, 0 below the threshold."""
    score = 1 - min((normalised_distance(prediction, answer) for answer in answers), default=1.0)
    return score if score >= THRESHOLD else 0.0


def _number(text: str) -> float | None:
    """As Python reads it; a text that ends in % is divided by 100. None for anything else, "1,000" among them."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, answer: str) -> bool:
    """Within 5 % of a number other than 0; otherwise the same text but for case."""
    found, wanted = _number(prediction), _number(answer)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == answer.lower()


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy as lmms-eval has it: the text is compared with its blanks."""
    return float(any(relaxed_match(prediction, answer) for answer in answers))


def relaxed_accuracy_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """As VLMEvalKit: the prediction is stripped, and an answer that reads as a list is several references."""
    return float(max(relaxed_match(prediction.strip(), one) for answer in answers for one in _as_list(answer)))


def _as_list(answer: str) -> list[str]:
    try:
        value = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [answer]
    return [str(item) for item in value] if isinstance(value, list) else [answer]


def ocrbench(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when a reference stands in the prediction: lower case, full-width forms folded, line feeds as blanks."""
    found = _folded(prediction)
    return float(any(_folded(answer) in found for answer in answers))


def _folded(text: str) -> str:
    # Only the full-width block and the ideographic space: full NFKC would change more than the official rule does.
    narrow = "".join(_narrow(char) for char in text)
    return narrow.lower().strip().replace("\n", " ")


def _narrow(char: str) -> str:
    return unicodedata.normalize("NFKC", char) if "\uff01" <= char <= "\uff5e" or char == "\u3000" else char


def ocrbench_hme(prediction: str, answers: Sequence[str]) -> float:
    """OCRBench's rule for formulas (HME100k): blanks and line feeds removed, case kept."""
    found = _packed(prediction)
    return float(any(_packed(answer) in found for answer in answers))


def _packed(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")
