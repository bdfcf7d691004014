"""WebDataset tar files: members that share a name up to the first dot are one sample."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.data.formats.rows import resolver, to_sample
from foveate.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ImageSource, Sample, VideoSource
from foveate.errors import InputError

CAPTION_QUESTION = "Describe the picture."
MAX_MEMBER = 2**31


def read_tar(path: Path, part: io.BytesIO | None = None) -> Iterator[tuple[str, dict[str, bytes] | InputError]]:
    """(name, {extension: bytes}) of each sample, in file order; an InputError in its place ends a damaged archive.

    part: read these bytes of the file instead of all.
    """
    key, members = "", {}
    try:
        with tarfile.open(None if part else path, "r|*", fileobj=part) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if stem != key and members:
                    yield f"{path.name}:{key}", members
                    members = {}
                key = stem
                if member.size > MAX_MEMBER:
                    raise InputError(f"{member.name} has {member.size:,} bytes; the limit is {MAX_MEMBER:,}")
                data = archive.extractfile(member)
                members[extension.lower()] = data.read() if data else b""
    except (tarfile.TarError, EOFError, OSError, InputError) as error:
        members = {}  # cut off in the middle: this sample is not whole
        yield f"{path.name}:{key}", InputError(f"the archive is damaged or cut short ({error})")
    if members:
        yield f"{path.name}:{key}", members


def tar_sample(name: str, members: dict[str, bytes], check: bool) -> Sample:
    """The sample of one group: pictures or clips, and its text from .json (any record form) or .txt (a caption)."""
    images: dict[str, ImageSource] = {}
    videos: list[VideoSource] = []
    row: Any = {}
    for extension, data in sorted(members.items()):
        suffix = "." + extension.rpartition(".")[2]
        label = f"{name}.{extension}"
        if suffix in VIDEO_SUFFIXES:
            videos.append(VideoSource(data, label))
        elif suffix in IMAGE_SUFFIXES:
            images[extension] = ImageSource(data, label)
        elif suffix == ".json":
            try:
                row = json.loads(data)
            except ValueError as error:
                raise InputError(f"{label} is not JSON ({error})") from None
        elif suffix in (".txt", ".cls") and "question" not in row:
            row = {"question": CAPTION_QUESTION, "answer": data.decode("utf-8", "replace").strip(), **row}
    if not isinstance(row, dict):
        raise InputError(f"its json is {type(row).__name__}; it must be an object")
    clips = row.get("videos")
    if isinstance(clips, list) and clips and all(isinstance(clip, list) for clip in clips):
        # our own writer: each clip is a list of its frames' extensions
        try:
            videos += [VideoSource([images.pop(frame) for frame in clip], name) for clip in clips]
        except (KeyError, TypeError) as error:
            raise InputError(f"frame {error} of a clip is not in the archive") from None
    row = {k: v for k, v in row.items() if k not in ("image", "images", "video", "videos")}
    row["images"], row["videos"] = list(images.values()) or None, videos or None
    row.setdefault("id", name)
    return to_sample(row, name, resolver(Path()), check)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to an open archive, with fixed owner and time so that equal data give equal archives."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def dump(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
