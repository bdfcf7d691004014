"""Samples by number, without holding them: where each record lies is noted once, and a record is read when asked for.

A set of millions of rows takes 24 bytes a row here. Read whole, because they cannot be entered in the middle:
compressed tars, and JSON files that are an object around their list.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from foveate.data.formats import SkipReport, _json_files, _unpack, detect, open_dataset
from foveate.data.formats.rows import resolver, to_sample
from foveate.data.formats.tables import pyarrow, table_files
from foveate.data.formats.tar import read_tar, tar_sample
from foveate.data.sample import Sample
from foveate.errors import InputError

_CHUNK = 1 << 20


class Index(Protocol):
    """The samples of a data set. Reading one raises InputError, naming it, when it cannot be used."""

    blocks: Sequence[int]
    """Where runs of samples begin that are cheap to read one after another; empty when any order is as cheap."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


def open_index(path: str | Path, root: str | Path | None = None) -> Index:
    """The index of a file or folder in any format of `open_dataset`. root: where relative media paths start.

    Bad records are found when they are read, not here. Raises InputError for a format that is not known.
    """
    path = Path(path)
    kind = detect(path)
    base = Path(root) if root else path if path.is_dir() else path.parent
    if kind == "hf":
        return _Tables(table_files(path), base)
    if kind == "webdataset":
        shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        return _Tars(shards) if all(map(_plain_tar, shards)) else _Held(path, root)
    file = _json_files(path)[0] if path.is_dir() else path
    return _Held(path, root) if file.suffix.lower() == ".json" and not _is_list(file) else _Json(file, base)


class _Held:
    """Everything in memory."""

    blocks: Sequence[int] = ()

    def __init__(self, path: Path, root: str | Path | None) -> None:
        self.report = SkipReport()
        self._samples = list(open_dataset(path, root=root, report=self.report))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


class _Places:
    """Byte ranges of records in one or several files."""

    blocks: Sequence[int] = ()

    def __init__(self, files: Sequence[Path], places: Callable[[Path], Iterator[tuple[int, int, int]]]) -> None:
        self.files, self._first = list(files), [0]
        self._start, self._end, self._number = array("q"), array("q"), array("q")
        for file in self.files:
            for start, end, number in places(file):
                self._start.append(start)
                self._end.append(end)
                self._number.append(number)
            self._first.append(len(self._start))

    def __len__(self) -> int:
        return len(self._start)

    def read(self, index: int) -> tuple[Path, int, bytes]:
        """(file, number in it, bytes) of a record."""
        file = self.files[bisect_right(self._first, index) - 1]
        try:
            with file.open("rb") as handle:
                handle.seek(self._start[index])
                return file, self._number[index], handle.read(self._end[index] - self._start[index])
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror})") from None


class _Json(_Places):
    """Lines of a .jsonl file, or items of a .json list."""

    def __init__(self, file: Path, root: Path) -> None:
        super().__init__([file], _items if file.suffix.lower() == ".json" else _lines)
        self._resolve = resolver(root)

    def __getitem__(self, index: int) -> Sample:
        file, number, data = self.read(index)
        name = f"{file.name}:{number}"
        try:
            return to_sample(json.loads(data), name, self._resolve, check=False)
        except ValueError as error:
            raise InputError(f"{name}: not valid JSON ({error})") from None
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


class _Tars(_Places):
    """Groups of members of uncompressed tar files."""

    def __init__(self, shards: Sequence[Path]) -> None:
        super().__init__(shards, _groups)

    def __getitem__(self, index: int) -> Sample:
        file, _, data = self.read(index)
        name, members = next(read_tar(file, io.BytesIO(data)))
        try:
            if isinstance(members, InputError):
                raise members
            return tar_sample(name, members, check=False)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


class _Tables:
    """Rows of parquet files, of which one row group is held, and of arrow files, which are mapped into memory."""

    def __init__(self, files: Sequence[Path], root: Path) -> None:
        self._resolve, self._pa = resolver(root), pyarrow()
        self._groups: list[tuple[Path, int]] = []
        self._first = [0]
        self._mapped: dict[Path, Any] = {}
        self._open: tuple[int, Any] = (-1, None)
        for file in files:
            for group, rows in enumerate(self._sizes(file)):
                self._groups.append((file, group))
                self._first.append(self._first[-1] + rows)
        self.blocks: Sequence[int] = self._first[:-1] if any(f.suffix == ".parquet" for f in files) else ()

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Sample:
        place = bisect_right(self._first, index) - 1
        file, row = self._groups[place][0], index - self._first[place]
        try:
            record = self._table(place).slice(row, 1).to_pylist()[0]
            return to_sample(_unpack(record), f"{file.name}:{index}", self._resolve, check=False)
        except (self._pa.ArrowException, OSError, InputError) as error:
            raise InputError(f"{file.name}:{index}: {' '.join(str(error).split())[:300]}") from None

    def _sizes(self, file: Path) -> list[int]:
        """Rows of each group of a file."""
        try:
            if file.suffix == ".parquet":
                import pyarrow.parquet as pq

                with pq.ParquetFile(file) as table:
                    return [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
            source = self._pa.memory_map(str(file))
            try:
                self._mapped[file] = self._pa.ipc.open_stream(source).read_all()
            except self._pa.ArrowInvalid:
                self._mapped[file] = self._pa.ipc.open_file(source).read_all()
            return [self._mapped[file].num_rows]
        except (self._pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is damaged or cut short ({' '.join(str(error).split())[:160]})") from None

    def _table(self, place: int) -> Any:
        file, group = self._groups[place]
        if file in self._mapped:
            return self._mapped[file]
        held, table = self._open
        if held != place:
            import pyarrow.parquet as pq

            with pq.ParquetFile(file) as opened:
                table = opened.read_row_group(group)
            self._open = place, table
        return table


def _lines(file: Path) -> Iterator[tuple[int, int, int]]:
    """(start, end, number) of each line that is not empty."""
    at = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield at, at + len(line), number
            at += len(line)


def _is_list(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(_CHUNK).lstrip().startswith(b"[")


def _items(file: Path) -> Iterator[tuple[int, int, int]]:
    """(start, end, number) of each item of a JSON list. Raises InputError where the list is no JSON."""
    decoder = json.JSONDecoder()
    chunk, number = _CHUNK, 0
    with file.open(encoding="utf-8", newline="") as handle:
        text = handle.read(chunk)
        at = text.index("[") + 1
        begin = len(text[:at].encode())  # the byte of text[at]
        while True:
            gap = at
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            begin += at - gap
            if text[at : at + 1] == "]":
                return
            try:
                _, after = decoder.raw_decode(text, at)
                size = len(text[at:after].encode())
                yield begin, begin + size, number
                begin, at, number, chunk = begin + size, after, number + 1, _CHUNK
            except ValueError as error:
                more = handle.read(chunk)
                if not more:
                    raise InputError(f"{file}: not valid JSON in item {number} ({error})") from None
                text, at, chunk = text[at:] + more, 0, 2 * chunk


def _plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError):
        return False


def _groups(path: Path) -> Iterator[tuple[int, int, int]]:
    """(start, end, number) of the members that share a name up to the first dot; a damaged end is a group too."""
    key, start, end, number = None, 0, 0, 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # else it remembers them all
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem = f"{folder}/{base.partition('.')[0]}"
                if stem != key:
                    if key is not None:
                        yield start, end, number
                        number += 1
                    key, start = stem, member.offset
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError, EOFError):
        end = path.stat().st_size
    if key is not None:
        yield start, end, number
