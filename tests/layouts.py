"""Layouts of visual tokens and signals for them, without a model: what the tests of reduction methods run on."""

from __future__ import annotations

import dataclasses

import torch

from foveate.adapters.layout import NEWLINE, VALID, VisualLayout

HEADS, WIDTH = 4, 16


def make(rows: list[dict[str, int]]) -> VisualLayout:
    """A layout of tokens given as dicts; what is left out is 0, or -1 for a place that there is not."""
    defaults = {"media": 0, "view": 0, "frame": -1, "row": 0, "col": 0, "global_row": -1, "global_col": -1}
    columns = {
        name: torch.tensor([row.get(name, default) for row in rows], dtype=torch.int64)
        for name, default in {**defaults, "kind": VALID}.items()
    }
    return VisualLayout(**columns, position=3 + torch.arange(len(rows)), size=torch.ones(len(rows)))


def grid_view(rows: int, cols: int, **where: int) -> list[dict[str, int]]:
    """A view that stands by itself, in raster order."""
    return [{"row": r, "col": c, **where} for r in range(rows) for c in range(cols)]


def single(rows: int = 6, cols: int = 9, **where: int) -> list[dict[str, int]]:
    """A picture of one view, which is not square."""
    return [
        {**token, "global_row": token["row"], "global_col": token["col"]} for token in grid_view(rows, cols, **where)
    ]


def tiled(down: int = 2, across: int = 3, side: int = 6, cut: int = 2, **where: int) -> list[dict[str, int]]:
    """A thumbnail, then down x across tiles read as one map, a newline after each row, `cut` rows of padding gone."""
    tokens = grid_view(side, side, view=0, **where)
    for row in range(cut, down * side - cut):
        for col in range(across * side):
            tile = 1 + (row // side) * across + col // side
            inside = {"row": row % side, "col": col % side, "global_row": row - cut, "global_col": col}
            tokens.append({"view": tile, **inside, **where})
        tokens.append({"view": 0, "kind": NEWLINE, **where})
    return tokens


def clip(frames: int = 9, rows: int = 5, cols: int = 4, **where: int) -> list[dict[str, int]]:
    """A clip whose last frame is smaller."""
    tokens = []
    for frame in range(frames):
        height = rows - 2 if frame == frames - 1 else rows
        tokens += grid_view(height, cols, view=frame, frame=frame, **where)
    return tokens


LAYOUTS = {
    "single": make(single()).features(),
    "tiled": make(tiled()).features(),
    "two": make([*tiled(1, 2, 4, 0, media=0), *single(5, 3, media=1)]).features(),
    "clip": make(clip()).features(),
    "mixed": make([*single(3, 4, media=0), *clip(5, 4, 4, media=1)]).features(),
}


def only(layout: VisualLayout, media: int) -> VisualLayout:
    """One picture or clip of a layout, as if it were asked about alone."""
    part = layout[layout.media == media]
    return dataclasses.replace(part, media=torch.zeros_like(part.media))


def signals_for(
    needs: tuple[str, ...], layout: VisualLayout, seed: int = 0, cls: bool = True
) -> dict[str, torch.Tensor]:
    """Random signals that answer the needs: those of CLS where the tower has one.

    A picture or clip has the same signals alone as beside others, but for its number among them.
    """
    found = {}
    for need in needs:
        options = need.split("|")
        name = next((option for option in options if cls or not option.startswith("cls_")), options[0])
        if name == "text_embeddings":
            found[name] = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
            continue
        parts = []
        for media in layout.media.unique().tolist():
            generator = torch.Generator().manual_seed(100 * seed + 10 * media + len(name))
            parts.append(_signal(name, layout[layout.media == media], generator))
        found[name] = torch.cat(parts)
    return found


def _signal(name: str, layout: VisualLayout, generator: torch.Generator) -> torch.Tensor:
    """One signal of one picture or clip. Features of a clip stand still at two of three places."""
    kind, _, block = name.partition("@")
    if kind in ("cls_query", "cls_key", "cls_value"):
        return torch.randn(int(layout.view.max()) + 1, WIDTH, generator=generator)
    if kind in ("cls_attention", "cls_logits", "received_attention"):
        logits = torch.randn(len(layout), HEADS, generator=generator)
        heads = logits if kind == "cls_logits" else logits.softmax(dim=0)
        return heads if block else heads.mean(dim=1)
    values = torch.randn(len(layout), WIDTH, generator=generator)
    if kind != "features" or int(layout.frame.max()) < 0:
        return values
    still = torch.randn(64, 64, WIDTH, generator=generator)[layout.row, layout.col]
    moving = (layout.row + layout.col) % 3 == 0
    return torch.where(moving[:, None], values, still + 0.1 * values)


def dense(reduction, n):
    """What a reduction of `n` tokens does, as a matrix [K, n]."""
    if reduction.weights is None:
        return torch.eye(n)[reduction.keep]
    return reduction.weights.to_dense()
