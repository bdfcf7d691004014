"""Opening pictures: any of the forms people have, one RGB image out, one clear error for each ugly file."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from foveate.clock import OPENING, charge
from foveate.data.sample import ImageSource
from foveate.data.spec import PreprocessSpec
from foveate.errors import InputError

ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEFAULTS = PreprocessSpec()


def image_size(source: ImageSource, spec: PreprocessSpec = _DEFAULTS) -> tuple[int, int]:
    """(width, height) as it will be after EXIF rotation, from the header alone; no pixels are decoded.

    Raises InputError for a file that is missing, empty, not a picture, or outside the limits of `spec`.
    """
    data = source.data
    if isinstance(data, np.ndarray):
        size = _array_size(data, source.name)
    elif isinstance(data, Image.Image):
        size = _rotated(data.size, _orientation(data))
    else:
        with _open(data, source.name) as image:
            size = _rotated(image.size, _orientation(image))
    check_size(size, source.name, spec)
    return size


def load_image(source: ImageSource | Any, spec: PreprocessSpec = _DEFAULTS) -> Image.Image:
    """The picture as a PIL RGB image: first frame, EXIF rotation applied, 16 bits scaled to 8, alpha dropped.

    Alpha is dropped and not composited, as in the official NVILA code. A PIL image that is RGB already is returned
    itself, not copied. Raises InputError as `image_size` does, and for
    a file that is damaged or cut short.
    """
    if not isinstance(source, ImageSource):
        source = ImageSource(source)
    with charge(OPENING):
        return _load(source, spec)


def _load(source: ImageSource, spec: PreprocessSpec) -> Image.Image:
    data = source.data
    if isinstance(data, np.ndarray):
        check_size(_array_size(data, source.name), source.name, spec)
        return Image.fromarray(_array_rgb(data, source.name))
    with nullcontext(data) if isinstance(data, Image.Image) else _open(data, source.name) as image:
        orientation = _orientation(image)
        check_size(_rotated(image.size, orientation), source.name, spec)
        return _decode(image, orientation, source.name)


def check_size(size: tuple[int, int], name: str, spec: PreprocessSpec) -> None:
    """Raise InputError when a picture or clip of (width, height) is empty, too large or too long and thin."""
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name}: {width}x{height} has no pixels; the smallest picture is 1x1")
    if width * height > spec.max_pixels:
        raise InputError(
            f"{name}: {width}x{height} is {width * height:,} pixels; the limit is {spec.max_pixels:,} (max_pixels); "
            "make the picture smaller"
        )
    ratio = max(size) / min(size)
    if ratio > spec.max_aspect:
        raise InputError(
            f"{name}: {width}x{height}, one side is {ratio:,.0f} times the other; the limit is {spec.max_aspect:g} "
            "(max_aspect); crop the picture"
        )


def is_animated(path: Path) -> bool:
    """Whether the file holds more than one frame; False when it cannot be read."""
    try:
        with _open(path, str(path)) as image:
            return getattr(image, "n_frames", 1) > 1
    except InputError:
        return False


def from_data_url(url: str) -> tuple[str, bytes]:
    """(kind, bytes) of a base64 `data:` address, kind "image" or "video". Raises InputError if it is malformed."""
    head, comma, body = url.partition(",")
    kind = head[len("data:") :].split("/")[0].lower()
    if not comma or kind not in ("image", "video") or not head.endswith(";base64"):
        raise InputError(f"{head[:60]}: expected data:image/…;base64,… or data:video/…;base64,…")
    try:
        return kind, base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{head[:60]}: the base64 text is damaged ({error})") from None


def _open(data: Any, name: str) -> Image.Image:
    """PIL image with only its header read."""
    if isinstance(data, bytes | bytearray | memoryview):
        handle: Any = io.BytesIO(data)
    elif isinstance(data, str | Path):
        handle = Path(data)
        if not handle.exists():
            raise InputError(f"{name}: no such file")
        if handle.is_dir():
            raise InputError(f"{name}: this is a folder, not a picture; pass it as a video to read its frames")
    else:
        raise InputError(
            f"{name}: a picture cannot be made from {type(data).__name__}; "
            "give a path, bytes, a PIL image or an array [height, width, 3]"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked against our own limit right after
            return Image.open(handle)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: a decompression bomb: {_line(error)} (limit of Pillow); make the picture smaller"
        ) from None
    except Exception as error:  # decoders raise anything on hostile bytes
        empty = len(data) == 0 if isinstance(data, bytes | bytearray) else _is_empty(handle)
        why = "the file is empty" if empty else f"not a picture that can be read ({_line(error)})"
        raise InputError(f"{name}: {why}; use PNG, JPEG, WebP, GIF, BMP or TIFF") from None


def _decode(image: Image.Image, orientation: int, name: str) -> Image.Image:
    try:
        if getattr(image, "n_frames", 1) > 1 and image.tell() != 0:
            image.seek(0)
        image.load()
        rgb = image if image.mode == "RGB" else _to_rgb(image)
        return rgb.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else rgb
    except InputError:
        raise
    except Exception as error:  # decoders raise anything on hostile bytes
        raise InputError(f"{name}: the picture is damaged or cut short ({_line(error)}); get a complete file") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Modes with more than 8 bits are scaled, where PIL's own conversion would clip them to white."""
    if image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
        return Image.fromarray((array >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_array_rgb(np.asarray(image), "picture"))
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 when there is none. Reads the header only."""
    if isinstance(image, PngImageFile) and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look behind the pixels
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1


def _rotated(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if 5 <= orientation <= 8 else size


def _array_size(array: np.ndarray, name: str) -> tuple[int, int]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"{name}: an array of shape {array.shape}; a picture is [height, width] or [height, width, 3]")
    return int(array.shape[1]), int(array.shape[0])


def _array_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """[H, W, 3] uint8 from any numeric array: floats in 0..1, integers of more than 8 bits scaled when they need it."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{name}: the array holds NaN or infinite values")
        array = array * (255.0 if array.size and array.max() <= 1.0 else 1.0)
        array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array >> 8 if array.size and array.max() > 255 else array
        array = np.clip(array, 0, 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: an array of {array.dtype}; a picture holds uint8, uint16 or floats in 0..1")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])


def _is_empty(path: Any) -> bool:
    return isinstance(path, Path) and path.stat().st_size == 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
