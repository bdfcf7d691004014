"""The families of transformers: our plans and pixels equal their own processors, and layouts say where tokens lie."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from families_hf import FAMILIES, Tiny, picture, tiny, tokenizer_of
from foveate.adapters.layout import NEWLINE, PADDING, VALID
from foveate.adapters.layouts import layout, mrope
from foveate.data.chat import codec, stop_token_ids
from foveate.data.execute import collate, execute, normalise
from foveate.data.families import DEFAULTS, family_spec, family_tokens, in_words, pick_frames
from foveate.data.fit import fit_clip, fit_image
from foveate.data.hf import hf_chat_template, spec_from_hf
from foveate.data.plan import Plan, plan, plan_sample
from foveate.data.sample import ImageSource, Sample, VideoSource
from foveate.data.spec import PreprocessSpec
from foveate.data.video import VideoInfo
from foveate.errors import BudgetError, CheckpointError, InputError, UnsupportedError

QUICK = settings(max_examples=20, deadline=None)
SIZES = [(160, 120), (40, 90), (56, 56), (9, 5), (300, 20), (20, 310)]
VIDEO_FAMILIES = [family for family in FAMILIES if DEFAULTS[family].get("video_token")]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny checkpoints, by family."""
    with pytest.MonkeyPatch.context() as patch:
        yield {family: tiny(family, tmp_path_factory.mktemp(family), patch) for family in FAMILIES}


def _messages(*pictures: Any, text: str = "Which?", kind: str = "image") -> list[dict[str, Any]]:
    parts = [{"type": kind, kind: item} for item in pictures]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
    ]


def _bare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages in the form of transformers: parts everywhere, media without payload."""
    return [
        {
            "role": m["role"],
            "content": [{"type": "text", "text": m["content"]}]
            if isinstance(m["content"], str)
            else [part if part["type"] == "text" else {"type": part["type"]} for part in m["content"]],
        }
        for m in messages
    ]


def _as_model_takes_it(one: Tiny, made: Plan) -> np.ndarray:
    """Pixels as the model's `pixel_values`: views one after the other, or Qwen's rows of patches."""
    rows = []
    for item in execute(made).media:
        pixels = normalise(item.pixels, one.spec)
        if one.spec.mode == "native":
            p, m, t = one.spec.patch_size, one.spec.downsample, one.spec.temporal_patch
            if item.kind == "image":
                pixels = pixels.repeat_interleave(t, 0)
            units, height, width = item.grid
            cut = pixels.view(units, t, 3, height // m, m, p, width // m, m, p)
            pixels = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(units * height * width, -1)
        rows.append(pixels)
    return torch.cat(rows).numpy()


# ---- against the processors of transformers


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_picture_equals_transformers(tinies: dict[str, Tiny], family: str, size: tuple[int, int]) -> None:
    _compare(tinies[family], [picture(*size)])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_equal_transformers(tinies: dict[str, Tiny], family: str) -> None:
    _compare(tinies[family], [picture(90, 70), picture(50, 130, seed=1)])


PADS = "llava.image_processing_pil_llava:LlavaImageProcessorPil"
SQUASHES = "siglip.image_processing_pil_siglip:SiglipImageProcessorPil"
SQUARE = {"size": {"height": 56, "width": 56}}


@pytest.mark.parametrize(
    ("mode", "image", "changes"),
    [
        ("crop", "", {"size": {"shortest_edge": 70}}),
        ("crop", "", {"size": {"shortest_edge": 41}, "resample": 2}),  # black around it
        ("pad", PADS, {"do_pad": True}),
        ("resize", SQUASHES, {**SQUARE, "crop_size": None}),
    ],
    ids=["cut", "black", "pad", "squash"],
)
def test_other_ways_of_llava_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, image: str, changes: dict[str, Any]
) -> None:
    one = tiny("llava", tmp_path, monkeypatch, image, **changes)
    assert one.spec.mode == mode
    for size in SIZES:
        _compare(one, [picture(*size), picture(30, 40)])


def test_pictures_that_are_not_split_equal_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny("idefics3", tmp_path, monkeypatch, do_image_splitting=False)
    _compare(one, [picture(90, 70)])
    assert layout(plan(_messages(picture(90, 70)), one.spec, one.tokenizer)).global_row.max() == one.spec.token_side - 1


def _compare(one: Tiny, pictures: list[Image.Image]) -> None:
    messages = _messages(*pictures)
    made = plan(messages, one.spec, one.tokenizer)
    expected = one.reference(_bare(messages), pictures)
    assert made.input_ids.tolist() == expected["input_ids"][0].tolist()
    ours, theirs = _as_model_takes_it(one, made), np.asarray(expected["pixel_values"])
    if one.spec.mode in ("anyres", "split") and theirs.ndim == 5:  # padded to the largest number of views
        counts = [len(item.views) for item in made.media]
        groups = theirs if len(theirs) == len(counts) else [theirs[0]]
        counts = counts if len(theirs) == len(counts) else [sum(counts)]
        theirs = np.concatenate([group[:count] for group, count in zip(groups, counts)])
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
    if "image_grid_thw" in expected:
        assert [list(item.grid) for item in execute(made).media] == expected["image_grid_thw"].tolist()


# ---- clips, against the rules of the video processors (which need torchvision to run whole)


def _clip(frames: int, width: int = 64, height: int = 40, fps: float = 0.0) -> VideoSource:
    return VideoSource([picture(width, height, seed) for seed in range(frames)], fps=fps)


@pytest.mark.parametrize("fps", [0.0, 4.0])
@pytest.mark.parametrize("frames", [1, 5, 8])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_prompt_of_a_clip_equals_transformers(tinies: dict[str, Tiny], family: str, frames: int, fps: float) -> None:
    from transformers.video_utils import VideoMetadata

    one = tinies[family]
    messages = _messages(_clip(frames, fps=fps), kind="video")
    made = plan(messages, one.spec, one.tokenizer)
    (item,) = made.media
    pixels = execute(made).media[0]
    distinct = len(dict.fromkeys(item.frames))
    metadata = VideoMetadata(
        total_num_frames=frames,
        fps=fps or None,
        duration=frames / fps if fps else None,
        frames_indices=list(dict.fromkeys(item.frames)),
    )
    stack = np.zeros((distinct, 3, 2, 2))
    inputs = {
        "pixel_values_videos": [stack],
        "pixel_values": stack[None],
        "video_grid_thw": np.array([pixels.grid]),
        "video_metadata": [metadata],
    }
    text = one.tokenizer.apply_chat_template(_bare(messages), tokenize=False, add_generation_prompt=True)
    text = text.replace(one.spec.video_token, one.processor.replace_video_token(inputs, 0))
    assert made.input_ids.tolist() == one.tokenizer(text).input_ids
    if family == "qwen2_5_vl":
        assert item.seconds_per_unit == pytest.approx(2 / metadata.sampled_fps)


@pytest.mark.parametrize(("total", "fps"), [(1, 25.0), (3, 30.0), (40, 10.0), (100, 24.0), (977, 29.97), (90000, 25.0)])
@pytest.mark.parametrize("wanted", [None, 1, 4, 16])
def test_frames_equal_transformers(total: int, fps: float, wanted: int | None) -> None:
    """Qwen3-VL, SmolVLM and the base rule run; the others' formulas are spelled out with torch, as they are there."""
    from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    info = VideoInfo((64, 40), total, fps)
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)

    def ours(family: str) -> list[int]:
        return list(pick_frames(info, family_spec(family), wanted))

    few = None if wanted is None else min(wanted, total)
    theirs = Qwen3VLVideoProcessor().sample_frames(metadata, num_frames=few, fps=None if few else 2).tolist()
    assert ours("qwen3_vl") == [*theirs, *theirs[-1:] * (len(theirs) % 2)]
    most = wanted or 64
    assert ours("smolvlm") == SmolVLMVideoProcessor().sample_frames(metadata, num_frames=most, fps=1).tolist()
    most = few or min(32, total)
    base = LlavaOnevisionVideoProcessor().sample_frames(metadata, num_frames=most).tolist()
    assert ours("llava_onevision") == base
    most = few or min(8, total)
    shifted = torch.arange(total / most / 2, total, total / most).int().tolist()
    assert list(pick_frames(info, family_spec("internvl", num_frames=8), wanted)) == shifted
    if few == 1:
        assert ours("qwen2_5_vl") == [0, 0]  # there an error: none is left of one frame rounded to pairs
    elif total > 1:
        count = min(max(total / fps * 2, 4), total // 2 * 2, 768) if few is None else max(round(few / 2) * 2, 2)
        count = int(min(count, total) // 2 * 2)
        assert ours("qwen2_5_vl") == torch.arange(0, total, total / count).int().tolist()


def test_sizes_of_frames_equal_transformers() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as of_a_frame
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_a_clip
    from transformers.models.smolvlm.video_processing_smolvlm import get_resize_output_image_size

    old, new, smol = (family_spec(f) for f in ("qwen2_5_vl", "qwen3_vl", "smolvlm"))
    for width, height in ((640, 480), (1920, 1080), (20, 50), (1000, 31), (3000, 4000)):
        expected = of_a_frame(height, width, 28, old.video_min_area, old.video_max_area)
        assert fit_clip(width, height, 8, old).view == expected[::-1]
        for frames in (2, 3, 7, 64, 768):
            expected = of_a_clip(frames, height, width, 2, 32, new.video_min_area, new.video_max_area)
            assert fit_clip(width, height, frames, new).view == expected[::-1]
        longest = get_resize_output_image_size(torch.zeros(1, height, width), smol.video_edge)
        assert fit_clip(width, height, 4, smol).canvases[0].resizes == (longest[::-1], (512, 512))


@pytest.mark.parametrize("frames", [2, 7, 64])
@pytest.mark.parametrize("size", [(1920, 1080), (300, 200), (90, 700)])
def test_caps_of_frames_equal_transformers(frames: int, size: tuple[int, int]) -> None:
    """`cap_pixels_per_frame` of the Qwen families."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    width, height = size
    new = family_spec("qwen3_vl", video_tokens=768)
    area = {"shortest_edge": new.video_min_area, "longest_edge": new.video_max_area}
    processor = Qwen3VLVideoProcessor(size=area, cap_pixels_per_frame=True)
    fit = fit_clip(width, height, frames, new)
    assert fit.num_tokens * 4 == processor.get_num_of_video_patches(frames, height, width, {})
    assert fit.num_tokens < 768 * (frames + 2)
    old = family_spec("qwen2_5_vl", video_tokens=1000)
    share = int(1000 * 28 * 28 * 0.9) * 2 // frames  # of the reference, spelled out: its class needs torchvision
    most = max(min(old.video_max_area, share), int(old.video_min_area * 1.05))
    assert fit_clip(width, height, frames, old).view == smart_resize(height, width, 28, old.video_min_area, most)[::-1]


def test_numbers_in_words() -> None:
    words = {
        1: "one",
        12: "twelve",
        20: "twenty",
        64: "sixty-four",
        100: "one hundred",
        115: "one hundred and fifteen",
        999: "nine hundred and ninety-nine",
        1000: "one thousand",
        1001: "one thousand and one",
        1234: "one thousand, two hundred and thirty-four",
    }
    assert {number: in_words(number) for number in words} == words


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rope_positions_equal_transformers(tinies: dict[str, Tiny], family: str) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    one = tinies[family]
    user = {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(90, 60)},
            {"type": "text", "text": "and"},
            {"type": "video", "video": _clip(9, fps=3.0)},
            {"type": "video", "video": _clip(4)},
            {"type": "image", "image": picture(30, 60)},
            {"type": "text", "text": "?"},
        ],
    }
    made = plan([user], one.spec, one.tokenizer)
    media = execute(made).media
    ids = torch.from_numpy(made.input_ids)[None]
    kinds = torch.zeros_like(ids)
    kinds[ids == one.tokenizer.image_token_id] = 1
    kinds[ids == one.tokenizer.video_token_id] = 2
    model = Qwen3VLModel if family == "qwen3_vl" else Qwen2_5_VLModel
    stub = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)),
        get_vision_position_ids=lambda *args, **kwargs: model.get_vision_position_ids(None, *args, **kwargs),
    )
    clips = {"second_per_grid_ts": torch.tensor([m.seconds_per_unit for m in made.media if m.kind == "video"])}
    expected, _ = model.get_rope_index(
        stub,
        ids,
        kinds,
        image_grid_thw=torch.tensor([m.grid for m in media if m.kind == "image"]),
        video_grid_thw=torch.tensor([m.grid for m in media if m.kind == "video"]),
        **(clips if family == "qwen2_5_vl" else {}),
    )
    assert torch.equal(mrope(made, 4 if family == "qwen2_5_vl" else None), expected[:, 0])


# ---- plans against their execution, and layouts


sides = st.integers(1, 400)
anything = st.one_of(st.tuples(st.just("image"), sides, sides), st.tuples(st.just("video"), sides, st.integers(1, 7)))


@QUICK
@given(family=st.sampled_from(FAMILIES), parts=st.lists(anything, min_size=1, max_size=3))
def test_plan_execution_and_layout_agree(tinies: dict[str, Tiny], family: str, parts: list[Any]) -> None:
    one = tinies[family]
    content: list[dict[str, Any]] = []
    for kind, width, other in parts:
        if kind == "video" and one.spec.video_token:
            content.append({"type": "video", "video": _clip(other, width, 50)})
        elif kind == "image" and max(width, other) <= 40 * min(width, other):
            content.append({"type": "image", "image": picture(width, other)})
    made = plan([{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}], one.spec, one.tokenizer)
    assert made.num_tokens == sum(span.length for span in made.spans)
    assert made.num_text + made.num_visual == made.num_tokens
    inputs = execute(made)
    laid = layout(made)
    assert inputs.input_ids.shape == (1, made.num_tokens)
    ids = torch.from_numpy(made.input_ids)
    placeholders = torch.tensor([codec(one.tokenizer, one.spec).image_id, codec(one.tokenizer, one.spec).video_id])
    assert torch.equal(laid.position, torch.isin(ids, placeholders).nonzero()[:, 0])
    assert len(laid) == made.num_visual and len(laid.features()) == sum(m.num_features for m in made.media)
    assert len(made.media) == len(inputs.media) == len(content)
    for index, (item, pixels) in enumerate(zip(made.media, inputs.media)):
        assert pixels.pixels.shape == (len(item.views), 3, *item.view_size[::-1])
        mine = laid[laid.media == index]
        assert len(mine) == item.num_tokens
        units = item.levels[0].units if item.kind == "video" else len(item.views)
        assert int(mine.view.min()) >= 0 and int(mine.view.max()) < units
        _check_cells(mine, item, one.spec)
    json.dumps(made.to_dict())


def _check_cells(mine: Any, item: Any, spec: PreprocessSpec) -> None:
    """Each cell of each whole is there once; separators close rows."""
    tokens = mine[mine.kind != NEWLINE]
    if item.kind == "video":
        for unit in tokens.view.unique():
            of_unit = tokens[tokens.view == unit]
            assert _cells(of_unit.row, of_unit.col) == _all_cells(*item.levels[0][1:3])
            assert (of_unit.frame == unit * item.levels[0].frames).all()
        return
    assert (mine.frame == -1).all()
    placed = tokens[tokens.global_row >= 0]
    if len(placed):
        rows, cols = int(placed.global_row.max()) + 1, int(placed.global_col.max()) + 1
        assert _cells(placed.global_row, placed.global_col) == _all_cells(rows, cols)
    for view in tokens.view.unique():
        of_view = tokens[tokens.view == view]
        assert len(set(zip(of_view.row.tolist(), of_view.col.tolist()))) == len(of_view)  # no patch twice
    whole = tokens[tokens.global_row < 0]  # base view, thumbnail
    assert len(whole) == (0 if len(item.views) == 1 else spec.token_side**2)
    newlines = mine[mine.kind == NEWLINE]
    assert len(newlines) == item.num_tokens - item.num_features
    if item.kept is not None:
        assert newlines.global_row.tolist() == list(range(item.levels[1].rows))
        after = (mine.kind == NEWLINE).nonzero()[:, 0]
        assert (mine.global_row[after - 1] == newlines.global_row).all() or item.levels[1].cols == 0


def _cells(row: torch.Tensor, col: torch.Tensor) -> list[tuple[int, int]]:
    return sorted(zip(row.tolist(), col.tolist()))


def _all_cells(rows: int, cols: int) -> list[tuple[int, int]]:
    return [(row, col) for row in range(rows) for col in range(cols)]


def _slope(width: int, height: int) -> Image.Image:
    """Red tells the column and green the row, from 0 to 255."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255)
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(320, 240), (150, 400), (400, 90)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_finds_the_place_in_the_picture(tinies: dict[str, Tiny], family: str, size: tuple[int, int]) -> None:
    """The pixels under a token are those of its place in the whole picture, and of its view's box."""
    one = tinies[family]
    made = plan(_messages(_slope(*size)), one.spec, one.tokenizer)
    (item,), (pixels,) = made.media, execute(made).media
    tokens = layout(made).features()
    cell = one.spec.patch_size * one.spec.downsample
    rows, cols = int(tokens.global_row.max()) + 1, int(tokens.global_col.max()) + 1
    worst = 0.0
    for view, row, col, global_row, global_col in zip(
        *(getattr(tokens, name).tolist() for name in ("view", "row", "col", "global_row", "global_col"))
    ):
        part = pixels.pixels[view][:2, row * cell : (row + 1) * cell, col * cell : (col + 1) * cell]
        # the lightest pixels are those on the picture, where a token also lies on black padding
        red, green = part.reshape(2, -1).max(axis=1) / 255
        x0, y0, x1, y1 = item.views[view].box
        across = (x1 - x0) / item.view_size[0] * cell, (y1 - y0) / item.view_size[1] * cell
        right, bottom = x0 + (col + 1) * across[0], y0 + (row + 1) * across[1]
        assert abs(red - min(right / size[0], 1)) < 0.03 and abs(green - min(bottom / size[1], 1)) < 0.03
        if global_row >= 0 and one.spec.mode != "crop":  # the crop shows a part only
            worst = max(worst, abs(red - (global_col + 1) / cols) * cols, abs(green - (global_row + 1) / rows) * rows)
    assert worst < 1.2  # cells


def test_padding_of_one_of_several_pictures_is_marked(tinies: dict[str, Tiny]) -> None:
    one = tinies["llava_onevision"]
    made = plan(_messages(picture(100, 40), picture(30, 30)), one.spec, one.tokenizer)
    tokens = layout(made)
    wide = tokens[(tokens.media == 0) & (tokens.kind != NEWLINE)]
    pixels = execute(made).media[0].pixels[0]
    cell, empty = one.spec.patch_size, [int(m * 255) for m in one.spec.mean]
    for row, kind in zip(wide.row.tolist(), wide.kind.tolist()):
        band = pixels[:, row * cell : (row + 1) * cell].reshape(3, -1).T
        assert (kind == PADDING) == bool((band == empty).all())
    assert {PADDING, VALID} == set(wide.kind.tolist())
    assert (tokens[tokens.media == 1].kind[:-1] == VALID).all()
    assert tokens[tokens.media == 1].kind[-1] == NEWLINE


def test_counts_of_published_models() -> None:
    """Known from the papers and model cards, at the published sizes."""
    assert fit_image(800, 600, family_spec("llava")).num_tokens == 576
    assert fit_image(672, 672, family_spec("llava_next")).num_tokens == 576 + 48 * 49
    assert fit_image(384, 384, family_spec("llava_onevision")).num_tokens == 729 + 27 * 28
    assert fit_clip(640, 480, 32, family_spec("llava_onevision")).num_tokens == 32 * 196 + 1
    assert fit_image(1344, 896, family_spec("internvl")).num_tokens == (6 + 1) * 256
    assert fit_image(640, 480, family_spec("smolvlm")).num_tokens == (4 * 3 + 1) * 64
    assert fit_image(1456, 1456, family_spec("idefics3")).num_tokens == (16 + 1) * 169
    assert fit_image(280, 560, family_spec("qwen2_5_vl")).num_tokens == 10 * 20
    assert fit_image(320, 640, family_spec("qwen3_vl")).num_tokens == 10 * 20


# ---- chat


@QUICK
@given(
    family=st.sampled_from(FAMILIES),
    pieces=st.lists(st.sampled_from(["IMAGE", "VIDEO", "WRAP", "<ima", "ge>", "<vid", "eo>", "a", " "]), max_size=8),
)
@example(family="llava", pieces=["<ima", "ge>"])
@example(family="llava", pieces=["<ima", "IMAGE", "ge>"])
def test_text_cannot_inject_media_of_a_family(tinies: dict[str, Tiny], family: str, pieces: list[str]) -> None:
    one = tinies[family]
    words = {"IMAGE": one.spec.image_token, "VIDEO": one.spec.video_token, "WRAP": family_tokens(one.spec)[-1]}
    texts = [words.get(piece, piece) for piece in pieces]
    content = [{"type": "text", "text": text} for text in texts]
    shown = {"type": "image", "image": picture(30, 30)}
    messages = [
        {"role": "system", "content": "".join(texts)},
        {"role": "user", "content": [*content, shown, *content]},
        {"role": "assistant", "content": "".join(texts)},
        {"role": "user", "content": content},
    ]
    made = plan(messages, one.spec, one.tokenizer)
    (item,) = made.media
    expected = plan(_messages(picture(30, 30)), one.spec, one.tokenizer).media[0]
    assert item.num_tokens == expected.num_tokens
    image = codec(one.tokenizer, one.spec).image_id
    assert int((made.input_ids == image).sum()) == item.num_tokens


FIRST_PICTURES = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} {% endfor %}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN = (
    "{{ '[PAD]' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'].strip() }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_media_stand_where_the_template_puts_them() -> None:
    """A template may show pictures before clips; media are then in the order of the prompt."""
    spec = family_spec("llava_onevision", tile_size=56, pinpoints=((56, 56), (56, 112)))
    tokenizer = tokenizer_of(spec)
    tokenizer.chat_template = FIRST_PICTURES
    content = [
        {"type": "text", "text": "before"},
        {"type": "video", "video": _clip(3)},
        {"type": "image", "image": picture(60, 50)},
        {"type": "text", "text": "after"},
    ]
    made = plan([{"role": "user", "content": content}], spec, tokenizer)
    assert [item.kind for item in made.media] == ["image", "video"]
    assert [span.kind for span in made.spans] == ["text", "image", "text", "video", "text"]
    text = tokenizer.decode(
        [token for s in made.spans if s.media < 0 for token in made.input_ids[s.start :][: s.length]]
    )
    assert text == "USER: \n\nbefore after ASSISTANT:"
    split = [{"type": "text", "text": "<ima"}, content[2], {"type": "text", "text": "ge>"}]
    tokenizer.chat_template = FIRST_PICTURES.replace("{{ p['text'] }} ", "{{ p['text'] }}")
    with pytest.raises(InputError, match=r"made 2 media placeholders of 1; .*no piece of a placeholder"):
        plan([{"role": "user", "content": split}], spec, tokenizer)


@pytest.mark.parametrize("template", [None, FIRST_PICTURES, PLAIN], ids=["chatml", "parts", "text"])
def test_labels_are_the_answers(template: str | None) -> None:
    spec = family_spec("llava", tile_size=56, edge=56)
    tokenizer = tokenizer_of(spec)
    tokenizer.chat_template = template or tokenizer.chat_template
    question, answer = ("What is it?", "Two?"), (" a red box", "nó, één 🙂")
    messages = [
        *_messages(picture(60, 50), text=question[0]),
        {"role": "assistant", "content": answer[0]},
        {"role": "user", "content": question[1]},
        {"role": "assistant", "content": answer[1]},
    ]
    made = plan(messages, spec, tokenizer)
    written = tokenizer.decode([int(t) for t in made.labels if t != -100])
    end = " " if template == FIRST_PICTURES else ""
    assert written.replace(end + "<|im_end|>", "<|im_end|>") == "".join(
        (text if template is None or template == FIRST_PICTURES else text.strip()) + "<|im_end|>" for text in answer
    )
    assert (made.labels[made.labels != -100] == made.input_ids[made.labels != -100]).all()
    assert stop_token_ids(tokenizer, spec) == [tokenizer.eos_token_id]
    sample = Sample("s", [ImageSource(picture(60, 50))], [[(question[0], answer[0])], [(question[1], answer[1])]])
    both = plan_sample(sample, spec, tokenizer)
    for i, (ids, labels) in enumerate(both.branches):
        alone = plan(sample.messages(i), spec, tokenizer)
        assert np.array_equal(ids, alone.input_ids) and np.array_equal(labels, alone.labels)


def test_tokenizers_that_open_with_a_token(tinies: dict[str, Tiny]) -> None:
    """As transformers does: the opening token is added unless the template wrote it."""
    from tokenizers.processors import TemplateProcessing

    spec = family_spec("llava", tile_size=56, edge=56)
    tokenizer = tokenizer_of(spec)
    tokenizer.bos_token = "[PAD]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[PAD] $A", special_tokens=[("[PAD]", tokenizer.pad_token_id)]
    )
    for template in (tokenizer.chat_template, PLAIN):
        tokenizer.chat_template = template
        made = plan(_messages(picture(60, 50)), spec, tokenizer)
        assert (made.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
        answer = {"role": "assistant", "content": "x"}
        trained = plan([*_messages(picture(60, 50)), answer], spec, tokenizer)
        assert len(trained.labels) == trained.num_tokens and trained.labels[0] == -100
        assert tokenizer.decode([int(t) for t in trained.labels if t != -100]) == "x<|im_end|>"


def test_what_a_family_cannot_take(tinies: dict[str, Tiny]) -> None:
    llava, onevision = tinies["llava"], tinies["llava_onevision"]
    with pytest.raises(InputError, match=r"llava takes no clips; give some of its frames as pictures"):
        plan(_messages(_clip(3), kind="video"), llava.spec, llava.tokenizer)
    with pytest.raises(InputError, match="num_frames is 0"):
        plan(_messages(_clip(3), kind="video"), onevision.spec, onevision.tokenizer, num_frames=0)
    with pytest.raises(InputError, match=r"lacks <\|image_pad\|>, <\|video_pad\|>; add them"):
        plan(_messages(picture(30, 30)), family_spec("qwen2_vl"), llava.tokenizer)
    for one, way_out in ((llava, "fewer pictures"), (onevision, r"smaller canvases \(pinpoints\)")):
        with pytest.raises(BudgetError, match=f"limit is 9 .*use fewer frames .* or {way_out}"):
            plan(_messages(picture(30, 30)), one.spec, one.tokenizer, max_context=9)
    one = plan(_messages(picture(30, 30)), llava.spec, llava.tokenizer)
    both = collate([execute(one), execute(one)], 0)
    assert len(both.media) == 2 and both.input_ids.shape[0] == 2


def test_a_changed_picture_is_noticed(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    one, path = tinies["qwen2_5_vl"], tmp_path / "a.png"
    picture(20, 12).save(path)
    made = plan(_messages(path), one.spec, one.tokenizer)
    picture(21, 12).save(path)
    with pytest.raises(InputError, match="21x12 pixels, but it was planned as 20x12"):
        execute(made)


# ---- specs


def test_specs_of_nvila_keep_their_hash() -> None:
    """Hashes that checkpoints saved before the families came hold."""
    assert PreprocessSpec().hash() == "75cf83414493593a"
    assert PreprocessSpec("dynamic", 16, 4, (), downsample=3, max_tiles=4).hash() == "2570390c2409ba71"


@pytest.mark.parametrize("family", DEFAULTS)
def test_specs_of_families_are_saved_whole(family: str) -> None:
    spec = family_spec(family)
    stored = json.loads(json.dumps(spec.to_dict() | {"hash": spec.hash()}))
    assert PreprocessSpec.from_dict(stored) == spec
    assert spec.hash() != family_spec(family, patch_size=7).hash()


def test_specs_of_families_are_checked() -> None:
    for family, changes, why in (
        ("llava", {"edge": 0}, "needs edge"),
        ("llava", {"image_token": ""}, "needs image_token"),
        ("llava", {"filter": "sinc"}, "must be one of bicubic"),
        ("llava_next", {"pinpoints": ()}, "needs pinpoints"),
        ("llava_next", {"pinpoints": ((336, 500),)}, r"canvas \(336, 500\) is not a whole number of tiles of 336"),
        ("qwen3_vl", {"min_area": 9, "max_area": 8}, "min_area 9 and max_area 8"),
        ("qwen3_vl", {"temporal_patch": 0}, "temporal_patch 0"),
    ):
        with pytest.raises(InputError, match=why):
            family_spec(family, **changes)
    with pytest.raises(InputError, match="mode 'native' needs a family"):
        PreprocessSpec("native")
    with pytest.raises(InputError, match="too long and thin"):
        fit_image(1, 2000, family_spec("llava_next"))


@pytest.mark.parametrize(
    ("family", "file", "changes", "why"),
    [
        ("llava", "preprocessor_config.json", {"do_normalize": False}, "do_normalize is false"),
        ("llava", "preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor is 0.5; only 1/255"),
        ("llava", "preprocessor_config.json", {"resample": 9}, "resample is 9; known: 0 to 5"),
        ("llava", "config.json", {"vision_feature_select_strategy": "full"}, "'full' keeps CLS"),
        ("llava", "config.json", {"model_type": "gpt2"}, "model_type 'gpt2' has no preprocessing here"),
        ("llava", "preprocessor_config.json", {"crop_size": {"height": 56, "width": 40}}, "only square views"),
        ("llava_next", "config.json", {"image_grid_pinpoints": [[56, 56]]}, "image_grid_pinpoints differ"),
        ("llava_onevision", "config.json", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'"),
        ("qwen2_5_vl", "video_preprocessor_config.json", {"patch_size": 16}, "14 for pictures and 16 for clips"),
        ("internvl", "config.json", {"image_seq_length": 5}, "5 tokens a view, but views of 56 px have 4"),
        ("smolvlm", "preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "only longest_edge"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    tinies: dict[str, Tiny], tmp_path: Path, family: str, file: str, changes: dict[str, Any], why: str
) -> None:
    for source in tinies[family].folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    old = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(old | changes))
    with pytest.raises(UnsupportedError, match=why):
        spec_from_hf(tmp_path)


def test_specs_are_read_from_all_layouts(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    """Newer transformers write one processor_config.json; clips may have a file of their own."""
    source = tinies["qwen2_5_vl"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source.folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor an image_processor"):
        spec_from_hf(tmp_path)
    image = json.loads((source.folder / "preprocessor_config.json").read_text())
    video = image | {"min_pixels": 4 * 28 * 28, "max_pixels": 9 * 28 * 28, "fps": 4, "max_frames": 12, "min_frames": 2}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image, "video_processor": video}))
    spec = spec_from_hf(tmp_path)
    assert spec.image_token == "<|image_pad|>" and spec.family == "qwen2_5_vl"
    assert (spec.min_area, spec.max_area) == (source.spec.min_area, source.spec.max_area)
    assert (spec.video_min_area, spec.video_max_area) == (4 * 784, 9 * 784)
    assert (spec.fps, spec.num_frames, spec.min_frames) == (4.0, 12, 2)


def test_chat_templates_are_found(tmp_path: Path) -> None:
    assert hf_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert hf_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert hf_chat_template(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("x")
    assert hf_chat_template(tmp_path) == "x"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        hf_chat_template(tmp_path)
