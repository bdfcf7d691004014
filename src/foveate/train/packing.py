"""Packing: many samples, each with several dialogues about its media, in few rows, without cross-talk.

All dialogues ("branches") of a sample share its media in one sequence. A token may attend to an earlier token of its
own sample that belongs to the shared prefix or to its own branch, and positions start again after the prefix for each
branch. Every token therefore sees exactly what it would see if its sample and branch stood alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROW_MULTIPLE = 16
"""Rows are padded to a multiple of this many tokens, so that few shapes occur."""
IGNORE = -100


@dataclass
class Tokens:
    """The tokens of one sample: `prefix` ids [P], and (ids, labels) of each branch, label -100 = not supervised.

    positions: [axes, L] int64 of prefix and first branch, where they are not 0, 1, 2, ...; those of the other branches
    go on from the prefix one by one as the first's do. newlines: places of separators among prefix and first branch.
    """

    prefix: np.ndarray
    branches: list[tuple[np.ndarray, np.ndarray]]
    positions: np.ndarray | None = None
    newlines: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)


@dataclass
class Packed:
    """Rows of packed sequences.

    input_ids, position_ids: [R, L] (several axes of positions: [axes, R, L]). allowed: bool [R, L, L], whether a token
    (row) may attend to another (column). target_index: [T] flat positions in R*L whose output predicts `targets` [T].
    order: the sequences by row and place, the order in which their media stand in `input_ids`. newlines, real: [R, L]
    bool, separators and what is no padding.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    allowed: np.ndarray
    target_index: np.ndarray
    targets: np.ndarray
    order: list[int]
    newlines: np.ndarray
    real: np.ndarray


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices: longest first, each into the first row with room; ties keep their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            rows.append([])
            room.append(max_length)
            place = len(rows) - 1
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


def pack(sequences: Sequence[Tokens], max_length: int, pad_id: int, share: bool = True) -> Packed:
    """Pack `sequences` (none longer than `max_length`) into rows of equal length; without `share`, one in each."""
    rows = first_fit([len(s) for s in sequences], max_length) if share else [[i] for i in range(len(sequences))]
    longest = max(sum(len(sequences[i]) for i in row) for row in rows)
    length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    shape = (len(rows), length)
    ids = np.full(shape, pad_id, np.int64)
    axes = max((len(s.positions) for s in sequences if s.positions is not None), default=1)
    positions = np.zeros((axes, *shape), np.int64)
    newlines = np.zeros(shape, bool)
    owner = np.full(shape, -1, np.int32)  # sequence of each token; -1 = padding
    branch = np.zeros(shape, np.int32)  # 0 = shared prefix
    index: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            sequence = sequences[i]
            size = len(sequence.prefix)
            end = start + len(sequence)
            owner[r, start:end] = i
            ids[r, start : start + size] = sequence.prefix
            known = np.arange(size + 1)[None] if sequence.positions is None else sequence.positions
            positions[:, r, start : start + size] = known[:, :size]
            if sequence.newlines is not None:
                newlines[r, start + sequence.newlines] = True
            at = start + size
            for number, (tokens, labels) in enumerate(sequence.branches, 1):
                stop = at + len(tokens)
                ids[r, at:stop] = tokens
                own = known[:, size : size + 1] + np.arange(len(tokens))
                positions[:, r, at:stop] = own if size or sequence.positions is None else known
                branch[r, at:stop] = number
                supervised = np.flatnonzero(labels != IGNORE)
                # What predicts a branch's first token is the prefix's last, not the branch before it.
                before = np.where(supervised > 0, at + supervised - 1, start + size - 1)
                if size == 0:
                    before, supervised = before[supervised > 0], supervised[supervised > 0]
                index.append(r * length + before)
                targets.append(labels[supervised])
                at = stop
            start = end
    order = [i for row in rows for i in row]
    return Packed(
        ids,
        positions if axes > 1 else positions[0],
        allowed_pairs(owner, branch),
        np.concatenate(index),
        np.concatenate(targets),
        order,
        newlines,
        owner >= 0,
    )


def allowed_pairs(owner: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """[R, L] owners (-1 = padding) and branches (0 = prefix) -> bool [R, L, L]; padding sees itself only."""
    length = owner.shape[1]
    same = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, None, :]
    open_to = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    allowed = same & open_to & np.tri(length, dtype=bool)
    diagonal = np.arange(length)
    allowed[:, diagonal, diagonal] = True
    return allowed
