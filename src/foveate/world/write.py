"""Parts of the drawn world on disk, in any format that `foveate.data.formats` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import InputError
from foveate.world.evaluation import check_skill, evaluation_questions, scored_sample
from foveate.world.kinds import KINDS, check_kind, draw
from foveate.world.scene import check_split
from foveate.world.vocabulary import SKILLS

if TYPE_CHECKING:
    from foveate.data.sample import Sample


def write_split(
    what: str | Sequence[str],
    n: int,
    split: str,
    out: str | Path,
    format: str | None = None,
    *,
    seed: int = 0,
) -> int:
    """Write n scenes of each name in `what` to the file `out`; returns the number of samples.

    what: kinds (scenes with all their questions, for training) or skills (one scored question each), not both; where a
    name is both, as "count" is, it is a kind if all names are kinds. format: see `foveate.data.formats.write_dataset`.
    Raises UnknownNameError, InputError.
    """
    from foveate.data.formats import write_dataset

    names = [what] if isinstance(what, str) else list(what)
    check_split(split)
    if n < 1 or not names:
        raise InputError(f"nothing to write: n={n} of {len(names)} names; give at least one of each")
    return write_dataset(_samples(names, n, split, seed), out, format)


def _samples(names: Sequence[str], n: int, split: str, seed: int) -> Iterator[Sample]:
    if all(name in KINDS for name in names):
        return (draw(kind, i, split=split, seed=seed).sample() for i in range(n) for kind in names)
    if any(name in KINDS and name not in SKILLS for name in names) and any(name in SKILLS for name in names):
        raise InputError(f"{', '.join(names)}: name kinds of scenes or skills, not both in one file")
    for name in names:
        (check_skill if any(name in SKILLS for name in names) else check_kind)(name)
    return (
        scored_sample(scene, question)
        for skill in names
        for scene, question in evaluation_questions(skill, n, split=split, seed=seed)
    )
