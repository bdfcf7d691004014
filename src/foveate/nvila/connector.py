"""Connectors: from patches of the tower to tokens of the language model, with the published layer indices as names."""

from __future__ import annotations

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import UnknownNameError
from foveate.nvila.configuration import connector_ratio

# Widths that the Linear layers pass through, in multiples of the tower's channels; each hop is LayerNorm, Linear, GELU.
# The last hop, from the language model's width to itself, is a Linear alone.
_DOWNSAMPLE_WIDTHS: dict[str, tuple[float, ...]] = {
    "mlp_downsample": (4,),
    "mlp_downsample_2x2_fix": (4,),
    "mlp_downsample_3x3_fix": (9, 3),
    "mlp_downsample_3x3_s2": (9, 3, 1, 1 / 3),
    "mlp_downsample_3x3_s2_new": (9, 4, 2, 1, 1 / 3),
}
CONNECTORS = (*_DOWNSAMPLE_WIDTHS, "linear", "mlp<k>x_gelu", "identity")


class SpaceToChannel(nn.Module):
    """Joins each r x r cell of a square map into one token: [n, side*side, C] -> [n, ceil(side/r)**2, r*r*C].

    A side that r does not divide is padded with zeros at the bottom and the right. Channels are ordered (dy, dx, c),
    tokens row by row.
    """

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, features: Tensor) -> Tensor:
        r, (n, count, channels) = self.ratio, features.shape
        side = round(count**0.5)
        cells = -(-side // r)
        grid = features.view(n, side, side, channels)
        if cells * r != side:
            grid = F.pad(grid, (0, 0, 0, cells * r - side, 0, cells * r - side))
        grid = grid.reshape(n, cells, r, cells, r, channels).transpose(2, 3)
        return grid.reshape(n, cells * cells, r * r * channels)


class VisualPosition(nn.Module):
    """Learned tables of rows, columns and times, added to a grid of visual tokens.

    A grid of n rows reads a table of R entries linearly at the n cell centres, so coordinates are relative to the
    picture whatever its tiling. Times (pooled frame groups of a clip) likewise.
    """

    def __init__(self, rows: int, columns: int, times: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(rows, width)) if rows else None
        self.columns = nn.Parameter(torch.zeros(columns, width)) if columns else None
        self.times = nn.Parameter(torch.zeros(times, width)) if times else None

    def forward(self, tokens: Tensor, is_video: bool = False) -> Tensor:
        """tokens: [n, rows, columns, D]; n counts pooled frame groups of one clip if `is_video`, else pictures."""
        n, rows, columns, _ = tokens.shape
        if self.rows is not None:
            tokens = tokens + _resample(self.rows, rows)[None, :, None].to(tokens.dtype)
        if self.columns is not None:
            tokens = tokens + _resample(self.columns, columns)[None, None].to(tokens.dtype)
        if is_video and self.times is not None:
            tokens = tokens + _resample(self.times, n)[:, None, None].to(tokens.dtype)
        return tokens


class OutputNorm(nn.Module):
    """RMSNorm computed in float32 whatever the dtype of weights and tokens, so that autocast cannot split the two."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        return F.rms_norm(tokens.float(), self.weight.shape, self.weight.float(), self.eps).to(tokens.dtype)


class Projector(nn.Module):
    """`layers` (named as in the published checkpoints), then the optional norm; positions are added by the model.

    in_width: channels of the (joined) tower features. forward: [n, side*side, in_width] -> [n, tokens, out_width].
    Raises UnknownNameError for a type that is not in `CONNECTORS`.
    """

    def __init__(
        self,
        kind: str,
        in_width: int,
        out_width: int,
        output_norm: bool = False,
        positions: tuple[int, int, int] | list[int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.kind = kind
        self.layers = _layers(kind, in_width, out_width)
        self.output_norm = OutputNorm(out_width) if output_norm else None
        self.position = VisualPosition(*positions, width=out_width) if any(positions) else None

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.layers(features)
        return tokens if self.output_norm is None else self.output_norm(tokens)


def _layers(kind: str, in_width: int, out_width: int) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(in_width, out_width)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(1, int(match.group(1))):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        return nn.Sequential(*layers)
    if kind not in _DOWNSAMPLE_WIDTHS:
        raise UnknownNameError(f"unknown connector {kind!r}; known: {', '.join(CONNECTORS)}")
    # // and not round: a third of the channels is cut down in the official code
    widths = [in_width // 3 if w < 1 else in_width * int(w) for w in _DOWNSAMPLE_WIDTHS[kind]] + [out_width]
    layers = [SpaceToChannel(connector_ratio(kind))]
    for narrow, wide in pairwise(widths):
        layers += [nn.LayerNorm(narrow), nn.Linear(narrow, wide), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(out_width, out_width))


def _resample(table: Tensor, count: int) -> Tensor:
    """[R, D] -> [count, D], linear between entries, at cell centres."""
    if count == table.shape[0]:
        return table
    return F.interpolate(table.T[None], size=count, mode="linear", align_corners=False)[0].T
