"""Plans of the families of transformers tell what executing them gives, and layouts where each token lies."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from families_hf import FAMILIES, Tiny, ask, frames_of, picture
from foveate.adapters.layout import NEWLINE, PADDING, VALID
from foveate.adapters.layouts import layout
from foveate.data.chat import codec
from foveate.data.execute import execute
from foveate.data.families import family_spec
from foveate.data.fit import fit_clip, fit_image
from foveate.data.plan import plan
from foveate.data.spec import PreprocessSpec

QUICK = settings(max_examples=20, deadline=None)


sides = st.integers(1, 400)
anything = st.one_of(st.tuples(st.just("image"), sides, sides), st.tuples(st.just("video"), sides, st.integers(1, 7)))


@QUICK
@given(family=st.sampled_from(FAMILIES), parts=st.lists(anything, min_size=1, max_size=3))
def test_plan_execution_and_layout_agree(tinies: dict[str, Tiny], family: str, parts: list[Any]) -> None:
    one = tinies[family]
    content: list[dict[str, Any]] = []
    for kind, width, other in parts:
        if kind == "video" and one.spec.video_token:
            content.append({"type": "video", "video": frames_of(other, width, 50)})
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
    made = plan(ask(_slope(*size)), one.spec, one.tokenizer)
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
    made = plan(ask(picture(100, 23), picture(30, 30)), one.spec, one.tokenizer)
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
