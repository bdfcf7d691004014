"""The same request in the form that a family's own code of transformers takes, built without our adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from families import CLIPS, FAMILIES, clip, picture
from foveate.data.execute import Inputs, normalise
from foveate.data.plan import Plan
from foveate.vlm import VLM, Request

MIXES = {
    "picture": [picture(0)],
    "tall picture": [picture(1, 24, 90)],
    "pictures": [picture(2), picture(3, 40, 64)],
    "text": [],
    "clip": [clip(0)],
    "clip and picture": [clip(1, 4), picture(4)],
}
CASES = [(f, m) for f in FAMILIES for m in MIXES if "clip" not in m or f in CLIPS]
QWEN = [family for family in FAMILIES if family.startswith("qwen")]


def prepared(vlm: VLM, mix: str, text: str = "What is it?") -> tuple[Plan, Inputs]:
    plan = vlm.plan(Request(text, MIXES[mix]).to_messages())
    return plan, vlm.prepare(plan)


def patches(pixels: Tensor, spec: Any, kind: str) -> Tensor:
    """Qwen's patches one by one: those of a merged token together, tokens in raster order, frames in pairs."""
    size, merge, times = spec.patch_size, spec.downsample, spec.temporal_patch
    if kind == "image":
        pixels = torch.stack([pixels[0]] * times)
    rows, cols = pixels.shape[2] // size // merge, pixels.shape[3] // size // merge
    out = []
    for t in range(0, len(pixels), times):
        for token in range(rows * cols):
            for cell in range(merge * merge):
                y = (token // cols * merge + cell // merge) * size
                x = (token % cols * merge + cell % merge) * size
                out.append(pixels[t : t + times, :, y : y + size, x : x + size].transpose(0, 1).flatten())
    return torch.stack(out)


def plain(vlm: VLM, plan: Plan, inputs: Inputs) -> dict[str, Tensor]:
    """What the family's own `forward` and `generate` take for one request."""
    family, spec = vlm.adapter.family, vlm.spec
    ids = torch.as_tensor(plan.input_ids)[None]
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = {
        kind: [normalise(item.pixels, spec) for item in inputs.media if item.kind == kind]
        for kind in ("image", "video")
    }
    if family in QWEN:
        kwargs["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id) + 2 * (
            ids == vlm.model.config.video_token_id
        )
        for kind, name, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels[kind]:
                kwargs[name] = torch.cat([patches(part, spec, kind) for part in pixels[kind]])
                kwargs[grid] = torch.tensor([item.grid for item in inputs.media if item.kind == kind])
        if family == "qwen2_5_vl" and pixels["video"]:
            seconds = [media.seconds_per_unit for media in plan.media if media.kind == "video"]
            kwargs["second_per_grid_ts"] = torch.tensor(seconds)
        return kwargs
    if family in ("internvl", "smolvlm"):  # one stream of views, frames among them
        views = [normalise(item.pixels, spec) for item in inputs.media]
    else:
        views = pixels["image"]
    if views:
        kwargs["pixel_values"] = torch.cat(views)
        if family in ("smolvlm", "idefics3"):
            kwargs["pixel_values"] = kwargs["pixel_values"][None]
    if family in ("llava_next", "llava_onevision") and pixels["image"]:
        kwargs["image_sizes"] = torch.tensor([item.size[::-1] for item in inputs.media if item.kind == "image"])
    if family == "llava_onevision":
        if pixels["image"]:
            kwargs["batch_num_images"] = torch.tensor([len(pixels["image"])])
        if pixels["video"]:
            kwargs["pixel_values_videos"] = torch.stack(pixels["video"])
    return kwargs
