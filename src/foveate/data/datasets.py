"""Named public sets, read from a local folder without unpacking: `easy-vqa`, `nlvr`, `flickr8k-match`.

Nothing is downloaded. The folder (`--data`, or FOVEATE_DATA) holds one sub-folder for each set: question files (.jsonl)
and pictures in .zip archives.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.sample import ImageSource, Sample
from foveate.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class NamedSet:
    """Where a set lies, its splits as {split: (question file, picture archive)}, and how a row becomes a question."""

    folder: str
    splits: dict[str, tuple[str, str]]
    ask: Callable[[dict[str, Any]], tuple[str, str, dict[str, Any]]]
    sub: dict[str, tuple[str, bool]]
    """Sub-splits, {name: (split, held out)}: a fifth of the sentences of `split`, chosen by identifier, is held out."""


def _easy_vqa(row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    answer = row["answer"]
    if answer in ("yes", "no"):
        kind, chance = "yes/no", 1 / 2
    elif answer in ("circle", "rectangle", "triangle"):
        kind, chance = "shape", 1 / 3
    else:
        kind, chance = "colour", 1 / 8
    return row["question"], answer, {"skill": kind, "chance": chance}


def _nlvr(row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    label = row["label"] is True or str(row["label"]).lower() == "true"
    question = f"{row['sentence'].strip()} True or false?"
    return question, "true" if label else "false", {"identifier": row["identifier"], "chance": 1 / 2}


def _flickr8k_match(row: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    question = f'Does this caption match the picture? "{row["caption"].strip()}"'
    return question, "yes" if row["match"] else "no", {"chance": 1 / 2}


_SETS = {
    "easy-vqa": NamedSet("easy-vqa", {s: (f"{s}.jsonl", "images.zip") for s in ("train", "test")}, _easy_vqa, {}),
    "nlvr": NamedSet(
        "nlvr",
        {s: (f"{s}.jsonl", f"{s}_images.zip") for s in ("dev", "test")},
        _nlvr,
        {"dev-train": ("dev", False), "dev-val": ("dev", True)},
    ),
    "flickr8k-match": NamedSet(
        "flickr8k-224", {s: (f"match_{s}.jsonl", "images.zip") for s in ("train", "dev")}, _flickr8k_match, {}
    ),
}


def named_sets() -> dict[str, tuple[str, ...]]:
    """{name: splits} of the sets known here."""
    return {name: (*found.splits, *found.sub) for name, found in _SETS.items()}


def load_named(
    name: str,
    data_dir: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    *,
    group: bool | None = None,
) -> list[Sample]:
    """Samples of a named set, in file order; equal arguments give equal samples.

    limit: that many questions, drawn by `seed`. group: join all questions about one picture into the branches of one
    sample (the default for the split "train" only; `limit` then counts pictures). nlvr also has "dev-train" and
    "dev-val", four fifths and one fifth of dev, split by sentence and never by row.
    Raises UnknownNameError for a name or split, InputError for a folder or file that is missing or damaged.
    """
    if name not in _SETS:
        raise UnknownNameError(f"unknown data set {name!r}; known: {', '.join(sorted(_SETS))}")
    found = _SETS[name]
    if split not in found.splits and split not in found.sub:
        raise UnknownNameError(f"{name} has no split {split!r}; known: {', '.join((*found.splits, *found.sub))}")
    base, held_out = found.sub.get(split, (split, None))
    folder = _folder(data_dir, found.folder)
    questions, archive = (folder / file for file in found.splits[base])
    rows = _rows(questions)
    if held_out is not None:
        rows = [row for row in rows if _held_out(row["identifier"]) == held_out]
    return _samples(name, split, found, rows, archive, limit, seed, split == "train" if group is None else group)


def _folder(data_dir: str | Path | None, name: str) -> Path:
    base = data_dir or os.environ.get("FOVEATE_DATA")
    if not base:
        raise InputError(f"{name}: no data folder; give --data DIR or set FOVEATE_DATA")
    folder = Path(base) / name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the data folder must hold {name}/")
    return folder


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON lines ({error})") from None


def _held_out(identifier: str) -> bool:
    sentence = identifier.partition("-")[0]
    return hashlib.blake2b(sentence.encode(), digest_size=4).digest()[0] < 51  # 51 of 256: a fifth


def _samples(
    name: str,
    split: str,
    found: NamedSet,
    rows: list[dict[str, Any]],
    file: Path,
    limit: int | None,
    seed: int,
    group: bool,
) -> list[Sample]:
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["image"] if group else i, []).append(i)
    chosen = list(groups.values())
    if limit is not None and limit < len(chosen):
        picked = sorted(random.Random(seed).sample(range(len(chosen)), limit))
        chosen = [chosen[i] for i in picked]
    out, sources = [], {}
    try:
        with zipfile.ZipFile(file) as archive:
            for members in chosen:
                image = rows[members[0]]["image"]
                if image not in sources:
                    sources[image] = ImageSource(archive.read(image), f"{file.name}:{image}")
                asked = [found.ask(rows[i]) for i in members]
                meta = {"dataset": name, "split": split, "image": image, **asked[0][2]}
                if len(asked) > 1:
                    meta |= {
                        f"{key}s": [a[2][key] for a in asked] for key in ("skill", "identifier") if key in asked[0][2]
                    }
                out.append(
                    Sample(
                        id=f"{name}/{split}/{members[0]}",
                        media=[sources[image]],
                        branches=[[(question, answer)] for question, answer, _ in asked],
                        meta=meta,
                    )
                )
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{file}: the pictures cannot be read ({error})") from None
    return out
