"""Reduction inside the language model against the official code: every case of the files of these methods.

Where a file gives states and weights of a toy layer, the signal itself is computed from them by `LayerView`, as in a
model. The same tests run on vectors of other seeds, shapes and budgets (FOVEATE_GOLDENS).
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from foveate.adapters.layout import VALID, VisualLayout
from foveate.adapters.shape import Shape
from foveate.llm_signals import LayerView
from foveate.reduce import sparsevlm
from foveate.reduce.base import layer_index
from foveate.reduce.fastv import FastV
from foveate.reduce.pyramiddrop import PyramidDrop
from foveate.reduce.sparsevlm import SparseVLM
from foveate.reduce.visiondrop import VisionDrop
from foveate.reduce.yopo import neighbours
from goldens_io import equal, golden_cases, golden_methods, noise_of

FAMILY = "tokens"


def line(n, start=0):
    """A layout of n tokens of one picture in a row."""
    zero, none = torch.zeros(n, dtype=torch.int64), torch.full((n,), -1)
    place = torch.arange(n)
    kind = torch.full((n,), VALID)
    return VisualLayout(zero, zero, none, zero, place, none, none, kind, place + start, torch.ones(n))


class Toy(nn.Module):
    """A decoder layer with the queries and keys of a golden file: norm weights of one, as many key heads as heads."""

    def __init__(self, case, layer):
        super().__init__()
        width, heads, eps = case.params("D", "heads", "rms_eps")
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        attention = self.self_attn = nn.Module()
        for kind in "qk":
            projection = nn.Linear(width, width, bias=False)
            projection.weight = nn.Parameter(case.tensor(f"W{kind}{layer}"))
            setattr(attention, f"{kind}_proj", projection)
        attention.head_dim = width // heads
        attention.scaling = attention.head_dim**-0.5
        attention.config = SimpleNamespace(num_attention_heads=heads)


def rotary(case, n):
    width, heads, base = case.params("D", "heads", "rope_base")
    d = width // heads
    angle = torch.arange(n)[:, None] / base ** (torch.arange(0, d, 2) / d)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


@torch.no_grad()
def signals_at(case, layer, hidden, start, count, names):
    """Signals of a step at a toy layer, positions renumbered, `count` visual tokens from `start` on."""
    toy = Toy(case, layer)
    n = len(hidden)
    empty = torch.zeros(1, n, 1)
    view = LayerView(
        before=toy,
        layer=toy,
        entered=hidden,
        rotary=rotary(case, n),
        keys=empty,
        values=empty,
        hidden=hidden,
        visual=torch.arange(start, start + count),
        text=torch.arange(start + count, n),
        given={"entered": torch.tensor(case["param", "image_len"])},
    )
    return view.signals(names)


def check_fastv(case):
    seq, start, count, dropped = case.params("seq", "image_start", "image_len", "R")
    method = FastV(keep=1 - dropped, layer=case["param", "K"])
    attention = case.tensor("attn_last_query")[:, start : start + count]
    keep = method.select({"last_attention": attention}, line(count, start)).keep
    equal(keep, case, "keep_image")
    assert method.count(count) == len(keep) == int(case["out", "n_keep"])
    around = [torch.arange(start), keep + start, torch.arange(start + count, seq)]
    for name in ("keep_all", "position_ids_after"):
        equal(torch.cat(around), case, name)
    assert method.position == "keep"


def check_pyramiddrop(case):
    start, total, ratios, layers = case.params("image_start", "image_len", "ratios", "rank_layers")
    method = PyramidDrop(keep=ratios[-1], layers=tuple(layers), ratios=tuple(ratios[1:]))
    hidden, numbers = case.tensor("hidden"), torch.arange(len(case["in", "hidden"]))
    assert method.position == "renumber"
    for stage, layer in enumerate(layers):
        count = len(hidden) - (len(case["in", "hidden"]) - total)
        signals = signals_at(case, layer, hidden, start, count, method.signals)
        keep = method.select(signals, line(count, start), stage).keep + start
        stays = torch.cat([torch.arange(start), keep, torch.arange(start + count, len(hidden))])
        hidden, numbers = hidden[stays], numbers[stays]
        equal(numbers, case, f"stage{stage}_kept_ids")


def check_visiondrop(case):
    start, total, schedule, layers = case.params(
        "image_start", "image_len", "schedule_dominant_contextual", "rank_layers"
    )
    assert sum(schedule[0]) == total
    method = VisionDrop(keep=0.5, layers=tuple(layers), schedule=tuple(n for pair in schedule[1:] for n in pair))
    hidden = case.tensor("hidden")
    text = len(hidden) - total
    names = ("next_visual_attention", "next_keys", "entered")
    for stage, layer in enumerate(layers):
        count = len(hidden) - text
        reduction = method.select(signals_at(case, layer, hidden, start, count, names), line(count), stage + 1)
        if reduction.weights is not None:  # each token stands where the one is that it was made of
            assert bool((reduction.weights.to_dense()[torch.arange(len(reduction.keep)), reduction.keep] == 1).all())
        visual = reduction.apply(hidden[start : start + count])
        hidden = torch.cat([hidden[:start], visual, hidden[start + count :]])
        expected = case.tensor(f"stage{stage}_out", "out")
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)
        hidden = expected


def check_sparsevlm(case):
    published = dict(case["param", "tables"])
    ends = [layer + 1 for layer in published.pop("layers")]  # tokens leave after these layers
    assert [layer_index(layer, 32, "sparsevlm") for layer in SparseVLM(keep=1).layers] == ends
    for budget, counts in published.items():
        version, _, tokens = budget.rpartition("_")
        method = SparseVLM(keep=int(tokens), version=version or "v1")
        assert [method.target(stage, sparsevlm.TOKENS) for stage in range(3)] == counts
    start, count, text = case.params("vision_start", "vision_num", "text_num")
    hidden = case.tensor("hidden_in_layer0")
    visual, words = hidden[start : start + count], hidden[start + count : start + count + text]
    raters = sparsevlm.text_raters(visual, words)
    equal(raters, case, "rater_idx")
    keep = case["param", "keep"]
    method = SparseVLM(keep=0.5)
    object.__setattr__(method, "target", lambda stage, total: keep)  # the file's own count, table or not
    attention = torch.zeros(case["param", "heads"], text, count)
    attention[:, raters] = case.tensor("attn_rater_to_vis")
    score = attention[:, raters].mean(dim=(0, 1))
    torch.testing.assert_close(score, case.tensor("relation", "out"), atol=1e-6, rtol=1e-4)
    signals = {
        "text_attention": attention,
        "text_input": words,
        "visual_input": visual,
        "hidden": visual,
        "entered": torch.tensor(count),
    }
    with noise_of(case["param", "torch_seed_before_cluster"], sparsevlm):
        reduction = method.select(signals, line(count, start), 0)
    kept = reduction.keep[:keep]
    equal(kept, case, "vis_keep")
    order = sparsevlm.recycled(score, kept)
    equal(order, case, "recycle_order")
    torch.testing.assert_close(visual[order], case.tensor("merge_in", "out"))
    clusters = int(case["out", "clusters"])
    assert len(order) == int(case["out", "recycled"]) and sparsevlm.clusters_of(count - keep) == clusters
    merged = reduction.apply(visual)
    torch.testing.assert_close(merged[keep:], case.tensor("merge_out", "out"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged[:keep], visual[kept])
    assert method.left(0, count, count) == len(merged) == int(case["out", "kept_visual_after_stage"])


def check_sparsevlm_v2(case):
    attention, keep, count = case.tensor("attn_rater_to_vis"), *case.params("keep", "heads_kept")
    heads = sparsevlm.strongest_heads(attention, count)
    equal(heads, case, "heads")
    score = attention[heads].mean(dim=(0, 1))
    torch.testing.assert_close(score, case.tensor("relation", "out"), atol=1e-6, rtol=1e-4)
    method = SparseVLM(keep=0.5, version="v2", heads=count, prior=False)
    object.__setattr__(method, "target", lambda stage, total: keep)
    raters = case["param", "raters"]
    rows = max(raters) + 1
    full = torch.zeros(len(attention), rows, attention.shape[2])
    full[:, raters] = attention
    # embeddings that make exactly these words raters
    words = torch.full((rows, 1), -1.0)
    words[raters] = 1.0
    signals = {
        "text_attention": full,
        "text_input": words,
        "visual_input": torch.ones(attention.shape[2], 1),
        "entered": torch.tensor(attention.shape[2]),
    }
    found = method.select(signals, line(attention.shape[2]), 0).keep
    equal(found, case, "vis_keep")


def check_yopo(case):
    side, window, query = case.params("grid", "window", "query")
    place = torch.arange(side * side)
    layout = replace(line(side * side), row=place // side, col=place % side)
    allowed = neighbours(layout, window)[query].nonzero().flatten()
    np.testing.assert_array_equal(allowed.numpy(), np.sort(case["out", "allowed"]))


CHECKS = {
    "yopo": check_yopo,
    "fastv": check_fastv,
    "pyramiddrop": check_pyramiddrop,
    "sparsevlm": check_sparsevlm,
    "sparsevlm_v2": check_sparsevlm_v2,
    "visiondrop": check_visiondrop,
}
CASES = {
    f"{method}-{name}": (method, case)
    for method in golden_methods(FAMILY)
    if method in CHECKS
    for name, case in golden_cases(FAMILY, method).items()
}


@pytest.mark.parametrize("case", CASES)
def test_golden_tokens_in_the_language_model(case):
    method, values = CASES[case]
    CHECKS[method](values)


# ---- what the files do not say


def test_sparsevlm_plus_divides_by_what_the_rotary_embedding_alone_would_give():
    signals = {
        "text_attention": torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 1.0]]]),
        "text_prior": torch.tensor([[4.0, 1.0, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0]]),
        "text_input": torch.tensor([[1.0], [-1.0]]),  # the first word alone rates
        "visual_input": torch.ones(4, 1),
        "entered": torch.tensor(4),
    }
    for prior, kept in ((True, [1, 3]), (False, [0, 1])):
        method = SparseVLM(keep=2, version="v2", prior=prior)
        assert method.select(signals, line(4)).keep.tolist() == kept
    shape = Shape(blocks=1, layers=32)
    for version, position in (("v1", "renumber"), ("v2", "keep")):
        assert {step.position for step in SparseVLM(keep=0.5, version=version).steps(shape)} == {position}


def test_clusters_of_sparsevlm_stand_at_their_centres():
    hidden = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    order = torch.arange(15, 40).flip(0)
    centres, weights = sparsevlm.clustered(hidden, order)
    assert len(centres) == 3 and set(centres.tolist()) <= set(order.tolist())
    assert bool((weights[torch.arange(3), centres] > 0).all()) and not weights[:, :15].any()


def test_visiondrop_rounds_halves_up_and_keeps_no_more_than_there_is():
    assert VisionDrop(keep=32).left(1, 20, 20) == (13, 2)  # 35 of 48, and 5 of these 35
    method = VisionDrop(keep=0.5, layers=(0.5,), schedule=(50, 9))
    assert [method.left(1, n, n) for n in (70, 55, 10)] == [(50, 9), (50, 5), (10, 0)]
