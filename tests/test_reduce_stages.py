"""Methods that act in several places: inside the encoder, inside the language model, in the cache while decoding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from families import clip, picture, tiny
from foveate.adapters.layout import VisualLayout
from foveate.adapters.shape import Shape
from foveate.data.sample import VideoSource
from foveate.errors import BudgetError, RecipeError
from foveate.reduce.base import tokens_per_layer
from foveate.reduce.dycoke import DyCoke
from foveate.reduce.flowcut import FlowCut, leaving
from foveate.reduce.framefusion import FrameFusion, Progress, merge_call, prune_call, remaining
from foveate.reduce.holitom import HoliTom
from foveate.reduce.prunevid import PruneVid, attended
from foveate.reduce.quota import Quota, score_frames
from foveate.reduce.tome import ToMe
from foveate.runtime import Clock, open_batch
from foveate.vlm import Request
from layouts import LAYOUTS, make, single
from layouts import clip as frames_of
from reduce_oracle import recorded, replayed, rows_of

PICTURES = [picture(0), picture(1, 30, 90)]
TOKENS = (65, 70, 66)


def run(vlm, request, tokens=TOKENS):
    """(row, what each step inside the language model chose, logits of the prompt and of each token)."""
    (row,) = rows_of(vlm, [request])
    row, notes = recorded(row)
    batch = open_batch(vlm.adapter, [row], vlm.new_cache(), Clock(vlm.device))
    first = batch.prefill()[0]
    chosen = list(notes)
    return row, chosen, [first, *(batch.decode(torch.tensor([token]))[0] for token in tokens)], notes


# ---- inside the encoder


@pytest.mark.parametrize("keep", [0.5, 0.1, 3])
@pytest.mark.parametrize("method", ["tome", "pitome", "flowcut"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "smolvlm"])
@torch.inference_mode()
def test_views_leave_the_encoder_with_as_many_tokens_as_were_asked_for(family, method, keep):
    vlm = tiny(family)
    assert torch.equal(
        vlm.logits(Request("what?", PICTURES, reduce=f"{method}(keep=1.0)")), vlm.logits(Request("what?", PICTURES))
    )
    request = Request("what?", PICTURES, reduce=f"{method}(keep={keep})")
    (row,) = rows_of(vlm, [request])
    sizes = vlm.adapter.layout(vlm.plan(request.to_messages())).features().sizes()
    (reducer,) = vlm.reducers(request.reduce)
    in_encoder = method != "flowcut" or vlm.adapter.has_cls
    assert {step.site for step in reducer.steps(vlm.adapter.shape)} == {"encoder" if in_encoder else "post_projector"}
    expected = sum(reducer.count(n) for media in sizes for n in media)
    assert row.kept == expected == tokens_per_layer([reducer], sizes, vlm.adapter.shape)[-1]
    if method != "flowcut":  # nothing is lost in a merge
        assert float(row.layout.size.sum()) == row.visual


@torch.inference_mode()
def test_a_block_merges_its_share_and_the_last_one_what_is_left():
    layout = make(single(6, 9)).features()
    keys = torch.randn(54, 16, generator=torch.Generator().manual_seed(0))
    method = ToMe(keep=10)
    for block, expected in enumerate((43, 32, 21, 10)):
        reduction = method.select_in_block({"keys": keys}, layout, block, 4, heads=4)
        assert len(reduction.keep) == expected
        size = (reduction.weights.to_dense() > 0).float() @ layout.size
        layout = dataclasses.replace(layout[reduction.keep], size=size)
        keys = reduction.weights @ keys
    assert float(layout.size.sum()) == 54


def test_a_block_matches_the_mean_keys_of_its_heads_at_its_depth():
    seen = []

    class Watched(ToMe):
        def match(self, metric, r, depth):
            seen.append((metric[0], depth))
            return super().match(metric, r, depth)

    layout, keys = make(single(6, 9)).features(), torch.randn(54, 16, generator=torch.Generator().manual_seed(0))
    reduction = Watched(keep=10).select_in_block({"keys": keys}, layout, 1, 4, heads=2)
    ((metric, depth),) = seen
    torch.testing.assert_close(metric, (keys[:, :8] + keys[:, 8:]) / 2)
    assert {step.where for step in ToMe(keep=10).steps(Shape(blocks=3, layers=4))} == {"mid"}
    assert depth == 0.25 and reduction.keep.tolist() == sorted(reduction.keep.tolist())


def test_even_attention_lets_few_patches_go_and_sharp_attention_many():
    even, sharp = torch.full((1, 100), 0.01), torch.zeros(1, 100)
    sharp[0, :2] = 0.5
    assert leaving(even, 20, 4) == 0
    assert leaving(sharp, 20, 4) > 35
    assert leaving(even, 20, 0) == 80  # at the end all above the target go


def flowed(attention, of_cls, values, heads):
    """The score of one block written out: attention [n], the values of CLS [H * d] and of the patches [n, H * d]."""
    norm = values.unflatten(-1, (heads, -1)).mean(dim=1).abs().sum(dim=-1)
    semantic = torch.zeros(len(values))
    for one, others in zip(of_cls.chunk(heads), values.chunk(heads, dim=-1)):
        weight = torch.exp(others @ one)
        semantic += weight / (weight.sum() + torch.exp(one @ one)) / heads
    return (attention / attention.sum() + semantic / semantic.sum()) * norm


def test_flowcut_cuts_in_every_second_block_by_what_has_flowed_so_far():
    generator = torch.Generator().manual_seed(0)
    method = FlowCut(keep=0.2)
    steps = method.steps(Shape(blocks=6, layers=4, cls=True, heads=2))
    assert [step.layer for step in steps] == [0, 1, 2, 3, 4]  # the last block runs on what is left
    views = [make(single(4, 6)).features(), make(single(3, 4, view=1)).features()]
    targets, totals = [5, 2], [None, None]
    for step, left in zip(steps, (4, 3, 2, 1, 0)):
        whole = VisualLayout.join(views)
        attention = torch.rand(len(whole), generator=generator) ** 4
        of_cls, values = (torch.randn(n, 8, generator=generator) for n in (len(views), len(whole)))
        expected, start = [], 0
        for i, (layout, target) in enumerate(zip(views, targets)):
            n = len(layout)
            own = attention[start : start + n]
            score = flowed(own, of_cls[i], values[start : start + n], 2)
            total = score if totals[i] is None else (totals[i] + score) / 2
            gone = 0 if left % 2 else leaving(own[None], target, left)
            kept = total.topk(n - gone).indices.sort().values
            assert left or len(kept) == target
            views[i], totals[i] = layout[kept], total[kept]
            expected += (start + kept).tolist()
            start += n
        signals = {"cls_attention": attention, "cls_value": of_cls, "values": values}
        assert step.select(signals, whole).keep.tolist() == expected


def test_flowcut_after_the_encoder_sums_up_its_last_blocks():
    layout = LAYOUTS["two"]
    views, heads = layout.groups("view"), 2
    generator = torch.Generator().manual_seed(0)
    signals, expected = {}, torch.zeros(len(layout))
    for block, share in ((-3, 0.25), (-2, 0.25), (-1, 0.5)):
        attention = torch.rand(len(layout), heads, generator=generator)
        of_cls, values = (torch.randn(n, 8, generator=generator) for n in (len(views), len(layout)))
        signals |= {f"cls_attention@{block}": attention, f"cls_value@{block}": of_cls, f"values@{block}": values}
        for own, view in zip(of_cls, views):
            expected[view] += share * flowed(attention[view].mean(dim=1), own, values[view], heads)
    torch.testing.assert_close(FlowCut(keep=0.5).score(signals, layout), expected)
    for blocks, asked in ((9, {-4, -3, -2, -1}), (2, {-2, -1})):
        (step,) = FlowCut(keep=0.5).steps(Shape(blocks=blocks, layers=4, sites=("post_encoder",)))
        assert {int(need.rpartition("@")[2]) for need in step.signals} == asked


# ---- inside the language model


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize(
    "method",
    [
        HoliTom(keep=0.6, inner=0.5, layer=2),
        PruneVid(keep=0.6, text_keep=0.5, layer=2),
        FlowCut(keep=0.6, inner=0.5, layer=2),
    ],
    ids=lambda method: method.name,
)
@torch.inference_mode()
def test_a_second_stage_leaves_its_share_and_decoding_follows(method, family):
    vlm = tiny(family)
    request = Request("what is it?", clip(3), reduce=method)
    row, chosen, logits, _ = run(vlm, request)
    before, after = row.per_layer[1], row.per_layer[2]
    assert row.per_layer == [before] * 2 + [after] * 2 and 0 < after <= before // 2 + 1
    assert len(chosen) == 1
    for count in range(len(TOKENS) + 1):
        torch.testing.assert_close(
            logits[count], replayed(vlm, request, chosen, list(TOKENS[:count])), atol=1e-5, rtol=1e-5
        )
    one = type(method)(keep=0.6)  # without the second stage
    assert row.per_layer[0] == run(vlm, Request("what is it?", clip(3), reduce=one))[0].per_layer[-1]


@torch.inference_mode()
def test_prunevid_takes_the_same_share_of_every_set():
    layout = LAYOUTS["single"]
    method = PruneVid(keep=1.0, text_keep=0.5)
    first, second = method.steps(tiny("qwen2_5_vl").adapter.shape)
    kept = first.select({"features": torch.randn(54, 8)}, layout).keep
    assert kept.tolist() == list(range(54))
    attention = torch.rand(2, 3, 54, generator=torch.Generator().manual_seed(0))
    chosen = second.select({"text_attention": attention}, layout).keep  # one picture is one set
    assert len(chosen) == 27 == second.count(54, 54)
    assert set(chosen.tolist()) == set(attention.amax(dim=(0, 1)).topk(27).indices.tolist())
    layout = LAYOUTS["tiled"]  # its tiles are sets of their own, though they read as one map
    first, second = method.steps(tiny("qwen2_5_vl").adapter.shape)
    first.select({"features": torch.randn(len(layout), 8)}, layout)
    attention = torch.rand(2, 3, len(layout), generator=torch.Generator().manual_seed(1))
    chosen = second.select({"text_attention": attention}, layout).keep
    for view in layout.groups("view"):
        assert int(torch.isin(view, chosen).sum()) == len(view) // 2
    assert attended(attention[..., :4], torch.arange(4), 0.5).tolist() == [
        int(attention[..., :4].amax((0, 1)).argmax())
    ]


@pytest.mark.parametrize("keep", [0.7, 0.4])
@torch.inference_mode()
def test_framefusion_costs_what_was_asked_for(keep):
    vlm = tiny("qwen2_5_vl")
    still = VideoSource(clip(4, 8).data[:1].repeat(8, axis=0), fps=2.0)  # nothing moves: everything may merge at once
    request = Request("what?", still, reduce=FrameFusion(keep=keep))
    row, chosen, logits, _ = run(vlm, request)
    assert sum(row.per_layer) / (len(row.per_layer) * row.visual) == pytest.approx(keep, abs=0.03)
    torch.testing.assert_close(logits[1], replayed(vlm, request, chosen, [TOKENS[0]]), atol=1e-5, rtol=1e-5)
    moving = Request("what?", clip(4, 8), reduce=FrameFusion(keep=keep, similarity=0.999))
    row = run(vlm, moving)[0]  # nothing merges, so attention pays at the next layer
    assert row.per_layer[0] == row.visual > row.per_layer[1] == row.per_layer[-1]
    assert sum(row.per_layer) / (len(row.per_layer) * row.visual) == pytest.approx(keep, abs=0.03)


def test_framefusion_merges_runs_in_time_and_then_prunes_to_the_budget():
    place = torch.tensor([-1, 0, 1, 0, 1, 0, 1, -1])
    a, b, c = torch.eye(4)[0], torch.eye(4)[1], torch.eye(4)[2]
    hidden = torch.stack([c, a, b, a, -b, a, -b, c])
    kept, weights, progress = merge_call(hidden, place, Progress(), 0.3, 10, 0.9, 0.1)
    assert kept.tolist() == [0, 1, 2, 4, 7]  # the first place is one run, the second changed once
    torch.testing.assert_close((weights @ hidden)[1:4], torch.stack([a, b, -b]))
    assert progress == Progress((0.5,), False, False)
    attention = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.9]])
    kept, progress = prune_call(attention, place[kept], progress, 0.3, 10)
    assert kept.tolist() == [0, 3, 4] or len(kept) == 2 + round(3 * (1 - remaining((0.5,), 0.3, 10)))
    assert progress.pruning_done
    exact = merge_call(hidden, place, Progress(), 0.3, 10, 1.0, 0.5)  # from the similarity on, and least is enough
    assert len(exact[0]) == 5 and not exact[2].merging_done
    with pytest.raises(BudgetError, match="1 of 10 layers already cost more"):
        remaining((0.0,), 0.05, 10)


def test_framefusion_merges_no_clip_with_another_and_leaves_one_token_where_the_budget_is_spent():
    layout = make([*frames_of(4, 3, 2, media=0), *frames_of(4, 3, 2, media=1)]).features()
    first, *_ = FrameFusion(keep=0.1).steps(Shape(blocks=1, layers=8))
    kept = first.select({"features": torch.ones(len(layout), 4)}, layout).keep
    assert kept.tolist() == [*range(6), *range(20, 26)]  # the first frame of each
    first, second = FrameFusion(keep=0.3).steps(Shape(blocks=1, layers=2))
    states = torch.randn(len(layout), 64, generator=torch.Generator().manual_seed(0))
    assert len(first.select({"features": states}, layout).keep) == len(layout) == 40
    attention = torch.arange(40) % 7
    kept = second.select({"hidden": states, "last_attention": attention[None].float()}, layout).keep
    assert kept.tolist() == [6]


# ---- while decoding


@pytest.mark.parametrize("strict", ["paper", "code"])
@torch.inference_mode()
def test_dycoke_attends_to_a_share_and_chooses_anew_when_attention_moves(strict):
    vlm = tiny("qwen2_5_vl")
    for similarity, alike in ((2.0, False), (-1.0, True)):  # never alike, always alike
        method = DyCoke(keep=0.8, decode=0.25, layer=1, similarity=similarity, strict=strict)
        row, _, _, notes = run(vlm, Request("what?", clip(5), reduce=method))
        kept = [reduction.keep.tolist() for _, reduction in notes]
        share = method.count_decoding(row.kept)
        assert len(kept) == len(TOKENS) and len(kept[0]) == share < row.kept
        if not alike:
            assert [len(places) for places in kept] == [share] * len(TOKENS)
        elif strict == "paper":
            assert kept == [kept[0]] * len(TOKENS)
        else:
            assert [len(places) for places in kept[1:]] == [row.kept] * (len(TOKENS) - 1)


def test_dycoke_compares_attention_with_that_of_the_step_before():
    layout, shape = make(single(2, 4)).features(), Shape(blocks=1, layers=4)
    *_, step = DyCoke(keep=1.0, decode=0.25, layer=1, similarity=0.9).steps(shape)
    one, other = torch.eye(8)[:2] + torch.tensor([0.01] * 7 + [0.02])
    chosen = [step.select({"last_attention": row[None]}, layout).keep.tolist() for row in (one, other, one, one)]
    assert chosen == [[0, 7], [1, 7], [0, 7], [0, 7]]


@torch.inference_mode()
def test_attending_to_all_while_decoding_changes_nothing():
    vlm = tiny("llava_onevision")
    whole = run(vlm, Request("what?", clip(5), reduce=DyCoke(keep=0.8)))[2]
    every = run(vlm, Request("what?", clip(5), reduce=DyCoke(keep=0.8, decode=0.999999, layer=1)))
    assert len(every[3][0][1].keep) == every[0].kept - 1
    few = run(vlm, Request("what?", clip(5), reduce=DyCoke(keep=0.8, decode=0.1, layer=1)))[2]
    torch.testing.assert_close(whole[0], few[0], atol=1e-5, rtol=1e-5)  # the prompt itself is not touched
    assert not torch.allclose(whole[1], few[1], atol=1e-4)


def test_later_stages_round_as_the_released_codes_do():
    assert [FlowCut(keep=1.0, inner=0.3).count_inside(n) for n in (5, 9, 1)] == [1, 2, 1]
    assert [HoliTom(keep=1.0, inner=0.5).count_inside(n) for n in (5, 7, 1)] == [2, 4, 1]


@pytest.mark.parametrize(
    ("make_method", "says"),
    [
        (lambda: HoliTom(keep=0.5, inner=0.0), "inner is 0.0"),
        (lambda: FlowCut(keep=0.5, inner=1.5), "inner is 1.5"),
        (lambda: PruneVid(keep=0.5, text_keep=0.0), "text_keep is 0.0"),
        (lambda: DyCoke(keep=0.5, decode=2.0), "decode is 2.0"),
        (lambda: FrameFusion(keep=7), "keep is 7"),
        (lambda: FrameFusion(keep=0.3, least=2.0), "least 2.0"),
    ],
)
def test_parameters_of_later_stages_are_refused_out_of_range(make_method, says):
    with pytest.raises(RecipeError, match=says):
        make_method()


def test_frames_are_scored_by_asking_the_model_about_each():
    vlm = tiny("qwen2_5_vl")
    frames = [picture(seed) for seed in range(3)]
    scores = score_frames(vlm, frames, "what is shown?")
    assert len(scores) == 3 == len(set(scores)) and all(0 < score < 1 for score in scores)
    assert score_frames(vlm, frames[::-1], "what is shown?") == pytest.approx(scores[::-1])
    assert score_frames(vlm, frames, "how many are there?") != scores
    Quota(keep=0.5, scores=scores)  # they are what the method takes
