"""Opening clips: files by PyAV (gif too), folders of frames, arrays and lists; which frames to take, and their pixels.

The number of frames is counted from the packets of the file, not believed from its header, and frames are found by
their time stamps, so a wrong header, a missing frame rate or an edit list does not shift them.
"""

from __future__ import annotations

import bisect
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.clock import OPENING, charge
from foveate.data.images import check_size, image_size, load_image
from foveate.data.sample import IMAGE_SUFFIXES, ImageSource, VideoSource
from foveate.data.spec import PreprocessSpec
from foveate.errors import InputError

_log = logging.getLogger("foveate")
_DEFAULTS = PreprocessSpec()


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What is known of a clip without decoding it: size (width, height) after rotation, frames, frames per second.

    fps is 0 when unknown. seconds: presentation time of each frame, or empty. stamps: time stamps of the frames in
    presentation order, and keys: positions of those a decoder can start from (both empty when not a file).
    """

    size: tuple[int, int]
    num_frames: int
    fps: float
    seconds: tuple[float, ...] = ()
    stamps: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    def time(self, index: int) -> float:
        """Seconds of frame `index` from the first frame."""
        return self.seconds[index] if self.seconds else index / self.fps if self.fps else 0.0


def sample_frames(
    available: int, num_frames: int, video_fps: float = 0.0, fps: float = 0.0, *, repeat: bool = True
) -> tuple[int, ...]:
    """Indices of the frames to take, ascending.

    fps = 0: `num_frames` indices spread evenly from the first to the last; a shorter clip repeats frames (the official
    rule), or gives each frame once with repeat=False. fps > 0: one frame every 1/fps seconds, at most `num_frames`;
    when the clip's own rate is unknown (0), evenly as above (the official code returns nothing there).
    """
    if fps > 0 and video_fps > 0:
        taken = [int(i / fps * video_fps) for i in range(num_frames)]
        return tuple(i for i in taken if i < available)
    if not repeat:
        num_frames = min(num_frames, available)
    return tuple(int(i) for i in np.round(np.linspace(0, available - 1, num_frames)).astype(np.int64))


def natural_key(name: str) -> list[Any]:
    """Sort key under which `frame2` comes before `frame10`."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def frame_files(folder: Path, name: str) -> list[Path]:
    """Picture files of a folder in natural order. Raises InputError when there are none."""
    files = sorted(
        (f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")),
        key=lambda f: natural_key(f.name),
    )
    if not files:
        raise InputError(f"{name}: the folder holds no pictures; frames are read from png, jpg, webp, bmp, tif or gif")
    return files


def probe_video(source: VideoSource, spec: PreprocessSpec = _DEFAULTS) -> VideoInfo:
    """Size, frame count and rate of a clip; at most one frame of a file is decoded.

    Raises InputError when it is missing, unreadable, empty, or outside the limits of `spec`.
    """
    frames = _as_frames(source)
    if frames is None:
        info = _probe_file(source)
    else:
        if len(frames) == 0:
            raise InputError(f"{source.name}: the clip has no frames; it needs at least one")
        info = VideoInfo(image_size(frames(0), spec), len(frames), float(source.fps))
    check_size(info.size, source.name, spec)
    return info


def decode_frames(
    source: VideoSource,
    indices: Sequence[int],
    info: VideoInfo | None = None,
    spec: PreprocessSpec = _DEFAULTS,
    convert: Callable[[Image.Image], Any] | None = None,
) -> list[Any]:
    """The frames at `indices` as PIL RGB images, or as convert(image); each distinct frame is decoded once.

    A frame of a file that cannot be decoded is replaced by the nearest one before it, with a warning that counts them.
    Raises InputError when none can be decoded, or when a picture of a folder or list is damaged.
    """
    convert = convert or (lambda image: image)
    wanted = sorted(set(indices))
    frames = _as_frames(source)
    if frames is not None:
        done = {i: convert(load_image(frames(i), spec)) for i in wanted}
    else:
        with charge(OPENING):
            done = _decode_file(source, wanted, info or _probe_file(source), _cutting(convert))
    return [done[i] for i in indices]


def _cutting(convert: Callable[[Image.Image], Any]) -> Callable[[Image.Image], Any]:
    """`convert`, whose time is not that of decoding."""

    def cut(image: Image.Image) -> Any:
        with charge("preprocess"):
            return convert(image)

    return cut


class _Frames:
    """Pictures of a folder, list or array, by index."""

    def __init__(self, items: Sequence[Any], name: str) -> None:
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def __call__(self, index: int) -> ImageSource:
        item = self.items[index]
        named = str(item) if isinstance(item, str | Path) else f"{self.name}, frame {index}"
        return item if isinstance(item, ImageSource) else ImageSource(item, named)


def _as_frames(source: VideoSource) -> _Frames | None:
    """The pictures of a clip that is not a file, else None."""
    data = source.data
    if isinstance(data, np.ndarray):
        if data.ndim != 4:
            raise InputError(f"{source.name}: an array of shape {data.shape}; a clip is [frames, height, width, 3]")
        return _Frames(data, source.name)
    if isinstance(data, list | tuple):
        return _Frames(data, source.name)
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.exists():
            raise InputError(f"{source.name}: no such file or folder")
        return _Frames(frame_files(path, source.name), source.name) if path.is_dir() else None
    if isinstance(data, bytes | bytearray | memoryview):
        return None
    raise InputError(
        f"{source.name}: a clip cannot be made from {type(data).__name__}; give a file, a folder of frames, bytes, "
        "a list of pictures or an array [frames, height, width, 3]"
    )


def _open(source: VideoSource) -> Any:
    import av

    data = source.data
    try:
        file = str(data) if isinstance(data, str | Path) else io.BytesIO(data)
        container = av.open(file)
    except Exception as error:  # FFmpeg raises anything on hostile bytes
        raise InputError(
            f"{source.name}: not a clip that can be read ({_line(error)}); use mp4, mkv, webm or gif"
        ) from None
    if not container.streams.video:
        container.close()
        raise InputError(f"{source.name}: the file holds no video stream")
    return container


def _probe_file(source: VideoSource) -> VideoInfo:
    size = _first_size(source)
    with _open(source) as container:
        stream = container.streams.video[0]
        packets = [(p.pts, p.is_keyframe) for p in _packets_of(container, stream) if p.size and not p.is_discard]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        base = float(stream.time_base or 0)
    if size is None or not packets:
        raise InputError(f"{source.name}: no frame can be decoded (empty, damaged or an unknown codec)")
    if any(pts is None for pts, _ in packets) or len({pts for pts, _ in packets}) < len(packets):
        return VideoInfo(size, len(packets), rate)  # no usable time stamps: frames are counted
    packets.sort()
    stamps = tuple(pts for pts, _ in packets)
    seconds = tuple((pts - stamps[0]) * base for pts in stamps) if base else ()
    if not 0 < rate < 1000:
        rate = (len(stamps) - 1) / seconds[-1] if seconds and seconds[-1] > 0 else 0.0
    keys = tuple(i for i, (_, key) in enumerate(packets) if key)
    return VideoInfo(size, len(packets), rate, seconds, stamps, keys)


def _first_size(source: VideoSource) -> tuple[int, int] | None:
    """(width, height) of the first frame that decodes, after the rotation that phones store beside the pixels."""
    with _open(source) as container:
        for frame in _frames_of(container, container.streams.video[0]):
            return (frame.height, frame.width) if _turns(frame) % 2 else (frame.width, frame.height)
    return None


def _frames_of(container: Any, stream: Any) -> Any:
    """Decoded frames from the current position; damaged packets are passed over."""
    for packet in _packets_of(container, stream):
        try:
            yield from packet.decode()
        except Exception:  # the next key frame mends the stream
            continue


def _packets_of(container: Any, stream: Any) -> Any:
    try:
        yield from container.demux(stream)
    except Exception:  # the file ends in the middle of a packet
        return


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that set the frame upright."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _picture(frame: Any) -> Image.Image:
    array = frame.to_ndarray(format="rgb24")
    turns = _turns(frame)
    return Image.fromarray(np.ascontiguousarray(np.rot90(array, turns)) if turns else array)


def _decode_file(
    source: VideoSource, wanted: Sequence[int], info: VideoInfo, convert: Callable[[Image.Image], Any]
) -> dict[int, Any]:
    """{index: converted frame} for the sorted indices `wanted`."""
    done: dict[int, Any] = {}
    with _open(source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if info.stamps:
            _decode_by_stamp(container, stream, wanted, info, convert, done)
        else:
            for i, frame in zip(range(wanted[-1] + 1), _frames_of(container, stream)):
                if i in wanted:
                    done[i] = convert(_picture(frame))
    missing = [i for i in wanted if i not in done]
    if missing:
        if not done:
            raise InputError(
                f"{source.name}: none of the {len(wanted)} frames asked for can be decoded; encode it anew"
            )
        _log.warning(
            "%s: %d of %d frames cannot be decoded; the nearest ones stand in", source.name, len(missing), len(wanted)
        )
        good = sorted(done)
        for i in missing:
            done[i] = done[good[max(bisect.bisect_left(good, i) - 1, 0)]]
    return done


def _decode_by_stamp(
    container: Any,
    stream: Any,
    wanted: Sequence[int],
    info: VideoInfo,
    convert: Callable[[Image.Image], Any],
    done: dict[int, Any],
) -> None:
    """Decode forward, and jump to the key frame before the next wanted frame when that skips frames."""
    index = {stamp: i for i, stamp in enumerate(info.stamps)}
    todo = list(wanted)

    def start_for(i: int) -> int:
        at = bisect.bisect_right(info.keys, i) - 1
        return info.keys[at] if at >= 0 else 0

    while todo:
        start = start_for(todo[0])
        container.seek(info.stamps[start], stream=stream, backward=True, any_frame=False)
        position = start - 1
        for frame in _frames_of(container, stream):
            position = index.get(frame.pts, position)
            while todo and position > todo[0]:
                todo.pop(0)  # passed over: it could not be decoded
            if todo and position == todo[0]:
                done[todo.pop(0)] = convert(_picture(frame))
            if not todo:
                return
            if start_for(todo[0]) > max(position + 1, start):
                break
        else:
            return


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
