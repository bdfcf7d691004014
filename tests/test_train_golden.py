"""The training step against the official NVILA code: one packed batch, its logits at the targets, its loss."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch

from foveate.data.execute import cut_views, normalise
from foveate.data.plan import plan
from foveate.nvila.checkpoint import load
from foveate.train.batch import MicroBatch
from foveate.train.packing import Tokens, pack
from foveate.train.step import accumulate_gradients, make_losses, run_model
from goldens_io import goldens_dir, read_json, read_npz

ROOT = goldens_dir("nvila")
VARIANTS = [v for v in ("nvila", "lite") if (ROOT / "units" / f"training_batch_{v}.npz").is_file()]


def packed_batch(variant: str, model, tokenizer, spec) -> tuple[MicroBatch, dict]:
    """The three official samples packed in one row, with their pictures tiled as the official code does in training."""
    gold = read_npz(ROOT / "units" / f"training_batch_{variant}.npz")
    info = read_json(ROOT / "units" / f"training_batch_{variant}.json")
    files = {path.name.split("_")[1]: path for path in (ROOT / "images").iterdir()}
    newline = tokenizer(spec.image_end, add_special_tokens=False).input_ids
    views, grids, features = [], [], []
    per_picture = []
    for height, width in ast.literal_eval(info["media_config"])["image"]["original_image_sizes"]:
        picture = {"type": "image", "image": files[f"{width}x{height}"]}
        made = plan([{"role": "user", "content": [picture]}], spec, tokenizer)
        cut = cut_views(made.media, spec)
        views.append(cut[0])
        grids.append(cut[1])
        per_picture.append(made.media[0].blocks)
        features += [made.media[0].num_features // made.media[0].blocks] * made.media[0].blocks
    samples, queue = [], iter(features)
    for ids, labels, mask in zip(gold["input_ids"], gold["labels"], gold["attention_mask"]):
        row, target = [], []
        for token, wanted in zip(ids[mask].tolist(), labels[mask].tolist()):
            is_picture = token == model.config.image_token_id
            run = [token] * next(queue) + newline if is_picture else [token]
            row += run
            target += [-100] * len(run) if is_picture else [wanted]
        samples.append(Tokens(np.zeros(0, np.int64), [(np.array(row), np.array(target))]))
    packed = pack(samples, sum(len(s) for s in samples), tokenizer.pad_token_id)
    # packing puts the longest sample first, and its pictures must come with it
    owner_of_block = [i for i, ids in enumerate(gold["input_ids"]) for t in ids if t == model.config.image_token_id]
    owner = [owner_of_block[at] for at in np.cumsum([0, *per_picture[:-1]])]
    order = [k for i in packed.order for k, sample in enumerate(owner) if sample == i]
    names = ("input_ids", "position_ids", "allowed", "target_index", "targets")
    batch = MicroBatch(
        pixels=normalise(np.concatenate([views[k] for k in order]), spec),
        num_tiles=sum(len(v) for v in views),
        image_grids=[g for k in order for g in grids[k]],
        video_frames=[],
        dense=None,
        num_samples=3,
        **{name: torch.from_numpy(getattr(packed, name)) for name in names},
    )
    return batch, {**gold, **info, "order": packed.order}


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_nvila_packed_training_step(variant: str) -> None:
    model, tokenizer, spec = load(ROOT / variant / "ckpt")
    batch, gold = packed_batch(variant, model, tokenizer, spec)
    assert batch.input_ids.shape[0] == 1

    with torch.no_grad():
        output = run_model(model, batch, train_tower=False)
        logits = output.head(output.hidden)
    counts = gold["n_targets_each"]
    expected = dict(enumerate(np.split(gold["logits_at_supervised"], np.cumsum(counts)[:-1])))
    expected = np.concatenate([expected[i] for i in gold["order"]])
    torch.testing.assert_close(logits, torch.from_numpy(expected), atol=5e-5, rtol=0)

    values = accumulate_gradients(
        model, make_losses({"lm": 1.0}, model, tokenizer, torch.nn.ModuleDict()), [batch], "float32"
    )
    assert values["loss"] == pytest.approx(gold["loss_eval_unpacked"], abs=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_nvila_packing(variant: str) -> None:
    """Positions and targets of each sample in one packed row; the official row keeps the samples' order."""
    gold = read_npz(ROOT / "units" / f"training_batch_{variant}.npz")
    info = read_json(ROOT / "units" / f"training_batch_{variant}.json")
    samples = [labels[mask] for labels, mask in zip(gold["embeds_labels"], gold["embeds_mask"])]
    places, labels, real = (gold[f"repack_{name}"][0] for name in ("position_ids", "labels", "mask"))
    assert len(places) == info["repack_len"] and real.tolist() == [1] * sum(map(len, samples)) + [0]
    none = np.zeros(0, np.int64)
    parts = [Tokens(none, [(np.zeros_like(own), own)]) for own in samples]
    packed = pack(parts, len(places), 0)
    assert len(packed.input_ids) == 1 and packed.real.sum() == real.sum()
    starts = np.cumsum([0, *(len(samples[i]) for i in packed.order)])
    official = np.cumsum([0, *map(len, samples)])
    for slot, number in enumerate(packed.order):
        span, mine = (slice(at[i], at[i + 1]) for at, i in ((official, number), (starts, slot)))
        assert packed.position_ids[0, mine].tolist() == places[span].tolist()
        assert packed.real[0, mine].all()
        seen = packed.allowed[0, mine]  # of its own sample all that came before, and nothing else
        assert seen.sum(axis=1).tolist() == seen[:, mine].sum(axis=1).tolist() == (places[span] + 1).tolist()
        own = (packed.target_index >= mine.start) & (packed.target_index < mine.stop)
        found = zip(packed.position_ids[0, packed.target_index[own]] + 1, packed.targets[own])
        wanted = [pair for pair in zip(places[span], labels[span]) if pair[1] != -100]
        assert list(found) == wanted and len(wanted) == info["n_targets_each"][number]
