"""VQA accuracy: the share of annotators who agree, left out one by one, on normalised answers.

Source: VQA, arXiv 1505.00468, and TextVQA, arXiv 1904.08920. Rules were read in the EvalAI answer processor of MMF
(facebookresearch/mmf), in lmms-eval and in VLMEvalKit; the golden vectors come from those. Kept on purpose: the period
rule of EvalAI, whose look-behind never matters ("5." becomes "5", where VLMEvalKit keeps it), at most 32 periods are
dropped, and few references cannot reach 1 (a single one gives 0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32
_PERIOD_EVALAI = re.compile(r"\.(?!\d)")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = dict(zip(_COUNTED.split(), map(str, range(11))))
_NUMBERS["none"] = "0"
_ARTICLES = frozenset({"a", "an", "the"})

# Words as they should be written. Each stands for its spelling without apostrophes; those with two also for the
# spellings that lack one of them.
_ONE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _ONE.split()}
    found["someonell"] = "someone'll"
    for word in _TWO.split():
        first, second, third = word.split("'")
        found[f"{first}{second}'{third}"] = found[f"{first}'{second}{third}"] = word
    # The table's own oddities: a form that loses its apostrophe, and three with a leading one.
    found.update({"twas": "'twas", "somebody'd": "somebodyd"})
    found.update(dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"))
    found.update(dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"))
    return found


CONTRACTIONS = _contractions()


def strip_punctuation(
    text: str, *, period: re.Pattern[str] = _PERIOD, comma: re.Pattern[str] = _COMMA_IN_NUMBER
) -> str:
    """`text` without punctuation: a mark that touches a space goes, another becomes a space; so do all in a text with
    a comma inside a number. Apostrophes, %, $, & and : stay."""
    joined = comma.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touches or joined else " ")
    return period.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    """Number words as digits, articles dropped, apostrophes put back."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_textvqa(text: str) -> str:
    """The EvalAI form with its word tokenizer: TextVQA (M4C and lmms-eval)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqav2(text)


def normalise_vqav2(text: str) -> str:
    """The EvalAI form without the tokenizer: VQAv2 in lmms-eval."""
    return _words(strip_punctuation(_flat(text), period=_PERIOD_EVALAI, comma=_COMMAS_IN_NUMBER))


def normalise_vlmevalkit(text: str) -> str:
    """The form of VLMEvalKit, whose period rule keeps the point after a digit."""
    return _words(strip_punctuation(_flat(text)))


def _leave_one_out(prediction: str, answers: Sequence[str], form: Callable[[str], str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3)."""
    found, accepted = form(prediction), [form(answer) for answer in answers]
    if not accepted:
        return 0.0
    agreeing = sum(answer == found for answer in accepted)
    return sum(min(1.0, (agreeing - (answer == found)) / 3) for answer in accepted) / len(accepted)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of TextVQA; made for ten reference answers, and below 1 with fewer than four of them."""
    return _leave_one_out(prediction, answers, normalise_textvqa)


def vqa_accuracy_v2(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of VQAv2 as lmms-eval normalises it."""
    return _leave_one_out(prediction, answers, normalise_vqav2)


def vqa_accuracy_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy as VLMEvalKit normalises it."""
    return _leave_one_out(prediction, answers, normalise_vlmevalkit)
