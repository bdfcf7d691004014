"""A new token reduction in one file: keep the visual tokens whose features are largest.

python examples/new_method.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import foveate
from foveate import world
from foveate.reduce.base import Scorer
from foveate.registry import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class Norm(Scorer):
    """The tokens of largest (or smallest) feature norm in each picture or clip."""

    largest: bool = True

    name: ClassVar[str] = "norm"
    signals: ClassVar[tuple[str, ...]] = ("features",)
    scope: ClassVar[str] = "media"
    position: ClassVar[str] = "keep"
    status: ClassVar[str] = "experimental"
    summary: ClassVar[str] = "the visual tokens whose features are largest"

    def score(self, signals: dict[str, Tensor], layout: VisualLayout) -> Tensor:
        norms = signals["features"].float().norm(dim=-1)  # [N]
        return norms if self.largest else -norms


METHODS.register("norm", Norm)


def main(model: str = "nano") -> None:
    vlm = foveate.load(model)
    scene = world.draw("scene", 3, split="test")
    question = next(q for q in scene.questions if not q.auxiliary)
    for recipe in ("norm(keep=0.5)", "norm(keep=8, largest=false)"):
        small = foveate.Recipe.parse(recipe).apply(vlm)
        answer = small.ask(scene.images[0], question.text, max_new_tokens=8)
        print(f"{recipe}: {answer.text!r} (true: {question.answer}), {answer.tokens['kept']} tokens stay")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder or preset (default: nano)")
    main(**vars(parser.parse_args()))
