"""NVILA against vectors that the official code computed: every stage from pixels to greedy tokens, and its parts."""

from __future__ import annotations

import ast
import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.execute import execute
from foveate.data.plan import plan
from foveate.data.spec import PreprocessSpec
from foveate.nvila import NvilaProcessor, load
from foveate.nvila.checkpoint import Loaded
from foveate.nvila.connector import Projector
from foveate.nvila.features import join_scales, pool_frames, tiles_per_image
from goldens_io import goldens_dir, read_json, read_npz

ROOT = goldens_dir("nvila")
VARIANTS = [v for v in ("nvila", "lite", "video") if (ROOT / v).is_dir()]
CASES = [(v, c) for v in VARIANTS for c in read_json(ROOT, v, "gold", "meta.json")["cases"]]


@lru_cache(maxsize=3)
def checkpoint(variant: str) -> Loaded:
    return load(ROOT / variant / "ckpt")


def meta(variant: str) -> dict[str, Any]:
    return read_json(ROOT, variant, "gold", "meta.json")


def close(actual: torch.Tensor, expected: np.ndarray, atol: float) -> None:
    torch.testing.assert_close(actual.float(), torch.from_numpy(expected).float(), atol=atol, rtol=0)


def configured(variant: str, info: dict[str, Any]) -> Loaded:
    """The checkpoint with the video encoder of a case: the official run swapped it on the loaded model."""
    model, tokenizer, spec = checkpoint(variant)
    if info.get("video_encoder") == "basic":
        spec = dataclasses.replace(spec, video_pool=())
    model.config.video_pool_sizes = [list(level) for level in spec.video_pool]
    return Loaded(model, tokenizer, spec)


def content(info: dict[str, Any], spec: PreprocessSpec, tokenizer: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for piece in info["prompt"]:
        if not (ROOT / piece).exists() or not piece.strip():
            parts.append({"type": "text", "text": piece})
        elif (ROOT / piece).is_file():
            parts.append({"type": "image", "image": ROOT / piece})
        elif info.get("extract_media") == "main":  # today's main branch turns a clip into pictures
            clip = [{"role": "user", "content": [{"type": "video", "video": ROOT / piece}]}]
            frames = plan(clip, spec, tokenizer, num_frames=info["num_video_frames"]).media[0].frames
            files = sorted(Path(ROOT / piece).iterdir())
            parts += [{"type": "image", "image": files[i]} for i in frames]
        else:
            parts.append({"type": "video", "video": ROOT / piece})
    return parts


def prepared(variant: str, case: str) -> tuple[Loaded, dict[str, Any]]:
    info = meta(variant)["cases"][case]
    loaded = configured(variant, info)
    processor = NvilaProcessor(loaded.tokenizer, loaded.spec)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content(info, loaded.spec, loaded.tokenizer)}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        num_frames=info.get("num_video_frames"),
    )
    return loaded, dict(inputs)


def normalised(u8: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(u8).float() * 0.00392156862745098 - 0.5) / 0.5


@pytest.mark.parametrize(("variant", "case"), CASES)
@torch.no_grad()
def test_golden_nvila_end_to_end(variant: str, case: str) -> None:
    loaded, inputs = prepared(variant, case)
    if "exception" in meta(variant)["cases"][case]:  # a clip that the official pooling cannot divide: ours can
        assert loaded.model(**inputs).logits.isfinite().all()
        return
    gold = read_npz(ROOT, variant, "gold", f"{case}.npz")
    model = loaded.model
    images, videos = [], []
    if "pixel_values" in inputs:
        images = model.get_image_features(inputs["pixel_values"], inputs["image_grids"]).pooler_output
    if "pixel_values_videos" in inputs:
        videos = model.get_video_features(inputs["pixel_values_videos"], inputs["video_frames"]).pooler_output
    close(model.embed(inputs["input_ids"], images, videos)[0], gold["inputs_embeds"], 1e-5)
    close(model(**inputs).logits[0, -8:], gold["logits_last8"], 5e-5)

    new = model.generate(**inputs, max_new_tokens=len(gold["gen_ids"]), do_sample=False)
    new = new[0, inputs["input_ids"].shape[1] :].tolist()
    sure = int(np.argmin(gold["gen_top1_margin"] > 1e-3)) if (gold["gen_top1_margin"] <= 1e-3).any() else len(new)
    assert new[:sure] == gold["gen_ids"].tolist()[:sure]
    assert sure > 0 or case == "img_and_clip_tsp"


@pytest.mark.parametrize(("variant", "case"), [c for c in CASES if (ROOT / c[0] / "gold" / f"{c[1]}.npz").is_file()])
@torch.no_grad()
def test_golden_nvila_encoder_stages(variant: str, case: str) -> None:
    gold, info = read_npz(ROOT, variant, "gold", f"{case}.npz"), meta(variant)["cases"][case]
    model, _, spec = configured(variant, info)
    if "tower" in gold and "pixels_u8" in gold:
        close(model.tower(normalised(gold["pixels_u8"])), gold["tower"], 5e-5)
    if "tower" not in gold:
        return
    tower = torch.from_numpy(gold["tower"])
    if "proj_out" in gold and spec.mode != "dynamic_s2":
        close(model.mm_projector(tower), gold["proj_out"], 1e-5)
    if "proj_out" in gold and spec.mode == "dynamic_s2":
        grids = [tuple(grid) if grid else (0, 0) for grid in info["block_sizes"] or [None] * info["n_tiles"]]
        blocks = info["new_block_sizes"] or [(1, 1)] * len(grids)
        chunks, start = [], 0
        for i, grid in enumerate(grids):
            count = tiles_per_image(grid, spec)
            maps = tower[start : start + count].unflatten(1, (spec.side, spec.side))[None]
            joined, block = join_scales(maps, grid, spec)
            assert list(block) == list(blocks[i])
            if f"s2map_{i}" in gold:
                close(joined[0].permute(2, 0, 1), gold[f"s2map_{i}"], 1e-6)
            chunks.append(joined)
            start += count
        features = model.connect(tower, grids)
        expected = torch.from_numpy(gold["proj_out"])
        at = 0
        for found, block in zip(features, blocks):
            part = expected[at : at + block[0] * block[1]]
            at += len(part)
            side = spec.token_side
            part = part.reshape(*block, side, side, -1).transpose(1, 2).reshape(block[0] * block[1] * side**2, -1)
            torch.testing.assert_close(found, part, atol=1e-5, rtol=0)
    if info.get("media") == "video" and "video_encoder_out_0" in gold:
        found = model.connect_video(tower)[0]
        expected = gold["video_encoder_out_0"]  # with the embedding of "\n" after each group
        group = spec.token_side**2 + 1
        assert len(expected) % group == 0
        close(found, expected[np.arange(len(expected)) % group != group - 1], 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_golden_nvila_half_precision(variant: str) -> None:
    gold = read_npz(ROOT, variant, "gold", "fp16_official_dtype.npz")
    model = load(ROOT / variant / "ckpt", dtype="float16").model
    for case in sorted({key.split(".")[0] for key in gold}):
        _, inputs = prepared(variant, case)
        inputs["pixel_values"] = inputs["pixel_values"].half()
        logits = model(**inputs).logits[0, -8:]
        assert logits.dtype == torch.float16
        close(logits, gold[f"{case}.logits_last8_fp16"], 0.1)


@pytest.mark.parametrize(
    ("variant", "case"), [(v, c) for v in VARIANTS for c in read_json(ROOT, v, "hf_preview", "meta.json")["cases"]]
)
@torch.no_grad()
def test_golden_nvila_remote_code(variant: str, case: str) -> None:
    """The remote-code copy, where it runs and does not differ from main on purpose (media before the end of a turn)."""
    info = read_json(ROOT, variant, "hf_preview", "meta.json")["cases"][case]
    same = info.get("vs_main", {}).get("gen_ids_equal")
    if "exception" in info or not same:
        assert "exception" in info or case == "image_last" or "basic" in case
        return
    loaded, inputs = prepared(variant, case)
    gold = read_npz(ROOT, variant, "hf_preview", f"{case}.npz")
    close(loaded.model(**inputs).logits[0, -8:], gold["logits_last8"], 5e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if (ROOT / "units" / f"training_batch_{v}.npz").is_file()])
@torch.no_grad()
def test_golden_nvila_training_batch(variant: str) -> None:
    """A padded batch with labels: spliced embeddings, logits at the targets, loss."""
    gold = read_npz(ROOT, "units", f"training_batch_{variant}.npz")
    info = read_json(ROOT, "units", f"training_batch_{variant}.json")
    model, tokenizer, spec = configured(variant, {})
    newline = tokenizer(spec.image_end, add_special_tokens=False).input_ids
    sizes = ast.literal_eval(info["media_config"])["image"]["original_image_sizes"]
    files = {path.name.split("_")[1]: path for path in (ROOT / "images").iterdir()}
    pixels, grids, blocks = [], [], []
    for height, width in sizes:  # one picture at a time: in training the official code tiles every picture of a prompt
        picture = {"type": "image", "image": files[f"{width}x{height}"]}
        made = plan([{"role": "user", "content": [picture]}], spec, tokenizer)
        inputs = execute(made)
        pixels.append(inputs.pixel_values)
        grids.append(inputs.image_grids)
        blocks += [made.media[0].num_features // len(inputs.image_grids)] * len(inputs.image_grids)
    rows, labels, queue = [], [], iter(blocks)
    for ids, label, mask in zip(gold["input_ids"], gold["labels"], gold["attention_mask"]):
        row, target = [], []
        for token, wanted in zip(ids[mask].tolist(), label[mask].tolist()):
            run = [token] * next(queue) + newline if token == model.config.image_token_id else [token]
            row += run
            target += [wanted] if len(run) == 1 else [-100] * len(run)
        rows.append(row)
        labels.append(target)
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    assert torch.equal(mask.bool(), torch.from_numpy(gold["embeds_mask"]))
    assert torch.equal(labels, torch.from_numpy(gold["embeds_labels"]))

    features = model.get_image_features(torch.cat(pixels), torch.cat(grids)).pooler_output
    embeds = model.embed(ids, features)
    close(embeds[mask.bool()], gold["embeds"][gold["embeds_mask"]], 1e-5)
    out = model(
        input_ids=ids, attention_mask=mask, labels=labels, pixel_values=torch.cat(pixels), image_grids=torch.cat(grids)
    )
    assert out.loss.item() == pytest.approx(info["loss_eval_unpacked"], abs=2e-5)
    supervised = labels[:, 1:] != -100
    close(out.logits[:, :-1][supervised], gold["logits_at_supervised"], 5e-5)


def test_golden_nvila_projectors() -> None:
    gold = read_npz(ROOT, "units", "projectors.npz")
    for kind in sorted({key.split(".")[0] for key in gold}):
        features = gold[f"{kind}.in"]
        weights = {
            k.removeprefix(f"{kind}.w."): torch.from_numpy(v) for k, v in gold.items() if k.startswith(f"{kind}.w.")
        }
        out_width = gold[f"{kind}.out"].shape[-1] if f"{kind}.out" in gold else features.shape[-1]
        projector = Projector(kind, features.shape[-1], out_width)
        projector.load_state_dict(weights)
        with torch.no_grad():
            close(projector(torch.from_numpy(features)), gold.get(f"{kind}.out", features), 1e-5)


def test_golden_nvila_s2_merge() -> None:
    gold = read_npz(ROOT, "units", "s2_merge.npz")
    for name, info in read_json(ROOT, "units", "s2_merge.json").items():
        case, _, index = name.partition(".idx")
        features = torch.from_numpy(gold[f"{case}.features"])
        side = round(features.shape[1] ** 0.5)
        joined = gold[f"{name}.map0"].shape[0] // features.shape[2]
        spec = PreprocessSpec(
            tile_size=side * 14,
            scales=tuple(side * 14 * (i + 1) for i in range(joined)),
            resize_to_scale=int(index),
        )
        start = 0
        for k, block in enumerate(info["blocks"]):
            grid = tuple(block) if block else (0, 0)
            count = tiles_per_image(grid, spec)
            maps = features[start : start + count].unflatten(1, (side, side))[None]
            start += count
            found, new_block = join_scales(maps, grid, spec)
            close(found[0].permute(2, 0, 1), gold[f"{name}.map{k}"], 1e-6)
            assert list(new_block) == info["new_blocks"][k]
        assert start == len(features)


def test_golden_nvila_temporal_pooling() -> None:
    gold = read_npz(ROOT, "units", "tsp.npz")
    for name, info in read_json(ROOT, "units", "tsp.json").items():
        clip = name.split(".")[0]
        frames = torch.from_numpy(gold[f"{clip}.x"])
        side = round(frames.shape[1] ** 0.5)
        levels = [pool_frames(frames.unflatten(1, (side, side)), level) for level in info["pool_sizes"]]
        if "exception" in info:  # not divisible: the official code stops
            shapes = [[-(-n // s) for n, s in zip((len(frames), side, side), level)] for level in info["pool_sizes"]]
            assert [list(level.shape[:3]) for level in levels] == shapes
            continue
        start, end, sep = (torch.from_numpy(gold[f"{clip}.{part}"]) for part in ("start", "end", "sep"))
        parts = []
        for level in levels:
            for group in level.flatten(1, 2):
                parts += [start] * info["start"] + [group] + [end] * info["end"]
            parts += [sep] * info["sep"]
        close(torch.cat(parts), gold[name], 1e-6)
