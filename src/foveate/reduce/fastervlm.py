"""`fastervlm`: keep the tokens that the vision encoder itself attends to most.

Source: FasterVLM, arXiv 2412.01818 (code read: Theia-4869/FasterVLM @ f5d5f12). Score of a patch: the attention that
the CLS token pays it, averaged over heads, in the layer whose output feeds the connector. The same number stays in
every encoded view; the kept tokens stay in raster order and are renumbered. A tower without CLS (SigLIP, Qwen) has no
such query, so the attention received from all patches, averaged, takes its place, as other papers do. Newlines
between rows of a tiled picture stay, where the code leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from foveate.method import signal_for
from foveate.reduce.base import Scorer, top_k

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


@dataclass(frozen=True)
class FasterVLM(Scorer):
    """Top tokens of each view by attention of CLS, or by received attention where the tower has no CLS."""

    name: ClassVar[str] = "fastervlm"
    signals: ClassVar[tuple[str, ...]] = ("cls_attention|received_attention",)
    scope: ClassVar[str] = "view"
    position: ClassVar[str] = "renumber"
    summary: ClassVar[str] = "the tokens that the vision encoder attends to most, the same number in every view"

    def score(self, signals: dict[str, Tensor], layout: VisualLayout) -> Tensor:
        return signals[signal_for(self.signals[0], signals) or "received_attention"]


def keep_mask(attention: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The method on raw attention: mask [B, N] bool (True stays) and score [B, N].

    attention: [B, H, N] post-softmax attention of one query (CLS) to the N patches of each of B views, H heads.
    keep: tokens that stay in each view.
    """
    score = attention.mean(dim=1)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, top_k(score, keep), True), score
