"""`VisualLayout`: where every visual token of a request comes from. Reducers read this, never a model's constants."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

VALID, PADDING, NEWLINE = 0, 1, 2
"""Kinds of visual tokens: a feature of the picture, a feature of padding, a separator without a feature."""


@dataclass(frozen=True)
class VisualLayout:
    """One entry for each of the N visual tokens of a request, in sequence order; int64 tensors of shape [N] on the CPU.

    media: index of the picture or clip in the prompt. view: index of the encoded view (tile, thumbnail, pooled group of
    frames) inside its media item. frame: the group's first frame, counted among the sampled ones; -1 in a picture.
    row, col: place in the view. global_row, global_col: place in the whole picture, -1 where there is none (thumbnail;
    a separator has the global_row that it closes, if it closes one).
    kind: VALID, PADDING or NEWLINE. position: index in the prompt's token sequence before anything was dropped.
    size: float32, how many original tokens this one stands for (1 before merging).
    """

    media: Tensor
    view: Tensor
    frame: Tensor
    row: Tensor
    col: Tensor
    global_row: Tensor
    global_col: Tensor
    kind: Tensor
    position: Tensor
    size: Tensor

    def __len__(self) -> int:
        return self.kind.shape[0]

    def __getitem__(self, index: Tensor) -> VisualLayout:
        """The tokens that `index` ([K] int64, or [N] bool) names, in that order."""
        return VisualLayout(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    def features(self) -> VisualLayout:
        """Without separators: token i of the result is row i of the request's visual features."""
        return self[self.kind != NEWLINE]

    def groups(self, scope: str) -> list[Tensor]:
        """Indices [n_g] int64 of the tokens that share a budget, in sequence order.

        scope: "view" (each encoded view), "media" (each picture or clip) or "request" (all visual tokens together).
        """
        if not len(self):
            return []
        if scope == "request":
            return [torch.arange(len(self))]
        # one number for each group: unique rows of two would take thirty times longer
        key = self.media if scope == "media" else self.media * (int(self.view.max()) + 1) + self.view
        order = torch.argsort(key, stable=True)
        _, counts = torch.unique_consecutive(key[order], return_counts=True)
        return list(torch.split(order, counts.tolist()))

    def sizes(self) -> list[list[int]]:
        """For each picture or clip the tokens of its views, in order."""
        found = [self.view[self.media == item].unique(return_counts=True)[1] for item in self.media.unique()]
        return [counts.tolist() for counts in found]

    @classmethod
    def join(cls, parts: list[VisualLayout]) -> VisualLayout:
        """The layouts one after the other; an empty layout for an empty list."""
        if not parts:
            empty = {f.name: torch.zeros(0, dtype=torch.int64) for f in dataclasses.fields(cls)}
            return cls(**{**empty, "size": torch.zeros(0)})
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)})
