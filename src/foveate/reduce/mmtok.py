"""`mmtok`: tokens that together cover the words of the question and the rest of the picture.

Source: MMTok, arXiv 2508.18264 (ICLR 2026; code read: Ironieser/MMTok @ d1522cd). Rows of a coverage matrix are the
question's words (softmax over tokens of their cosine to the projected tokens) and the tokens themselves (softmax of the
cosine between encoder features, weight alpha); greedily the token that raises the covered sum most stays. In sequence
order, renumbered, without newlines. Greedy coverage reaches at least 1 - 1/e of the best choice.

Departures: as the code does for Qwen, every text token of the prompt is a row here, so the question may be in any
language; `keywords` is the English filter that the code puts before it for LLaVA. Every encoded view has its own
budget, and the whole request's text drives all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, in_order
from foveate.reduce.select import cosines, coverage
from foveate.reduce.signals import given

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout

ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_STOP = frozenset(
    re.findall(
        r"\w+",
        "a an and answer are at be been being but by did do does for from had has have he how i if into is "
        "it onto or question she so the then they to upon was we were what when where which who why with you",
    )
)


@dataclass(frozen=True)
class MMTok(Reducer):
    """Tokens of each view that cover the question and the view best.

    alpha: weight of covering the view against covering the text. The temperatures sharpen (small) or flatten (large)
    which token covers what.
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    name: ClassVar[str] = "mmtok"
    sites: ClassVar[tuple[str, ...]] = ("post_projector",)
    signals: ClassVar[tuple[str, ...]] = ("features", "hidden@-1|features", "text_embeddings")
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    newline: ClassVar[str] = "drop"
    summary: ClassVar[str] = "tokens that together cover the words of the question and the picture"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or min(self.text_temperature, self.vision_temperature) <= 0:
            raise RecipeError(
                f"{self.name}: alpha is {self.alpha} (at least 0), temperatures {self.text_temperature} and "
                f"{self.vision_temperature} (above 0)"
            )

    def select(self, signals: dict[str, Tensor], layout: VisualLayout) -> Reduction:
        features, hidden, text = (given(signals, need) for need in self.signals)
        kept = []
        for view in layout.groups(self.scope):
            rows = covering(
                text, features[view], hidden[view], self.alpha, self.text_temperature, self.vision_temperature
            )
            kept.append(view[coverage(rows, self.count(len(view)))])
        return Reduction(in_order(kept))


def covering(
    text: Tensor, projected: Tensor, encoded: Tensor, alpha: float, text_temperature: float, vision_temperature: float
) -> Tensor:
    """How well each of n tokens covers each of m words and n tokens: [m + n, n] float32.

    text: [m, D] word embeddings; projected: [n, D] tokens as the language model sees them; encoded: [n, C] as the
    encoder does. Both parts are softmax over tokens, divided by their number of rows.
    """
    to_text = (cosines(text, projected) / text_temperature).softmax(dim=1) / max(len(text), 1)
    to_view = (cosines(encoded) / vision_temperature).softmax(dim=1) / max(len(encoded), 1)
    return torch.cat([to_text, alpha * to_view])


def keywords(question: str) -> str:
    """The words of an English question that say what it is about, in order; what there is when none is left.

    The LLaVA rule: stock sentences about the form of the answer go, then articles, forms of be, have and do, subject
    pronouns, question words, conjunctions and some prepositions.
    """
    text = question.removeprefix("<image>\n")
    for sentence in ANSWER_FORMATS:
        text = text.replace(sentence, "")
    return " ".join(word for word in re.findall(r"\w+", text) if word.lower() not in _STOP) or text
