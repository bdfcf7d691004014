"""Writers: samples to LLaVA JSON/JSONL, OpenAI JSONL, plain JSONL, WebDataset tar or a Hugging Face parquet file.

Every file appears whole or not at all: it is written beside its place and renamed. Media of the JSON formats go to a
folder `<name>_media` next to the file, before the file itself.
"""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.data.formats.tables import write_parquet
from foveate.data.formats.tar import add_member, dump
from foveate.data.images import load_image
from foveate.data.sample import ImageSource, Media, Sample, VideoSource
from foveate.errors import InputError

FORMATS = ("llava", "openai", "plain", "webdataset", "hf")
_SUFFIX = {".json": "llava", ".jsonl": "llava", ".tar": "webdataset", ".parquet": "hf"}
_EXTENSION = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}


def write_dataset(samples: Iterable[Sample], path: str | Path, format: str | None = None) -> int:
    """Write samples to the file `path`; returns how many. format: one of `FORMATS`, or told by the suffix.

    A sample with several branches becomes several records that share its media (one record in a tar). Raises
    InputError for an unknown format or media that cannot be written.
    """
    path = Path(path)
    format = format or _SUFFIX.get(path.suffix.lower())
    if format not in FORMATS:
        raise InputError(f"{path}: format {format!r} is not known; use one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "webdataset":
        return _write_tar(samples, path)
    if format == "hf":
        return _write_hf(samples, path)
    return _write_json(samples, path, format)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(samples: Iterable[Sample], path: Path, format: str) -> int:
    folder = path.with_name(f"{path.stem}_media")
    count = 0
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        whole = path.suffix.lower() == ".json"
        first = True
        for count, sample in enumerate(samples, 1):
            names = [_save(item, folder, f"{count - 1:06d}_{i}") for i, item in enumerate(sample.media)]
            for b in range(len(sample.branches)):
                row = json.dumps(_row(sample, b, names, format), ensure_ascii=False)
                out.write(("[\n" if first else ",\n") + row if whole else row + "\n")
                first = False
        if whole:
            out.write("[]\n" if first else "\n]\n")
    return count


def _row(sample: Sample, branch: int, names: list[str], format: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": sample.id if len(sample.branches) == 1 else f"{sample.id}#{branch}"}
    files = {id(item): name for item, name in zip(sample.media, names)}
    if format == "openai":
        row["messages"] = [
            {"role": m["role"], "content": _openai_content(m["content"], files)} for m in sample.messages(branch)
        ]
    else:
        pictures = [n for n, m in zip(names, sample.media) if m.kind == "image"]
        clips = [n for n, m in zip(names, sample.media) if m.kind == "video"]
        if pictures:
            row["image" if len(pictures) == 1 else "images"] = pictures[0] if len(pictures) == 1 else pictures
        if clips:
            row["video" if len(clips) == 1 else "videos"] = clips[0] if len(clips) == 1 else clips
        if format == "plain" and sample.turns is None and len(sample.branches[branch]) == 1:
            row["question"], row["answer"] = sample.branches[branch][0]
        elif format == "plain":
            raise InputError(f"{sample.id}: a dialogue of several turns does not fit 'plain'; use llava or openai")
        else:
            row["conversations"] = _conversation(sample, branch)
    return row | _extras(sample, branch)


def _extras(sample: Sample, branch: int | None) -> dict[str, Any]:
    """Truth and notes. Notes that hold one entry a branch ("skills") are narrowed to the branch ("skill")."""
    meta = dict(sample.meta)
    for key in ("skills", "forms"):
        if branch is not None and isinstance(meta.get(key), list) and len(meta[key]) == len(sample.branches):
            meta[key[:-1]] = meta.pop(key)[branch]
    extras: dict[str, Any] = {"meta": json.loads(json.dumps(meta, default=str))} if meta else {}
    if sample.objects is not None:
        extras["objects"] = [[{k: v for k, v in asdict(b).items() if v is not None} for b in s] for s in sample.objects]
    return extras


def _conversation(sample: Sample, branch: int) -> list[dict[str, str]]:
    out = []
    for message in sample.messages(branch):
        content = message["content"]
        if not isinstance(content, str):
            text = "".join(p["text"] if p["type"] == "text" else f"<{p['type'].partition('_')[0]}>" for p in content)
            first = bool(content) and content[0]["type"] != "text" and sample.turns is None
            if first:  # the line feed that LLaVA files have between placeholders and question
                cut = text.rfind(">", 0, len(text) - len(content[-1].get("text", ""))) + 1
                text = f"{text[:cut]}\n{text[cut:]}"
            content = text
        out.append({"from": {"user": "human", "assistant": "gpt"}.get(message["role"], "system"), "value": content})
    return out


def _openai_content(content: Any, files: dict[int, str]) -> Any:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
            continue
        kind = part["type"].partition("_")[0]
        value = part.get(kind, part.get(part["type"]))
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": files[id(value)]}})
    return parts


def _write_tar(samples: Iterable[Sample], path: Path) -> int:
    count = 0
    with atomic(path) as temporary, tarfile.open(temporary, "w") as archive:
        for count, sample in enumerate(samples, 1):
            stem = f"{count - 1:08d}"
            row: dict[str, Any] = {"id": sample.id, **_extras(sample, 0 if len(sample.branches) == 1 else None)}
            if len(sample.branches) == 1:
                row["conversations"] = _conversation(sample, 0)
            else:
                row["branches"] = sample.branches
            clips = []
            for i, item in enumerate(sample.media):
                if isinstance(item, VideoSource) and not _is_file(item.data):
                    names = [f"{i}.{j:05d}.png" for j in range(len(_frames(item)))]
                    for name, frame in zip(names, _frames(item)):
                        add_member(archive, f"{stem}.{name}", _png(frame))
                    clips.append(names)
                else:
                    extension, data = _encoded(item)
                    add_member(archive, f"{stem}.{i}{extension}", data)
            if clips:
                row["videos"] = clips
            add_member(archive, f"{stem}.json", dump(row))
    return count


def _write_hf(samples: Iterable[Sample], path: Path) -> int:
    rows, count = [], 0
    for sample in samples:
        count += 1
        images = [{"bytes": _encoded(m)[1], "path": None} for m in sample.media if isinstance(m, ImageSource)]
        clips = []
        for item in sample.media:
            if isinstance(item, VideoSource):
                if _is_file(item.data):
                    raise InputError(f"{item.name}: a clip file does not fit 'hf'; write webdataset, llava or openai")
                clips.append([{"bytes": _png(frame), "path": None} for frame in _frames(item)])
        for b in range(len(sample.branches)):
            rows.append(
                {
                    "id": sample.id if len(sample.branches) == 1 else f"{sample.id}#{b}",
                    "images": images,
                    "videos": clips,
                    "conversations": _conversation(sample, b),
                    "meta": json.dumps(_extras(sample, b)),
                }
            )
    with atomic(path) as temporary:
        write_parquet(rows, temporary)
    return count


def _save(item: Media, folder: Path, stem: str) -> str:
    """Write the media into `folder`; returns its path relative to the folder's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(item, VideoSource) and not _is_file(item.data):
        clip = folder / stem
        clip.mkdir(exist_ok=True)
        for j, frame in enumerate(_frames(item)):
            with atomic(clip / f"{j:05d}.png") as temporary:
                temporary.write_bytes(_png(frame))
        return f"{folder.name}/{stem}"
    extension, data = _encoded(item)
    with atomic(folder / f"{stem}{extension}") as temporary:
        temporary.write_bytes(data)
    return f"{folder.name}/{stem}{extension}"


def _is_file(data: Any) -> bool:
    return isinstance(data, bytes | bytearray) or (isinstance(data, str | Path) and not Path(data).is_dir())


def _frames(item: VideoSource) -> list[Any]:
    """Pictures of a clip that is a folder, list or array."""
    from foveate.data.video import frame_files

    if isinstance(item.data, str | Path):
        return list(frame_files(Path(item.data), item.name))
    return list(item.data)


def _encoded(item: Media) -> tuple[str, bytes]:
    """(extension, bytes): files as they are, arrays and PIL images as PNG."""
    data = item.data
    if isinstance(data, str | Path):
        path = Path(data)
        try:
            return path.suffix.lower() or ".bin", path.read_bytes()
        except OSError as error:
            raise InputError(f"{item.name}: cannot be read ({error.strerror})") from None
    if isinstance(data, bytes | bytearray):
        if isinstance(item, VideoSource):
            return Path(item.name).suffix.lower() or ".mp4", bytes(data)
        return _picture_suffix(bytes(data)), bytes(data)
    return ".png", _png(item)


def _picture_suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _EXTENSION.get(image.format or "", ".png")
    except Exception:  # the reader will say what is wrong with it
        return ".png"


def _png(frame: Any) -> bytes:
    source = frame if isinstance(frame, ImageSource) else ImageSource(frame)
    out = io.BytesIO()
    load_image(source).save(out, "PNG", compress_level=1)
    return out.getvalue()
