"""The families of transformers: our plans and pixels equal their own processors, and layouts say where tokens lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from families_hf import FAMILIES, Tiny, picture, tiny
from foveate.data.execute import execute, normalise
from foveate.data.families import DEFAULTS
from foveate.data.plan import Plan, plan

QUICK = settings(max_examples=25, deadline=None)
SIZES = [(160, 120), (40, 90), (56, 56), (9, 5), (300, 20), (20, 310)]
VIDEO_FAMILIES = [family for family in DEFAULTS if DEFAULTS[family].get("video_token")]


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
