"""Reading and writing data sets of samples.

| format | told by | reader and writer |
|---|---|---|
| `llava` | .json or .jsonl with "conversations" | both |
| `openai` | .jsonl with "messages" | both |
| `plain` | .jsonl (or .json) with "question", "answer", image, images or video | both |
| `webdataset` | .tar, or a folder of them | both |
| `hf` | .parquet, .arrow, or a folder of them (needs pyarrow) | both (parquet) |

A bad sample is skipped, counted and named in a `SkipReport`; nothing takes its place.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.data.formats.report import SkipReport
from foveate.data.formats.rows import resolver, to_sample
from foveate.data.formats.tables import read_rows, table_files
from foveate.data.formats.tar import read_tar, tar_sample
from foveate.data.formats.write import FORMATS, write_dataset
from foveate.data.sample import Sample
from foveate.errors import FoveateError, InputError

__all__ = ["FORMATS", "SkipReport", "detect", "open_dataset", "write_dataset"]
_log = logging.getLogger("foveate")


def detect(path: Path) -> str:
    """ "json", "webdataset" or "hf", from the name and, for a folder, from what lies in it. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        if any(path.glob("*.tar")):
            return "webdataset"
        if (path / "state.json").exists() or any(path.rglob("*.parquet")) or any(path.rglob("*.arrow")):
            return "hf"
        if len(_json_files(path)) == 1:
            return "json"
        raise InputError(
            f"{path}: the folder holds no .tar, .parquet or .arrow file, and not exactly one .json(l) file"
        )
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        return "json"
    if ".tar" in path.suffixes or suffix == ".tgz":
        return "webdataset"
    if suffix in (".parquet", ".arrow"):
        return "hf"
    raise InputError(
        f"{path}: format {suffix or 'without suffix'} is not known; use json, jsonl, tar, parquet or arrow"
    )


def open_dataset(
    path: str | Path,
    *,
    root: str | Path | None = None,
    report: SkipReport | None = None,
    limit: int | None = None,
    check: bool = True,
) -> Iterator[Sample]:
    """Samples of a file or folder in any known format, in file order.

    root: where relative media paths start (the file's folder by default). report: receives the skipped samples; without
    one they are summed up in a warning at the end. limit: stop after so many good samples. check: read picture headers,
    so that missing and unreadable files are found here; damage inside the pixels shows when a sample is executed.
    """
    path = Path(path)
    kind = detect(path)  # at once, not at the first sample
    return _read(path, kind, Path(root) if root else None, report, limit, check)


def _read(
    path: Path, kind: str, root: Path | None, report: SkipReport | None, limit: int | None, check: bool
) -> Iterator[Sample]:
    account = report if report is not None else SkipReport()
    good = 0
    for name, record, resolve in _records(path, kind, root):
        if limit is not None and good >= limit:
            break
        account.total += 1
        try:
            if isinstance(record, FoveateError):
                raise record
            made = tar_sample(name, record, check) if kind == "webdataset" else to_sample(record, name, resolve, check)
        except FoveateError as error:
            account.add(name, str(error))
            continue
        good += 1
        yield made
    if report is None and account.count:
        _log.warning("%s: %s", path, account)


def _records(path: Path, kind: str, root: Path | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, record or error, resolver of media paths) of each record."""
    if kind == "webdataset":
        for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
            for name, members in read_tar(shard):
                yield name, members, None
    elif kind == "hf":
        resolve = resolver(root or (path if path.is_dir() else path.parent))
        for file in table_files(path):
            row = -1
            try:
                for row, record in enumerate(read_rows(file)):
                    yield f"{file.name}:{row}", _unpack(record), resolve
            except InputError as error:
                yield f"{file.name}:{row + 1}", error, resolve
    else:
        file = _json_files(path)[0] if path.is_dir() else path
        resolve = resolver(root or file.parent)
        for name, record in _json_records(file):
            yield name, record, resolve


def _unpack(record: dict[str, Any]) -> dict[str, Any]:
    """A table row without empty columns; "meta" and "objects" that our writer stored as JSON text."""
    record = {k: v for k, v in record.items() if v is not None and v != []}
    if isinstance(record.get("meta"), str):
        with contextlib.suppress(ValueError, TypeError):  # a "meta" column of another tool
            ours = json.loads(record["meta"])
            record |= {key: ours[key] for key in ("meta", "objects") if key in ours}
    return record


def _json_files(folder: Path) -> list[Path]:
    ours = {"dataset_info.json", "state.json", "dataset_dict.json"}
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".jsonl") and f.name not in ours)


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON list or of JSON lines; a line that is not JSON is an error in its place."""
    if file.suffix.lower() == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: not valid JSON ({error})") from None
        rows = rows.get("data") if isinstance(rows, dict) else rows
        if not isinstance(rows, list):
            raise InputError(f"{file}: holds {type(rows).__name__}; need a list of samples")
        for i, row in enumerate(rows):
            yield f"{file.name}:{i}", row
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{file.name}:{number}", json.loads(line)
            except ValueError as error:
                yield f"{file.name}:{number}", InputError(f"not valid JSON ({error})")
