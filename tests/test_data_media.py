"""Pictures and clips in every shape people have them: one RGB picture out, or one clear line of error."""

from __future__ import annotations

import base64
import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data import video
from foveate.data.images import image_size, load_image
from foveate.data.sample import ImageSource, VideoSource, as_media
from foveate.data.spec import PreprocessSpec
from foveate.data.video import decode_frames, natural_key, probe_video, sample_frames
from foveate.errors import InputError

RNG = np.random.default_rng(1)


def _saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _gradient(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), 0 * x], -1).astype(np.uint8)


# ---- pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(_gradient(7, 5))
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert("L" if mode == "LAB" else mode)
    source = ImageSource(image)
    assert image_size(source) == (7, 5)
    out = load_image(source)
    assert (out.mode, out.size) == ("RGB", (7, 5))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """The size is known from the header; the pixels are as PIL's own transposition makes them."""
    from PIL import ImageOps

    picture = Image.fromarray(_gradient(9, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG", "WEBP"):
        data = _saved(picture, format, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert image_size(ImageSource(data)) == expected.size
        assert np.array_equal(np.asarray(load_image(ImageSource(data))), np.asarray(expected.convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, 2)
    for source in (ImageSource(_saved(Image.fromarray(values))), ImageSource(values)):
        assert np.array_equal(np.asarray(load_image(source)), expected)


def test_arrays() -> None:
    gradient = _gradient(6, 4)
    assert np.array_equal(np.asarray(load_image(ImageSource(gradient / 255.0))), gradient)
    assert np.asarray(load_image(ImageSource(gradient[:, :, 0] > 99))).max() == 255
    alpha = np.dstack([gradient, gradient[:, :, 0]])
    assert np.array_equal(np.asarray(load_image(ImageSource(alpha))), gradient)
    for bad, why in ((np.zeros((2, 2, 2), np.uint8), "shape"), (np.full((2, 2), np.nan), "NaN")):
        with pytest.raises(InputError, match=why):
            load_image(ImageSource(bad))


def test_animated_picture_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(ImageSource(data)).getpixel((0, 0)) == (255, 0, 0)
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert load_image(ImageSource(opened)).getpixel((0, 0)) == (255, 0, 0)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (_png_header(20000, 20000), r"bomb|89,478,485"),
        (_png_header(9999, 9999), "99,980,001 pixels; the limit is 89,478,485"),
        (_png_header(1, 30000), r"1x30000, one side is 30,000 times the other; the limit is 200"),
        (_saved(Image.new("RGB", (30000, 1))), "the limit is 200"),
        (b"", "the file is empty"),
        (b"GIF89a", "not a picture"),
        (b"<html>", "not a picture"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("RGB", (0, 7)), "no pixels"),
        (3.5, "cannot be made from float"),
    ],
    ids=["bomb", "large", "1x30000", "30000x1", "empty", "cut", "html", "0 rows", "0 columns", "type"],
)
def test_ugly_pictures_fail_at_the_header(data: Any, expected: str) -> None:
    source = ImageSource(data, "ugly.png")
    for function in (image_size, load_image):
        with pytest.raises(InputError, match=expected) as found:
            function(source)
        assert str(found.value).startswith("ugly.png: ")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_pictures_fail_when_loaded(format: str, tmp_path: Path) -> None:
    data = _saved(Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)), format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cut\.\w+: ") as found:
        load_image(ImageSource(path))
    assert "\n" not in str(found.value)


def test_limits_come_from_the_spec() -> None:
    spec = PreprocessSpec("resize", max_pixels=100, max_aspect=3)
    assert image_size(ImageSource(_gradient(10, 10)), spec) == (10, 10)
    with pytest.raises(InputError, match="limit is 100"):
        image_size(ImageSource(_gradient(11, 10)), spec)
    with pytest.raises(InputError, match="limit is 3"):
        image_size(ImageSource(_gradient(8, 2)), spec)


# ---- what kind of media a value is


def test_as_media(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), "red")
    (tmp_path / "still.gif").write_bytes(_saved(red, "GIF"))
    moving = _saved(red, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    (tmp_path / "moving.gif").write_bytes(moving)
    url = "data:image/png;base64," + base64.b64encode(_saved(red)).decode()
    kinds = {
        "image": [tmp_path / "still.gif", "a.png", red, np.zeros((4, 4, 3), np.uint8), url, _saved(red)],
        "video": [tmp_path / "moving.gif", "a.MP4", tmp_path, [red], np.zeros((2, 4, 4, 3), np.uint8)],
    }
    for kind, values in kinds.items():
        assert [as_media(value).kind for value in values] == [kind] * len(values)
    assert load_image(as_media(url)).getpixel((0, 0)) == (255, 0, 0)
    for bad, why in (
        ("http://x.org/a.png", "not fetched"),
        ("HTTPS://x.org/a.png", "not fetched"),
        ("data:image/png;base64,*", "damaged"),
        ("data:text/html;base64,aaaa", "expected data:image"),
    ):
        with pytest.raises(InputError, match=why):
            as_media(bad)
    with pytest.raises(InputError, match="a clip where a picture"):
        as_media(VideoSource([red]), "image")


# ---- clips


def _clip(path: Path, frames: int = 40, rate: int = 10, gop: int = 8) -> Path:
    """A clip, with frames stored out of order, whose frame i is uniformly grey at 5 * i + 20."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "1", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 48, "yuv420p", gop
        for i in range(frames):
            array = np.full((48, 32, 3), 5 * i + 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path


def _levels(frames: list[Image.Image]) -> list[int]:
    """Index of each frame, read back from its grey level."""
    return [round((float(np.asarray(f).mean()) - 20) / 5) for f in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov"])
def test_clip_files(tmp_path: Path, suffix: str) -> None:
    source = VideoSource(_clip(tmp_path / f"a{suffix}"))
    info = probe_video(source)
    assert (info.size, info.num_frames, info.fps) == ((32, 48), 40, 10.0)
    for wanted in ((0, 39), (17,), (3, 3, 20, 21, 38), range(40)):
        assert _levels(decode_frames(source, list(wanted), info)) == list(wanted)
    assert info.time(20) == pytest.approx(2.0, abs=0.11)
    assert _levels(decode_frames(VideoSource(Path(source.data).read_bytes()), [5, 30])) == [5, 30]


def test_phone_clips_are_set_upright() -> None:
    """A quarter turn clockwise is stored as -90 degrees, as phones do."""
    upright = _gradient(4, 6)

    class Frame:
        rotation = -90

        def to_ndarray(self, format: str) -> np.ndarray:
            return np.rot90(upright, 1)

    assert np.array_equal(np.asarray(video._picture(Frame())), upright)


def test_gif_clip(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), (5 * i + 20,) * 3) for i in range(12)]
    path = tmp_path / "a.gif"
    path.write_bytes(_saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100))
    source = VideoSource(path)
    info = probe_video(source)
    assert (info.size, info.num_frames) == ((20, 10), 12)
    assert _levels(decode_frames(source, [0, 4, 11], info)) == [0, 4, 11]


def test_clip_with_a_wrong_header(tmp_path: Path) -> None:
    """A raw stream has no frame count, no time stamps, and cannot be searched."""
    path = _clip(tmp_path / "a.h264")
    info = probe_video(VideoSource(path))
    assert info.num_frames == 40
    wanted = list(sample_frames(info.num_frames, 8, info.fps))
    assert _levels(decode_frames(VideoSource(path), wanted, info)) == wanted
    single = VideoSource(_clip(tmp_path / "b.h264", frames=1))
    assert _levels(decode_frames(single, [0], probe_video(single))) == [0]


def test_truncated_clip_gives_what_is_there(tmp_path: Path) -> None:
    path = _clip(tmp_path / "a.mkv", frames=40)
    path.write_bytes(path.read_bytes()[:-600])
    info = probe_video(VideoSource(path))
    assert 2 < info.num_frames < 40
    wanted = [0, info.num_frames // 2]
    assert _levels(decode_frames(VideoSource(path), wanted, info)) == wanted


def test_frames_that_do_not_decode_are_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = VideoSource(_clip(tmp_path / "a.mp4"))
    info = probe_video(source)
    (tmp_path / "b.mp4").write_bytes(_clip(tmp_path / "c.mp4", frames=20).read_bytes())
    with caplog.at_level(logging.WARNING, "foveate"):
        frames = decode_frames(VideoSource(tmp_path / "b.mp4"), [3, 18, 39], info)
    assert _levels(frames) == [3, 18, 18]
    assert "1 of 3 frames" in caplog.text


@pytest.mark.parametrize("data", [b"", b"nonsense" * 99, "missing.mp4", np.zeros((3, 4, 4), np.uint8), [], 7])
def test_ugly_clips(data: Any) -> None:
    with pytest.raises(InputError, match=r"^ugly: [^\n]+$"):
        probe_video(VideoSource(data, "ugly"))


def test_folder_of_frames_sorts_naturally(tmp_path: Path) -> None:
    for i in range(12):
        Image.new("RGB", (6, 6), (5 * i + 20,) * 3).save(tmp_path / f"f{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    source = VideoSource(tmp_path)
    assert probe_video(source).num_frames == 12
    assert _levels(decode_frames(source, range(12))) == list(range(12))
    assert sorted(["f10", "f2", "F1"], key=natural_key) == ["F1", "f2", "f10"]
    (tmp_path / "f3.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"f3\.png: not a picture"):
        decode_frames(source, [3])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        probe_video(VideoSource(empty))


def test_sample_frames() -> None:
    assert sample_frames(3, 8) == (0, 0, 1, 1, 1, 1, 2, 2)
    assert sample_frames(3, 8, repeat=False) == (0, 1, 2)
    assert sample_frames(100, 4, 30, 2.0) == (0, 15, 30, 45)
    assert sample_frames(100, 4, 0, 2.0) == (0, 33, 66, 99)  # the clip's rate is unknown
    assert sample_frames(1, 1) == (0,)


def test_real_clips() -> None:
    folder = os.environ.get("FOVEATE_DATA")
    if not folder or not Path(folder, "photos-videos").is_dir():
        pytest.skip("FOVEATE_DATA does not name the folder of public sets")
    for name, frames in (("realshort.mp4", 36), ("newtonscradle.gif", 36), ("car-detection.mp4", 377)):
        source = VideoSource(Path(folder, "photos-videos", name))
        info = probe_video(source)
        assert info.num_frames == frames
        assert len(decode_frames(source, sample_frames(frames, 4), info)) == 4
