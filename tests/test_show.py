"""Pictures of what stays: each panel shows the frame, and the part of it, that its tokens come from."""

from __future__ import annotations

import numpy as np
from PIL import Image

from families_hf import tokenizer_of
from foveate.adapters.layouts import layout
from foveate.data.families import family_spec
from foveate.data.plan import plan
from foveate.show import GAP, kept_picture

SMALL = {"tile_size": 56, "patch_size": 14}


def _message(kind: str, media: object) -> list[dict]:
    return [{"role": "user", "content": [{"type": kind, kind: media}, {"type": "text", "text": "?"}]}]


def test_panels_of_a_clip_show_their_own_frames() -> None:
    """Also where the sampled frames are far apart in the clip."""
    spec = family_spec("internvl", **SMALL, num_frames=3)
    clip = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in range(0, 240, 20)]
    made = plan(_message("video", clip), spec, tokenizer_of(spec))
    assert made.media[0].frames == (2, 6, 10)
    strip = np.asarray(kept_picture(made, spec, layout(made), None, side=64))
    middles = [strip[20, i * (64 + GAP) + 20, 0] for i in range(3)]
    assert middles == [40, 120, 200]


def test_all_frames_of_a_long_clip_can_be_shown_in_lines() -> None:
    spec = family_spec("internvl", **SMALL, num_frames=20)
    clip = [Image.new("RGB", (40, 40), (10 * frame, 0, 0)) for frame in range(20)]
    made = plan(_message("video", clip), spec, tokenizer_of(spec))
    few = kept_picture(made, spec, layout(made), None, side=64)
    assert few.size == (8 * 32 + 7 * GAP, 32)
    sheet = np.asarray(kept_picture(made, spec, layout(made), None, side=64, max_panels=None))
    assert sheet.shape[:2] == (3 * 32 + 2 * GAP, 8 * 32 + 7 * GAP)
    shades = [sheet[line * (32 + GAP) + 10, i * (32 + GAP) + 10, 0] for line in range(3) for i in range(8)]
    assert shades[:20] == [10 * frame for frame in range(20)]


def test_a_cut_out_is_shown_as_it_is_seen() -> None:
    spec = family_spec("llava", **SMALL, edge=56)
    wide = Image.new("RGB", (120, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 40))  # only the middle is seen
    made = plan(_message("image", wide), spec, tokenizer_of(spec))
    shown = np.asarray(kept_picture(made, spec, layout(made), None, side=64))
    assert shown.shape == (64, 64, 3)
    assert (shown[..., 2] > 200).all()


def test_dropped_tokens_are_faded() -> None:
    spec = family_spec("llava", **SMALL, edge=56)
    made = plan(_message("image", Image.new("RGB", (40, 40), "white")), spec, tokenizer_of(spec))
    shown = np.asarray(kept_picture(made, spec, layout(made), [0, 5], side=64)).astype(int)
    bright = shown[8::16, 8::16].sum(-1) > 600
    assert np.argwhere(bright).tolist() == [[0, 0], [1, 1]]
