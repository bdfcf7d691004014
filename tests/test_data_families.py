"""The families of transformers: our plans, prompts and pixels equal their own processors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families_hf import FAMILIES, Tiny, ask, bare, frames_of, picture, tiny
from foveate.adapters.layouts import layout, mrope
from foveate.data.execute import execute, normalise
from foveate.data.families import DEFAULTS, family_spec, in_words, pick_frames
from foveate.data.fit import fit_clip
from foveate.data.plan import Plan, plan
from foveate.data.video import VideoInfo

SIZES = [(160, 120), (40, 90), (56, 56), (9, 5), (300, 20), (20, 310), (170, 56)]
VIDEO_FAMILIES = [family for family in FAMILIES if DEFAULTS[family].get("video_token")]


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


# ---- pictures


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
    assert layout(plan(ask(picture(90, 70)), one.spec, one.tokenizer)).global_row.max() == one.spec.token_side - 1


def _compare(one: Tiny, pictures: list[Image.Image]) -> None:
    messages = ask(*pictures)
    made = plan(messages, one.spec, one.tokenizer)
    expected = one.reference(bare(messages), pictures)
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


@pytest.mark.parametrize("fps", [0.0, 4.0])
@pytest.mark.parametrize("frames", [1, 5, 8])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_prompt_of_a_clip_equals_transformers(tinies: dict[str, Tiny], family: str, frames: int, fps: float) -> None:
    from transformers.video_utils import VideoMetadata

    one = tinies[family]
    messages = ask(frames_of(frames, fps=fps), kind="video")
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
    text = one.tokenizer.apply_chat_template(bare(messages), tokenize=False, add_generation_prompt=True)
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
            {"type": "video", "video": frames_of(9, fps=3.0)},
            {"type": "video", "video": frames_of(4)},
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
