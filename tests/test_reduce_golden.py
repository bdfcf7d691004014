"""Token reduction against the official code of each method: every case of every file under goldens/tokens.

A check takes one case and derives everything from it, so the same tests run on vectors of other seeds, shapes and
budgets (FOVEATE_GOLDENS). Integers and masks are equal; floats within 1e-4 and 1e-5 unless the file's page says more.
"""

from __future__ import annotations

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch

from foveate.errors import BudgetError
from foveate.reduce import (
    divprune,
    dycoke,
    fastervlm,
    flowcut,
    framefusion,
    globalcom2,
    hired,
    holitom,
    mmtok,
    pitome,
    prumerge,
    prunevid,
    quota,
    ts_llava,
    visionzip,
)
from foveate.reduce.base import top_k
from foveate.reduce.frames import likeness
from foveate.reduce.grid import stitched, unpadded
from foveate.reduce.merge import bipartite
from foveate.reduce.select import above_threshold, coverage
from foveate.registry import METHODS
from goldens_io import cls_attention, equal, golden_cases, golden_methods, near, noise_of

FAMILY = "tokens"


def check_fastervlm(case):
    (keep,) = case.params("keep")
    mask, score = fastervlm.keep_mask(case.tensor("cls_attn"), keep)
    equal(mask, case, "mask")
    near(score, case, "score")
    equal(np.stack([row.nonzero().flatten() for row in mask]), case, "keep")
    # without ties the threshold of the text-dominance paper chooses the same
    equal(np.stack([above_threshold(row, keep) for row in score]), case, "keep")


def check_hired(case):
    rate, alpha, rows, cols, size = case.params(
        "token_budget_rate", "alpha", "grid_second", "grid_first", "image_size_hw"
    )
    first, last = cls_attention(case)
    mask = hired.keep_mask(first, last, rate, alpha)
    equal(mask, case, "mask")
    equal(mask.sum(dim=1), case, "tile_counts")
    n = last.shape[-1]
    side = math.isqrt(n)
    grid = stitched(rows, cols, side, side)
    shown = grid[unpadded(*grid.shape, (size[1], size[0]))].flatten() + n
    equal(torch.cat([mask[0].nonzero().flatten(), shown[mask.flatten()[shown]]]), case, "packed_ids")


def check_visionzip(case):
    dominant, contextual = case.params("dominant_without_cls", "contextual")
    if ("out", "error") in case:  # more contextual tokens than are left: ours says so
        heads, n = case.params("H", "N")
        generator = torch.Generator().manual_seed(0)
        attention = torch.rand(1, heads, n + 1, generator=generator)
        hidden, keys = torch.randn(1, n + 1, 8, generator=generator), torch.randn(1, n + 1, 8, generator=generator)
        with pytest.raises(BudgetError, match=f"{contextual} contextual tokens"):
            visionzip.zip_tokens(attention, hidden, keys, dominant, contextual)
        return
    best, out = visionzip.zip_tokens(
        case.tensor("cls_attn"), case.tensor("hidden"), case.tensor("key_metric"), dominant, contextual
    )
    equal(best, case, "dominant_idx_unsorted")
    near(out, case, "out")


def check_flowcut(case):
    batch, n, layers, target = case.params("B", "N", "layers", "target_incl_cls")
    target -= 1
    alive = torch.arange(n).expand(batch, n)
    cumulative, calls, ratios, counts = None, 0, [], [n]
    for layer in range(layers):
        left = layers - 3 - layer
        if alive.shape[1] > target and left >= 0:
            attention, semantic, norm = (case.tensor(f"s{calls}_{name}") for name in ("cls", "sem", "vL1"))
            score = flowcut.flow(attention, semantic, norm)
            near(score, case, f"s{calls}_score", atol=1e-6)
            cumulative = flowcut.cumulated(cumulative, score)
            calls += 1
            if left % 2 == 0:
                gone = flowcut.leaving(attention, target, left)
                if left:
                    ratios.append((left, target, gone))
                kept = top_k(cumulative, alive.shape[1] - gone)
                alive, cumulative = alive.gather(1, kept), cumulative.gather(1, kept)
        counts.append(alive.shape[1])
    equal(alive, case, "final_keep")
    equal(ratios, case, "ratio_calls")
    equal(counts, case, "patch_counts_entering_each_layer")
    equal(calls, case, "score_calls")


def check_flowcut_llm(case):
    start, length, end, target = case.params("visual_start", "visual_len", "last_instruct_pos", "target")
    query, keys, values = (case.tensor(name) for name in "qkv")
    seen = slice(start, start + length)
    scale = query.shape[-1] ** -0.5
    attention = (query[:, end - 1, None] * keys * scale).sum(dim=-1).softmax(dim=-1)[:, seen]
    semantic = ((values[:, end - 1, None] * values[:, seen]).sum(dim=-1) * scale).softmax(dim=-1)
    score = flowcut.flow_inside(attention, semantic, values[:, seen].transpose(0, 1))
    equal(top_k(score, target), case, "keep")


def check_mmtok(case):
    if ("param", "question") in case:
        assert mmtok.keywords(case["param", "question"]) == case["out", "keywords"]
        return
    count, alpha, text, vision, shut = case.params("k", "alpha", "tv_temp", "vv_temp", "excluded_first_n")
    projected = case.tensor("vision_proj")
    rows = mmtok.covering(case.tensor("text"), projected, case.tensor("vision_clip"), alpha, text, vision)
    excluded = torch.arange(len(projected)) < shut
    order = coverage(rows, count, excluded)
    equal(order.sort().values, case, "keep")
    # the last picks gain next to nothing: two may change places
    assert (order.numpy() == case["out", "greedy_order"]).mean() > 0.9


def check_globalcom2(case):
    size = tuple(case.params("orig_w", "orig_h"))
    rows, cols, keep, temperature = case.params("grid_h", "grid_w", "retention", "temperature")
    thumbnail = case.tensor("base_scores")
    near(globalcom2.crop_ratios(thumbnail, rows, cols, keep, temperature), case, "scales", atol=1e-9)
    order, emitted = globalcom2.packed(thumbnail, case.tensor("crop_scores"), rows, cols, size, keep, temperature)
    equal(order, case, "thumb_keep_order")
    equal(emitted, case, "packed_ids")


def check_divprune(case):
    features = case.tensor("x")
    order = divprune.diverse(features, round(case["param", "ratio"] * len(features)))
    assert len(order) == case["out", "n"]
    equal(order, case, "order")
    equal(order.sort().values, case, "keep")


def check_prumerge(case):
    kind, adaptive, ratio = case.params("kind", "adaptive", "ratio")
    keys, hidden = case.tensor("k"), case.tensor("hidden")[1:]
    attention = prumerge.cls_attention(case.tensor("q_cls"), keys)
    near(attention, case, "cls_attn")
    found = prumerge.outlier_ratio(attention)
    near(found, case, "outlier_ratio")
    chosen = prumerge.selected(attention, found if adaptive else ratio, kind == "plus", adaptive)
    out = prumerge.merged(attention, keys[1:], chosen) @ hidden
    assert len(out) == case["out", "out_tokens"]
    near(out, case, "out", atol=1e-4)


def check_tome(case):
    r, again, class_token, distill_token = (case.get(("param", k)) for k in ("r", "r2", "class_token", "distill_token"))
    metric, x = case.tensor("metric"), case.tensor("x")
    matching = bipartite(metric, r, class_token, distill_token)
    if ("out", "noop") in case:
        assert torch.equal(matching.slot, torch.arange(x.shape[1]).expand(x.shape[:2]))
        assert torch.equal(matching.merge(x)[0], x)
        return
    out, size = matching.merge(x)
    near(out, case, "out")
    near(size, case, "size")
    equal(torch.nn.functional.one_hot(matching.slot, out.shape[1]).transpose(1, 2), case, "source")
    width = metric.shape[-1]
    second = out.repeat(1, 1, math.ceil(width / out.shape[-1]))[..., :width]  # as the file's page says
    out, size = bipartite(second, again, class_token, distill_token).merge(out, size)
    near(out, case, "out2")
    near(size, case, "size2")


def check_pitome(case):
    ratio, margin, class_token, mode = case.params("ratio", "margin", "class_token", "mode")
    metric, x = case.tensor("metric"), case.tensor("x")
    out, size = pitome.merge_ratio(metric, ratio, margin, class_token, mode).merge(x)
    for found, name in ((out, "out"), (out, "out_mean"), (size, "size")):  # all sizes are 1 before: both are means
        near(np.sort(found, axis=1), {("out", name): np.sort(case["out", name], axis=1)}, name)
    if ("out", "energy") in case:
        near(pitome.energy(metric[:, int(class_token) :], margin, mode == "text"), case, "energy")
    # rows of nearly equal energy may change places: nearly all stand where they should
    assert np.isclose(out, case["out", "out"], rtol=1e-4, atol=1e-5).all(axis=-1).mean() > 0.98


def check_holitom(case):
    keep, tau, share, beta, k, longest, newline, side = case.params(
        "retain", "tau", "D_contextual_share", "beta", "K", "max_window", "newline", "side"
    )
    method = holitom.HoliTom(keep=keep, threshold=tau, contextual=share, beta=beta, neighbours=k, window=longest)
    x, attention = case.tensor("x"), case.tensor("attn")
    frames, places, width = x.shape
    near(likeness(x), case, "sim")
    static = likeness(x) > tau
    windows, saved = holitom.segment(static, longest)
    equal(windows, case, "windows")
    ratio = holitom.effective_ratio(keep, frames * places, saved)
    assert saved == case["out", "total_reduced"]
    near(ratio, case, "effective_retain")
    present = torch.ones(frames, places, dtype=torch.bool)
    out, lengths, still = [], [], []
    with noise_of(case["param", "torch_seed"], holitom):
        made = [method.window_parts(x, attention, static, window, ratio, present) for window in windows]
    for (first, last), parts in zip(windows, made):
        tokens = [(part.source[part.keep] % places, apply(part, x.view(-1, width))) for part in parts]
        if newline == "grid":  # the static tokens fall in with the first frame's, and each row that is left ends a line
            first_frame = len(tokens) - (last - first)
            merged = [torch.cat(both) for both in zip(*tokens[:first_frame])]
            order = merged[0].argsort()
            tokens = [(merged[0][order], merged[1][order]), *tokens[first_frame:]]
            tokens = [(None, with_newlines(place // side, states)) for place, states in tokens]
        out += [states for _, states in tokens]
        lengths.append(sum(len(states) for _, states in tokens))
        still.append(int(static[first:last].all(dim=0).sum()) if last > first else 0)
    equal(lengths, case, "seg_lens")
    equal(still, case, "static_counts")
    near(torch.cat(out), case, "out", atol=1e-4)


def apply(part, x):
    """A part's tokens."""
    return x[part.source[part.keep]] if part.weights is None else part.weights @ x[part.source]


def with_newlines(rows, states, newline=9.0):
    """The states with a constant row after each row of the map."""
    lines = [torch.cat([states[rows == row], torch.full_like(states[:1], newline)]) for row in rows.unique()]
    return torch.cat(lines) if lines else states


def check_holitom_inner(case):
    start, length, gone = case.params("image_start", "image_len", "R")
    hidden, attention = case.tensor("hidden_in"), case.tensor("attn_last_query").mean(dim=0)
    seen = slice(start, start + length)
    kept, weights = holitom.halving(hidden[seen], attention[seen], round(length * (1 - gone)))
    after = torch.arange(start + length, len(hidden))
    equal(torch.cat([torch.arange(start), kept + start, after]), case, "keep_all")
    near(torch.cat([hidden[:start], weights @ hidden[seen], hidden[after]]), case, "hidden_out")


def check_quota(case):
    side, frames, per_frame, version = case.params("side", "total_frames_budget", "tokens_per_frame", "version")
    x = case.tensor("x")
    counts = quota.quotas(case.tensor("p_yes"), frames * per_frame, x.shape[1], version)
    found = []
    for states, count in zip(x, counts):
        if count > 0:
            weights, shape = quota.compressing(states, (side, side), count, version)
            found.append((weights @ states).view(*shape, -1))
    assert [list(states.shape) for states in found] == case["out", "out_shapes"]
    for number, states in enumerate(found):
        near(states, case, f"frame{number}", atol=1e-4)


def check_ts_llava(case):
    if ("out", "indices") in case:
        equal(ts_llava.equal_steps(*case.params("N", "k")), case, "indices")
    elif ("out", "rows_cols") in case:
        equal(ts_llava.thumbnail_grid(*case.params("n_images")), case, "rows_cols")
    else:
        side, step = case.params("frame_px", "sample_step")
        values = case.tensor("frame_values")
        picture = ts_llava.thumbnail(values.view(-1, 1, 1, 1).expand(-1, 3, side, side), side)
        equal(picture.shape, case, "shape")
        near(picture[0, ::step, ::step], case, "layout")


def check_dycoke(case):
    if ("in", "x") in case:
        frames, places, drop = case.params("frames", "tokens_per_frame", "k")
        equal(dycoke.kept(case.tensor("x"), frames, drop), case, "ids")
        assert int((1 - drop) * places) == case["out", "kept_per_pruned_frame"]
        return
    start, length, drop, similarity = case.params("image_start", "image_len", "prune_ratio", "similarity_threshold")
    before = None
    for step in itertools.takewhile(lambda i: ("in", f"step{i}_attn") in case, itertools.count()):
        heads = case.tensor(f"step{step}_attn")
        attention = heads.mean(dim=0)[start : start + length]
        kept = dycoke.attended(attention, before, int(length * (1 - drop)), similarity)
        before = attention
        text = [*range(start), *range(start + length, heads.shape[1])]
        found = [-1] if kept is None else sorted([*text, *(kept + start).tolist()])
        assert found == sorted(case["out", f"step{step}_kv_keep"].tolist())


def check_prunevid(case):
    if ("in", "labels") in case:
        equal(prunevid.refine(case.tensor("labels")), case, "labels")
        return
    tau, segments, ratio, alpha = case.params("tau", "temporal_segment_ratio", "cluster_ratio", "alpha")
    merged, sizes = prunevid.merge_clip(case.tensor("x"), tau, segments, ratio)
    for column, name in enumerate(("static_sizes", "dynamic_sizes", "window_sizes")):
        equal([size[column] for size in sizes], case, name)
    near(merged, case, "merged", atol=1e-4)
    each = [n for static, dynamic, frames in sizes for n in (static, *[dynamic // frames] * frames)]
    sets = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))
    equal(prunevid.attended(case.tensor("text_to_img_attn"), sets, alpha), case, "llm_keep_sorted")


OFFICIAL_LAYERS = 28
"""FrameFusion's code counts so many layers whatever the model; its files say otherwise only where they vary it."""


def check_framefusion(case):
    layers = case.get(("param", "layers"), OFFICIAL_LAYERS)
    if ("param", "sparsity_list") in case:
        gone, cost = case.params("sparsity_list", "cost")
        near(framefusion.remaining(gone, cost, layers), case, "pruning_ratio")
        return
    cost, similarity, least = case.params("cost", "sim_lb", "ratio_lb")
    hidden, place = case.tensor("hidden"), case.tensor("patch_type").long()
    ids, progress, log = torch.arange(len(hidden)), framefusion.Progress(), []
    for call in range(len(case["out", "log"])):
        before = len(ids)
        if progress.merging_done:
            kept, progress = framefusion.prune_call(case.tensor("attn_lastq"), place, progress, cost, layers)
            hidden = hidden[kept]
        else:
            kept, weights, progress = framefusion.merge_call(hidden, place, progress, cost, layers, similarity, least)
            hidden = hidden[kept] if weights is None else weights @ hidden
        ids, place = ids[kept], place[kept]
        equal(ids, case, f"call{call}_ids")
        near(hidden, case, f"call{call}_hidden", atol=1e-4)
        log.append([call, before, len(ids), progress.merging_done, progress.pruning_done])
    equal(log, case, "log")
    near(progress.merged, case, "sparsity")


CHECKS = {
    "divprune": check_divprune,
    "dycoke": check_dycoke,
    "fastervlm": check_fastervlm,
    "flowcut": check_flowcut,
    "flowcut_llm": check_flowcut_llm,
    "framefusion": check_framefusion,
    "globalcom2": check_globalcom2,
    "hired": check_hired,
    "holitom": check_holitom,
    "holitom_inner": check_holitom_inner,
    "mmtok": check_mmtok,
    "pitome": check_pitome,
    "prumerge": check_prumerge,
    "prunevid": check_prunevid,
    "quota": check_quota,
    "tome": check_tome,
    "ts_llava": check_ts_llava,
    "visionzip": check_visionzip,
}
"""Golden file -> what compares one of its cases with ours."""

CASES = {
    f"{method}-{name}": (method, case)
    for method in golden_methods(FAMILY)
    if method in CHECKS
    for name, case in golden_cases(FAMILY, method).items()
}


@pytest.mark.parametrize("case", CASES)
def test_golden_tokens(case):
    method, values = CASES[case]
    if ("out", "error") in values and method != "visionzip":
        pytest.skip(f"the official code failed here ({values['out', 'error']}), so there is nothing to compare with")
    CHECKS[method](values)


def test_golden_tokens_files_of_registered_methods_are_all_checked():
    checked = set(CHECKS)
    if importlib.util.find_spec("test_reduce_llm_golden"):  # the methods inside the language model have their own file
        checked |= set(importlib.import_module("test_reduce_llm_golden").CHECKS)
    unchecked = [
        name
        for name in golden_methods(FAMILY)
        if any(name == m or name.startswith(f"{m}_") for m in METHODS) and name not in checked
    ]
    assert unchecked == []
    assert CASES
