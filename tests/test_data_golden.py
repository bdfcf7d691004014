"""Golden vectors of the official NVILA code: tiles, frames, labels, pixels, ids. All comes from the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.data.chat import codec, encode_chat, stop_token_ids
from foveate.data.execute import execute
from foveate.data.plan import plan
from foveate.data.spec import PreprocessSpec
from foveate.data.tiling import image_layout
from foveate.data.video import sample_frames
from goldens_io import goldens_dir

ROOT = goldens_dir("nvila")
FAMILIES = ("nvila", "lite", "video")


def _json(*parts: str) -> Any:
    return json.loads(Path(ROOT, *parts).read_text())


def _spec(family: str, **changes: Any) -> PreprocessSpec:
    """The spec of a golden checkpoint, from its own configuration files."""
    config = _json(family, "ckpt", "config.json")
    tower = _json(family, "ckpt", "vision_tower", "config.json")
    projector = _json(family, "ckpt", "mm_projector", "config.json")["mm_projector_type"]
    values: dict[str, Any] = {
        "mode": config["image_aspect_ratio"],
        "tile_size": tower["image_size"],
        "patch_size": tower["patch_size"],
        "scales": [int(s) for s in config["s2_scales"].split(",")] if config["dynamic_s2"] else (),
        "resize_to_scale": config["s2_resize_output_to_scale_idx"],
        "downsample": 3 if "3x3" in projector else 2,
        "min_tiles": config["min_tiles"],
        "max_tiles": config["max_tiles"],
        "num_frames": config["num_video_frames"],
    }
    return PreprocessSpec(**{**values, **changes})


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {f: AutoTokenizer.from_pretrained(str(Path(ROOT, f, "ckpt", "llm"))) for f in FAMILIES}


def test_golden_nvila_tile_choices() -> None:
    rows = _json("units", "tile_choices.json")
    for row in rows:
        for key, expected in row.items():
            if not key.startswith("dynamic"):
                continue
            joined = key.startswith("dynamic_s2")
            words = key.removeprefix("dynamic_s2_").removeprefix("dynamic_").split("_")
            side, low, high = int(words[0]), 1, 12
            for word in words[1:]:
                low = int(word[3:]) if word.startswith("min") else low
                high = int(word[3:]) if word.startswith("max") else high
            scales = (side, 2 * side, 3 * side) if joined else ()
            mode = "dynamic_s2" if joined else "dynamic"
            spec = PreprocessSpec(mode, side, 7, scales, min_tiles=low, max_tiles=high)
            layout = image_layout(row["w"], row["h"], spec)
            shape = layout.block if joined else layout.resizes[0]
            assert [*shape, len(layout.views)] == expected, (row["w"], row["h"], key)


def test_golden_nvila_frame_sampling() -> None:
    """Where every frame decodes. (Unreadable frames are dropped there; here the nearest one stands in.)"""
    goldens = _json("units", "frame_sampling.json")
    checked = 0
    for row in goldens["inference_main"] + goldens["inference_pre235"]:
        fps = row.get("fps", 0.0)
        # a rate on a clip without frames or without a rate of its own gives nothing there, by mistake
        if row["bad"] or not row["real"] or (fps and not row["video_fps"]) or "exception" in row:
            continue
        got = sample_frames(row["real"], row["num_frames"], row["video_fps"], fps)
        assert list(got) == row["indices"], row
        checked += 1
    for row in goldens["directory"]:
        if "f{:03d}" in row["name_format"]:  # other names sort as text there, naturally here
            assert list(sample_frames(row["files"], row["num_frames"])) == row["indices"]
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("name", [n for n in (_json("units", "label_masks.json")) if n[0] != "_"])
def test_golden_nvila_label_masks(name: str, tokenizers: dict[str, Any]) -> None:
    case = _json("units", "label_masks.json")[name]
    stored = np.load(Path(ROOT, "units", "label_masks.npz"))
    messages: list[dict[str, Any]] = [{"role": "system", "content": ""}] if case["no_system_prompt"] else []
    blank = np.zeros((4, 4, 3), np.uint8)
    for turn in case["conversation"]:
        content: Any = turn["value"]
        if turn["from"] == "human":
            content = []
            text = turn["value"]
            while text:
                for token, part in (
                    ("<image>", {"type": "image", "image": blank}),
                    ("<vila/video>", {"type": "video", "video": blank[None]}),
                ):
                    if text.startswith(token):
                        content.append(part)
                        text = text[len(token) :]
                        break
                else:
                    cut = text.find("<", 1)
                    cut = len(text) if cut < 0 else cut
                    content.append({"type": "text", "text": text[:cut]})
                    text = text[cut:]
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    ids, labels = encode_chat(messages, tokenizers["nvila"])
    assert ids.tolist() == stored[f"{name}.input_ids"].tolist()
    assert labels.tolist() == stored[f"{name}.labels"].tolist()
    assert int((labels != -100).sum()) == case["n_supervised"]
    assert [tokenizers["nvila"].decode([label]) for label in labels[labels != -100]] == case["supervised"]


def test_golden_nvila_text_is_tokenized_alike(tokenizers: dict[str, Any]) -> None:
    stored, tokenizer = _json("units", "label_masks.json"), tokenizers["nvila"]
    for text, ids in stored["_tokenize"].items():
        assert list(codec(tokenizer).encode(text)) == ids, text


def _prompt(case: dict[str, Any]) -> list[dict[str, Any]]:
    parts = []
    for entry in case["prompt"]:
        path = Path(ROOT, entry)
        if not entry.startswith(("images/", "clips/")):
            parts.append({"type": "text", "text": entry})
        elif path.is_dir():
            parts.append({"type": "video", "video": path})
        else:
            parts.append({"type": "image", "image": path})
    return [{"role": "user", "content": parts}]


def _cases() -> list[tuple[str, str]]:
    return [(f, c) for f in FAMILIES for c in _json(f, "gold", "meta.json")["cases"]]


@pytest.mark.parametrize(("family", "name"), _cases())
def test_golden_nvila_plan_and_pixels(family: str, name: str, tokenizers: dict[str, Any]) -> None:
    """Ids before splicing, the length after it, tokens of each block, and every pixel."""
    meta = _json(family, "gold", "meta.json")
    case = meta["cases"][name]
    if "exception" in case or case.get("extract_media") == "main":
        pytest.skip("a crash or a regression of the official code that is not copied")
    encoder = case.get("video_encoder", "")
    pool = json.loads(encoder.partition(" ")[2]) if encoder.startswith("TSP") else ()
    spec = _spec(family, video_pool=pool, num_frames=case.get("num_video_frames", 8))
    made = plan(_prompt(case), spec, tokenizers[family])
    stored = np.load(Path(ROOT, family, "gold", f"{name}.npz"))
    media_ids = list(meta["media_token_ids"].values())
    short: list[int] = []  # each run of one block back to its placeholder
    at = 0
    for span in made.spans:
        ids = made.input_ids[at : at + span.length].tolist()
        short += ids if span.kind == "text" else ids[:1]
        assert span.kind == "text" or ids[0] in media_ids
        at += span.length
    assert short == stored["input_ids"].tolist()
    assert made.num_tokens == case["seq_len"]
    assert [s.length for s in made.spans if s.kind != "text"] == (case.get("encoder_lengths") or [])
    if case.get("block_sizes"):
        assert [list(m.block) if m.block else None for m in made.media] == case["block_sizes"]

    inputs = execute(made)
    for kind, got in (("image", inputs.views), ("video", inputs.frames)):
        key = next((k for k in (f"pixels_u8_{kind}", "pixels_u8") if k in stored), None)
        if key and (key != "pixels_u8" or case["media"] == kind):
            assert np.array_equal(got, stored[key])
    if case.get("media") and len(made.media) and len({m.kind for m in made.media}) == 1:
        tensor = inputs.pixel_values if case["media"] == "image" else inputs.pixel_values_videos
        digest = hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()
        assert digest == case["pixels_f32_sha256"]


def test_golden_nvila_preprocess_modes(tokenizers: dict[str, Any]) -> None:
    stored, meta = np.load(Path(ROOT, "units", "preprocess_modes.npz")), _json("units", "preprocess_modes.json")
    pictures = {p.name[0]: p for p in Path(ROOT, "images").iterdir()}
    for key in stored:
        mode, letter = key.split(".")
        side = int(mode.lstrip("resizpadfult"))
        spec = PreprocessSpec("pad" if mode.startswith("pad") else "resize", side, 14, ())
        message = {"role": "user", "content": [{"type": "image", "image": pictures[letter]}]}
        inputs = execute(plan([message], spec, tokenizers["nvila"]))
        assert np.array_equal(inputs.views[0], stored[key]), key
        digest = hashlib.sha256(inputs.pixel_values[0].contiguous().numpy().tobytes()).hexdigest()
        assert digest == meta[key]["sha256_f32"], key


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_nvila_stop_tokens(family: str, tokenizers: dict[str, Any]) -> None:
    assert stop_token_ids(tokenizers[family]) == _json(family, "gold", "meta.json")["stop_token_ids"]
