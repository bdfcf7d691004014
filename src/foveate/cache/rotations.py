"""`Rotations`: the rotary angles of a batch's tokens, held once for all layers of a cache."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

FEW = 16
"""So many new rows are compared with all entries; more are sorted together with them."""


class Rotations:
    """table: [P, R'] cos beside sin of each position that occurred, in the dtype in which the model gave them.

    Rows of a batch, layers and requests of like positions share entries. Families that give each angle twice (halves,
    or neighbours) have it stored once.
    """

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.form = "full"
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def add(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Entry numbers [B, M] int32 of rotations cos, sin [B, M, R]."""
        if self._last is not None and self._last[0]() is cos:  # the layers of one pass are given one tensor
            return self._last[1]
        if self.table is None:
            self.form = _form(cos, sin)
            self.table = torch.cat([_short(cos, self.form), _short(sin, self.form)], dim=-1).flatten(0, 1)[:0]
        rows = torch.cat([_short(cos, self.form), _short(sin, self.form)], dim=-1).flatten(0, 1)
        number = self._find(rows).view(cos.shape[:2])
        self._last = weakref.ref(cos), number
        return number

    def get(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, M, R] of entries [B, M]."""
        cos, sin = self.table[number.long()].chunk(2, dim=-1)
        return _long(cos, self.form), _long(sin, self.form)

    def reset(self) -> None:
        self.table = self._last = None

    def _find(self, rows: Tensor) -> Tensor:
        """Entry numbers [N] of rows [N, R'], new ones added."""
        known = len(self.table)
        if len(rows) <= FEW and known:
            same = (rows[:, None] == self.table).all(dim=-1)  # [N, P]
            if bool(same.any(dim=-1).all()):
                return same.to(torch.int32).argmax(dim=-1).to(torch.int32)
        unique, which = torch.cat([self.table, rows]).unique(dim=0, return_inverse=True)
        number = torch.full((len(unique),), -1, dtype=torch.long, device=rows.device)
        number[which[:known]] = torch.arange(known, device=rows.device)
        new = (number < 0).nonzero()[:, 0]
        number[new] = torch.arange(known, known + len(new), device=rows.device)
        self.table = torch.cat([self.table, unique[new]])
        return number[which[known:]].to(torch.int32)


def _form(cos: Tensor, sin: Tensor) -> str:
    half = cos.shape[-1] // 2
    if cos.shape[-1] % 2 == 0:
        if torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:]):
            return "halves"
        if torch.equal(cos[..., ::2], cos[..., 1::2]) and torch.equal(sin[..., ::2], sin[..., 1::2]):
            return "neighbours"
    return "full"


def _short(angles: Tensor, form: str) -> Tensor:
    if form == "halves":
        return angles[..., : angles.shape[-1] // 2]
    return angles[..., ::2] if form == "neighbours" else angles


def _long(angles: Tensor, form: str) -> Tensor:
    if form == "halves":
        return torch.cat([angles, angles], dim=-1)
    return angles.repeat_interleave(2, dim=-1) if form == "neighbours" else angles
