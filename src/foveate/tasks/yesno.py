"""POPE: yes-or-no questions about objects, by three rules that disagree on free text.

Source: POPE, arXiv 2305.10355 (its script), lmms-eval and VLMEvalKit, whose outputs are the golden vectors. lmms-eval
takes "yes" and "no" only, so that "Yes." is wrong, and reports the share of yes in the *labels* as its yes ratio; both
are kept in its variant.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveate.tasks.vqa import strip_punctuation

_NO = frozenset({"No", "not", "no"})


def official_answer(response: str) -> str:
    """ "no" when the text before the first point, commas aside, holds the word No, not or no; else "yes"."""
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if _NO.intersection(words) else "yes"


def extract_vlmevalkit(response: str) -> str:
    """ "Yes", "No", or "Unknown" when both words or neither stands in the text."""
    words = strip_punctuation(response.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "Unknown" if yes == no else "Yes" if yes else "No"


def pope(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the official reading of the prediction is the label."""
    return float(official_answer(prediction) == answers[0].strip().lower())


def pope_lmms(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the stripped lower-case prediction is the label, as lmms-eval compares."""
    return float(prediction.strip().lower() == answers[0].strip().lower())


def pope_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when VLMEvalKit's extraction is the label; what it cannot decide is wrong here (it would ask a judge)."""
    return float(extract_vlmevalkit(prediction).lower() == answers[0].strip().lower())


def pope_metrics(responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """{"TP", "FP", "TN", "FN", "accuracy", "precision", "recall", "f1", "yes_ratio"} of the official reading; positive
    is yes. A ratio without a denominator is 0, where the official script stops with an error."""
    said = [official_answer(response) == "yes" for response in responses]
    true = [label.strip().lower() == "yes" for label in labels]
    counts = _confusion(said, true)
    return {**counts, **_ratios(counts), "yes_ratio": _share(sum(said), len(said))}


def pope_metrics_lmms(responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The numbers of lmms-eval: an answer that is neither word counts in no cell but lowers accuracy; its yes ratio is
    that of the labels."""
    plain = [(response.strip().lower(), label.strip().lower()) for response, label in zip(responses, labels)]
    usable = [(a == "yes", b == "yes") for a, b in plain if a in ("yes", "no")]
    counts = _confusion([a for a, _ in usable], [b for _, b in usable])
    right = sum(a == b for a, b in plain)
    ratios = {**_ratios(counts), "accuracy": _share(right, len(plain))}
    return {**ratios, "yes_ratio": _share(sum(b == "yes" for _, b in plain), len(plain))}


def _confusion(said: Sequence[bool], true: Sequence[bool]) -> dict[str, float]:
    pairs = list(zip(said, true))
    cells = {"TP": (True, True), "FP": (True, False), "TN": (False, False), "FN": (False, True)}
    return {name: pairs.count(cell) for name, cell in cells.items()}


def _ratios(c: dict[str, float]) -> dict[str, float]:
    precision, recall = _share(c["TP"], c["TP"] + c["FP"]), _share(c["TP"], c["TP"] + c["FN"])
    return {
        "accuracy": _share(c["TP"] + c["TN"], sum(c.values())),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
