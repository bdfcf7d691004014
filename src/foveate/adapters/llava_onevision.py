"""LLaVA-OneVision (arXiv 2408.03326): SigLIP tiles as in LLaVA-NeXT; large maps shrink, frames of clips are pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapters.llava_next import LlavaNextAdapter

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.data.plan import MediaPlan


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """LlavaOnevisionForConditionalGeneration.

    Clips and very large pictures are resized after the connector, so what leaves must leave after it: there are no
    sites before it. Signals take the same bilinear path as features.
    """

    family = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    sites: ClassVar[tuple[str, ...]] = ("post_projector", "llm", "compute", "cache")
    no_encoder = "behind its encoder whole maps of large pictures and of frames are resized"

    def gather(self, values: Tensor, media: MediaPlan, where: VisualLayout) -> Tensor:
        side = self.spec.side
        if media.kind == "video":
            level = media.levels[0]
            pooled = resize(values.unflatten(1, (side, side)), level.rows, level.cols).flatten(1, 2)
            rows = (where.view * level.rows + where.row) * level.cols + where.col
            return pooled.flatten(0, 1).index_select(0, rows.to(values.device))
        if len(media.levels) == 1 or media.levels[1].rows * media.levels[1].cols == media.kept[2] * media.kept[3]:
            return super().gather(values, media, where)
        top, left, rows, cols = media.kept
        last = media.views[-1]
        tiles = values[1:].reshape(last.row + 1, last.col + 1, side, side, *values.shape[2:])
        whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[top : top + rows, left : left + cols]
        shrunk = resize(whole[None], media.levels[1].rows, media.levels[1].cols)[0].flatten(0, 1)
        return torch.cat([values[0], shrunk])


def resize(maps: Tensor, rows: int, cols: int) -> Tensor:
    """[n, h, w, ...] -> [n, rows, cols, ...], bilinear."""
    flat = maps.flatten(3) if maps.dim() > 3 else maps[..., None]
    out = F.interpolate(flat.permute(0, 3, 1, 2), size=(rows, cols), mode="bilinear").permute(0, 2, 3, 1)
    return out.reshape(len(maps), rows, cols, *maps.shape[3:])
