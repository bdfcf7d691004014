"""Reduction methods as users have them against the official code, on layouts made from the vectors of goldens/tokens.

What `test_reduce_golden.py` checks are the parts of these methods; FOVEATE_GOLDENS names other vectors for both.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foveate.reduce import dycoke, globalcom2, hired, prumerge, visionzip
from foveate.reduce.grid import stitched, unpadded
from goldens_io import cls_attention, equal, golden_cases, near
from layouts import clip, make, single, tiled


def of_method(method):
    return [pytest.param(case, id=f"{method}-{name}") for name, case in golden_cases("tokens", method).items()]


def places(layout, side):
    """The number view * patches + patch of every token, as the files count."""
    return layout.view * side * side + layout.row * side + layout.col


@pytest.mark.parametrize("case", of_method("hired"))
def test_hired_as_a_method_keeps_what_the_official_code_keeps(case):
    rate, alpha, rows, cols = case.params("token_budget_rate", "alpha", "grid_second", "grid_first")
    first, last = (part.transpose(1, 2) for part in cls_attention(case))  # [V, N, H]
    views, n, _ = first.shape
    if alpha == 1:
        pytest.skip("alpha 1 leaves the tiles nothing, which the method refuses")
    layout = make(tiled(rows, cols, math.isqrt(n), cut=0)).features()
    number = places(layout, math.isqrt(n))
    signals = {f"cls_attention@{b}": s.flatten(0, 1)[number] for b, s in ((0, first), (-1, last))}
    kept = hired.HiRED(keep=int(views * n * rate), alpha=alpha, strict="code").select(signals, layout).keep
    equal(sorted(number[kept].tolist()), {("out", "ids"): case["out", "mask"].flatten().nonzero()[0]}, "ids")


@pytest.mark.parametrize("case", of_method("visionzip"))
def test_visionzip_as_a_method_makes_the_tokens_of_the_official_code(case):
    if ("out", "error") in case:
        pytest.skip("more contextual tokens than are left: see the check of this case")
    dominant, contextual = case.params("dominant_without_cls", "contextual")
    attention, hidden, keys = (case.tensor(name) for name in ("cls_attn", "hidden", "key_metric"))
    layout = make(single(1, hidden.shape[1] - 1)).features()
    count = dominant + contextual
    method = visionzip.VisionZip(keep=count, contextual=(contextual + 0.5) / count)
    for row, states, metric, out in zip(attention, hidden, keys, case["out", "out"]):
        signals = {"cls_attention@-1": row[:, 1:].T, "keys@-1": metric[1:].repeat(1, len(row))}
        found = method.select(signals, layout).apply(states[1:])
        np.testing.assert_allclose(found, out[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", of_method("globalcom2"))
def test_globalcom2_as_a_method_keeps_what_the_official_code_keeps(case):
    rows, cols, keep, temperature = case.params("grid_h", "grid_w", "retention", "temperature")
    size = tuple(case.params("orig_w", "orig_h"))
    thumbnail, crops = case.tensor("base_scores"), case.tensor("crop_scores")
    n = len(thumbnail)
    side = math.isqrt(n)
    grid = stitched(rows, cols, side, side)
    down, across = unpadded(*grid.shape, size)
    layout = make(tiled(rows, cols, side, cut=0)).features()
    inside = (layout.global_row >= down.start) & (layout.global_row < down.stop)
    inside &= (layout.global_col >= across.start) & (layout.global_col < across.stop)
    layout = layout[inside | (layout.global_row < 0)]
    shown = layout.global_row >= 0
    layout.global_row[shown] -= down.start
    layout.global_col[shown] -= across.start
    number = places(layout, side)
    score = torch.cat([thumbnail, crops.flatten()])[number]
    method = globalcom2.GlobalCom2(keep=keep, temperature=temperature, strict="code")
    kept = number[method.select({"cls_logits@-1": score[:, None]}, layout).keep].tolist()
    official = case["out", "thumb_keep_order"].tolist()
    tokens = [token + n for token in case["out", "packed_ids"].tolist() if token >= 0]
    if len(layout[shown].groups("view")) < rows * cols:
        pytest.skip("a crop that is all padding has no place in a layout")
    # the code puts the tokens of a padded crop at other cells, so that only what is kept is the same
    order = list if shown.sum() == rows * cols * n else sorted
    assert kept[: len(official)] == official
    assert order(kept[len(official) :]) == order(tokens)


@pytest.mark.parametrize("case", of_method("dycoke"))
def test_dycoke_as_a_method_keeps_what_the_official_code_keeps(case):
    if ("in", "x") not in case:
        pytest.skip("a case of the second stage")
    frames, count, drop = case.params("frames", "tokens_per_frame", "k")
    kept_per_frame = int((1 - drop) * count)
    if kept_per_frame == 0 or frames < 5:
        pytest.skip("no frame may be emptied by a budget")
    layout = make([token for token in clip(frames + 1, 1, count) if token["frame"] < frames]).features()
    total = frames * count
    keep = (total + 3 * total * (kept_per_frame + 0.5) / count) / 4 / total
    found = dycoke.DyCoke(keep=keep, strict="code").select({"features": case.tensor("x")}, layout).keep
    equal(found, case, "ids")


@pytest.mark.parametrize("case", of_method("prumerge"))
def test_prumerge_as_a_method_makes_the_tokens_of_the_official_code(case):
    kind, adaptive, ratio = case.params("kind", "adaptive", "ratio")
    if kind == "plus":
        pytest.skip("the method fills the places of PruMerge+ without repetition")
    query, keys, hidden = (case.tensor(name) for name in ("q_cls", "k", "hidden"))
    n = len(keys) - 1
    method = prumerge.PruMerge(keep=n - 1 if adaptive else int(n * ratio) + 1, adaptive=adaptive)
    signals = {"cls_query@-1": query[None], "cls_key@-1": keys[:1], "keys@-1": keys[1:]}
    out = method.select(signals, make(single(1, n)).features()).apply(hidden[1:])
    near(out, case, "out", atol=1e-4)
