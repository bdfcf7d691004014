"""What token reductions are made of: layouts, merging, clustering, and what each method for clips does."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError
from foveate.reduce.cluster import density_peaks
from foveate.reduce.dycoke import DyCoke
from foveate.reduce.frames import at, clips
from foveate.reduce.grid import blocks, overview, seen_by, stitched, unpadded
from foveate.reduce.holitom import HoliTom, halving, segment
from foveate.reduce.merge import Matching, Part, as_part, bipartite, joined, reduction, rounds
from foveate.reduce.mmtok import keywords
from foveate.reduce.pitome import PiToMe, energy_matching, merge_ratio
from foveate.reduce.prumerge import PruMerge, outlier_ratio, selected
from foveate.reduce.prunevid import PruneVid, cut, refine, static_places
from foveate.reduce.quota import Quota, compressing, frame_weights, likeness_to_words, quotas
from foveate.reduce.select import rest, unit
from foveate.reduce.signals import per_view
from foveate.reduce.sparsevlm import text_raters
from foveate.reduce.ts_llava import TSLLaVA, shrunk, thumbnail
from layouts import LAYOUTS, clip, dense, grid_view, make, signals_for, single, tiled

# ---- layouts


def test_tiles_join_to_one_map_and_padding_is_cut_off():
    grid = stitched(2, 3, 4, 5)
    assert grid.shape == (8, 15)
    assert grid[5, 11] == (1 * 3 + 2) * 20 + 1 * 5 + 1
    assert unpadded(48, 48, (640, 400)) == (slice(9, 39), slice(0, 48))
    assert unpadded(24, 72, (300, 300)) == (slice(0, 24), slice(24, 48))
    assert unpadded(5, 4, (4, 2)) == (slice(1, 4), slice(0, 4))  # a part of a row stays


def test_a_token_of_the_thumbnail_belongs_to_the_tile_under_its_centre():
    layout = make(tiled(2, 2, 3, 0)).features()
    whole, tiles = overview(layout, torch.arange(len(layout)))
    assert [part.tolist() for part in seen_by(layout, whole, tiles)] == [[0], [1, 2], [3, 6], [4, 5, 7, 8]]


def test_views_between_the_ends_of_another_are_of_its_block():
    layout = make([{"view": view} for view in (1, 2, 3, 1, 4, 5, 4, 6)])
    assert blocks(layout).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert blocks(make([{"view": view} for view in (1, 2, 1, 3, 1)])).tolist() == [0] * 5


def test_a_thumbnail_is_told_from_its_tiles_and_sees_each_of_its_parts_once():
    layout = LAYOUTS["tiled"]
    whole, tiles = overview(layout, torch.arange(len(layout)))
    assert len(whole) == 36 and [len(tile) for tile in tiles] == [24] * 6
    parts = torch.cat(seen_by(layout, whole, tiles))
    assert parts.sort().values.tolist() == list(range(36))
    for kind in ("single", "clip"):
        whole, views = overview(LAYOUTS[kind], torch.arange(len(LAYOUTS[kind])))
        assert whole is None and sum(map(len, views)) == len(LAYOUTS[kind])


def test_frames_of_different_sizes_are_matched_place_by_place():
    (table,) = clips(LAYOUTS["clip"])
    layout = LAYOUTS["clip"]
    assert table.shape == (9, 20)
    for frame, row in enumerate(table):
        held = row[row >= 0]
        assert set(layout.frame[held].tolist()) == {frame}
    for place in table.T:
        held = place[place >= 0]
        assert len({(int(layout.row[i]), int(layout.col[i])) for i in held}) == 1
    assert int((table[-1] < 0).sum()) == 8
    features = at(1.0 + torch.arange(len(layout)), table)
    assert torch.equal(features, torch.where(table < 0, 0, table + 1.0))
    assert [tuple(t.shape) for t in clips(LAYOUTS["two"])] == [(1, 16), (1, 16), (1, 16), (1, 15)]


@pytest.mark.parametrize("joined", [False, True])
def test_views_of_one_frame_stand_beside_each_other(joined):
    """Two tiles a frame: in one map of the frame, or each by itself."""
    tokens = []
    for view in range(6):
        for token in grid_view(2, 2, view=view, frame=view // 2):
            place = {"global_row": token["row"], "global_col": 2 * (view % 2) + token["col"]} if joined else {}
            tokens.append({**token, **place})
    (table,) = clips(make(tokens))
    assert table.shape == (3, 8) and table.sort(dim=1).values.flatten().tolist() == list(range(24))
    assert torch.equal(table, table[0] + 8 * torch.arange(3)[:, None])  # the same place of the same tile


def test_rows_of_cls_belong_to_the_views_that_have_tokens():
    layout = make([*single(2, 2, media=0), *single(2, 2, media=1, view=1), *single(1, 2, media=2)]).features()
    rows = torch.arange(4)[:, None]  # the first view of the second picture is all padding
    assert per_view(rows, layout).flatten().tolist() == [0, 2, 3]


# ---- merging and clustering


def test_where_all_densities_tie_the_earliest_point_is_the_centre_or_what_noise_says():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    assert density_peaks(x, 1, 1)[0].tolist() == [0]
    assert density_peaks(x, 1, 1, torch.tensor([0.0, 1e-6, 0.0]))[0].tolist() == [1]


def test_matching_merges_the_most_alike_and_protects_cls():
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0.1, 1], [1, 1], [-1, 0.3]]])
    matching = bipartite(metric, 2)
    assert matching.slot[0, 0] == matching.slot[0, 1]
    assert matching.slot[0, 2] == matching.slot[0, 3]
    protected = bipartite(metric, 3, class_token=True)
    assert (protected.slot[0] == protected.slot[0, 0]).sum() == 1
    assert bipartite(metric, 99).place.shape == (1, 3)  # half at most


def test_rounds_compare_merged_tokens_by_the_mean_of_all_that_they_stand_for():
    metric, seen = torch.tensor([[0.0], [1.0], [5.0], [9.0]]), []

    def match(x, r):
        seen.append(x[0, :, 0].tolist())
        return joined(torch.tensor([[1, 2, 3][: x.shape[1] - 1]]), torch.tensor([[0]]), torch.tensor([[1]]), x.shape[1])

    matching = rounds(metric[None], torch.tensor([[3.0, 1.0, 1.0, 1.0]]), 2, match)
    assert seen == [[0, 1, 5, 9], [0.25, 5, 9]]  # three at 0 and one at 1
    assert matching.place.tolist() == [[2, 3]] and matching.slot.tolist() == [[0, 0, 0, 1]]
    part = as_part(10 + torch.arange(4), Matching(matching.slot, matching.place), torch.tensor([3.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(part.weights.to_dense(), torch.tensor([[0.6, 0.2, 0.2, 0], [0, 0, 0, 1.0]]))


def test_merged_tokens_stand_in_sequence_order():
    matching = Matching(torch.tensor([[2, 0, 1, 0]]), torch.tensor([[3, 2, 0]]))
    part = as_part(torch.arange(4), matching, torch.ones(4))
    assert part.keep.tolist() == [0, 2, 3]
    assert (part.weights.to_dense() > 0).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]]


def test_parts_of_one_block_fall_in_with_each_other_and_their_late_tokens_follow_part_by_part():
    one = Part(
        torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 1]), torch.tensor([[0.5, 0, 0.5, 0], *torch.eye(4)[[3, 1]]]), 2
    )
    two = Part(torch.tensor([1, 2, 5]), torch.tensor([1, 2, 0]), None, late=2)
    other = Part(torch.tensor([7, 8]), torch.tensor([1, 0]), None, late=None)
    found = reduction([other, one, two], torch.tensor([0] * 7 + [1] * 2))
    order = [0, 2, 6, 3, 5, 1, 8, 7]
    assert found.keep.tolist() == order
    expected = torch.eye(9)[order]
    expected[0] = torch.tensor([0.5, 0, 0, 0, 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(found.weights.to_dense(), expected)


def test_a_token_of_high_energy_merges_and_one_that_stands_alone_is_protected():
    crowd = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 6, 8)
    crowd = crowd + 0.01 * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    metric = torch.cat([crowd, -crowd[:, :1], torch.eye(8)[None, :1] * 3], dim=1)
    matching = energy_matching(metric, 3, 0.5)
    alone = matching.slot[0, 6:]
    assert all(int((matching.slot[0] == slot).sum()) == 1 for slot in alone)
    with pytest.raises(BudgetError, match="at most 4"):
        energy_matching(metric, 5, 0.5)
    with pytest.raises(BudgetError, match="3 of 5 tokens"):
        energy_matching(metric[:, :5], 3, 0.5)


def test_the_margin_of_pitome_falls_with_depth():
    metric = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(0))
    slots = {margin: energy_matching(metric, 6, margin).slot.tolist() for margin in (0.9, 0.675, 0.45)}
    assert len({str(slot) for slot in slots.values()}) == 3
    for depth, margin in ((0.0, 0.9), (0.25, 0.675), (0.5, 0.45)):
        assert PiToMe(keep=0.5).match(metric, 6, depth).slot.tolist() == slots[margin]
    assert merge_ratio(metric[:, :11], 0.52, 0.5, class_token=True).place.shape == (1, 11 - 4)  # of ten without CLS


def test_density_peaks_find_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([centre + 0.05 * torch.randn(8, 2, generator=generator) for centre in (0.0, 3.0, 9.0)])
    centres, member = density_peaks(points, 3, 5)
    assert sorted((centres // 8).tolist()) == [0, 1, 2]
    assert [len(set(member[i : i + 8].tolist())) for i in (0, 8, 16)] == [1, 1, 1]
    assert member[centres].tolist() == [0, 1, 2]
    centres, member = density_peaks(torch.zeros(4, 2), 4, 7)  # equal points too, each its own
    assert centres.tolist() == member.tolist() == [0, 1, 2, 3]
    twice = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    centres, member = density_peaks(twice, 2, 2)  # of equally dense points the earlier is the denser
    assert centres.tolist() == [0, 2] and member.tolist() == [0, 0, 1, 1]
    assert len(density_peaks(twice, 9, 2)[0]) == 4


def test_prumerge_selects_as_many_again_and_outliers_only_when_adaptive():
    attention = torch.full((60,), 0.01)
    attention[[3, 40]] = 1.0
    attention += 1e-4 * torch.arange(60)
    layout = make(single(6, 10)).features()
    heads = attention[:, None].expand(-1, 4)
    signals = {"received_attention@-1": heads, "keys@-1": torch.randn(60, 16)}
    kept = PruMerge(keep=20, adaptive=True).select(signals, layout).keep.tolist()
    assert kept[:2] == [40, 3] and len(kept) == 3  # and one for all the others
    assert len(selected(attention, 0.1, plus=True)) == 12
    assert selected(attention, 1 / 3, plus=True, adaptive=True).shape[0] == 60  # the smallest step is one place
    assert outlier_ratio(torch.ones(8)) == 0  # even attention has none
    assert PruMerge(keep=20).exact and not PruMerge(keep=20, adaptive=True).exact


# ---- clips


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_windows_save_as_much_as_any_cut_can(frames, places, longest, seed):
    static = torch.rand(frames - 1, places, generator=torch.Generator().manual_seed(seed)) > 0.4

    def saved(windows):
        return sum(int(static[a:b].all(dim=0).sum()) * (b - a) for a, b in windows if b > a)

    best = 0
    for cuts in itertools.product([0, 1], repeat=frames - 1):
        ends = [i for i, cut in enumerate(cuts) if cut] + [frames - 1]
        starts = [0, *[end + 1 for end in ends[:-1]]]
        if all(b - a < longest for a, b in zip(starts, ends)):
            best = max(best, saved(zip(starts, ends)))
    windows, found = segment(static, longest)
    assert found == saved(windows) == best
    assert [frame for a, b in windows for frame in range(a, b + 1)] == list(range(frames))


def test_holitom_keeps_what_stands_still_once():
    """A clip that does not move is worth one frame, so at half the tokens nothing of it is lost."""
    layout = make(clip(4, 4, 4)[:48]).features()  # three frames of 4 x 4
    still = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    signals = {"features": still, "received_attention": torch.rand(48)}
    reduction = HoliTom(keep=0.5).select(signals, layout)
    assert len(reduction.keep) == 16
    torch.testing.assert_close(reduction.apply(still), still[:16])


def test_static_tokens_of_a_clip_stand_before_the_others_and_a_picture_keeps_its_raster():
    layout = make([token for frame in range(2) for token in grid_view(1, 4, view=frame, frame=frame)])
    x = torch.eye(8)
    x[5], x[7] = x[1], x[3]  # places 1 and 3 stand still
    signals = {"features": x, "received_attention": torch.arange(8.0)}
    for method in (HoliTom(keep=0.75), PruneVid(keep=0.75, segments=0.5, threshold=0.5)):
        assert method.select(signals, layout).keep.tolist() == [1, 3, 0, 2, 4, 6], method.name
        signals_ = signals_for(HoliTom.signals, LAYOUTS["tiled"])
        kept = method.select(signals_, LAYOUTS["tiled"]).keep
        assert kept.tolist() == sorted(kept.tolist()), method.name


def test_holitom_clusters_a_share_of_what_was_not_chosen():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    part = HoliTom(keep=0.5, contextual=0.5).dynamic(x, torch.arange(8.0).flip(0), torch.arange(8), 0.5)
    assert part.keep[:2].tolist() == [0, 1] and len(part.keep) == 4
    torch.testing.assert_close(part.weights.sum(dim=1), torch.ones(4))
    assert torch.equal(part.weights[2:, :2], torch.zeros(2, 2))
    assert bool((part.weights[torch.arange(4), part.keep] > 0.5).all())


def test_halving_averages_each_dropped_token_in_turn():
    hidden = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    score = torch.rand(9, generator=torch.Generator().manual_seed(1))
    kept, weights = halving(hidden, score, 3)
    out = hidden[kept].clone()
    for place in rest(9, kept).tolist():
        into = int((unit(hidden[place]) @ unit(hidden[kept]).T).argmax())
        out[into] = (out[into] + hidden[place]) / 2
    torch.testing.assert_close(weights @ hidden, out)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))


def test_dycoke_keeps_the_first_frame_of_four_and_what_changed_after_it():
    layout = make([token for token in clip(9, 4, 4) if token["frame"] < 8]).features()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).repeat(8, 1).view(8, 16, 8)
    changed = {frame: frame for frame in range(8)}
    for frame, place in changed.items():
        x[frame, place] = -3 * x[frame, place]
    kept = DyCoke(keep=(16 + 3 * 2) / 64).select({"features": x.view(-1, 8)}, layout).keep
    shares = torch.bincount(kept // 16, minlength=8).tolist()
    assert shares == [16, 2, 2, 2] * 2
    for frame in (1, 2, 3, 5, 6, 7):
        assert frame * 16 + frame in kept.tolist()
    code = DyCoke(keep=(16 + 3 * 2) / 64, strict="code").select({"features": x.view(-1, 8)}, layout).keep
    assert torch.bincount(code // 16, minlength=8).tolist() == [16, 2, 2, 2, 16, 2, 16, 2]  # its last third frame


def test_dycoke_cuts_whole_frames_down_to_what_is_least_like_their_mean():
    layout, x = make(grid_view(1, 4, frame=0)), torch.eye(4)[[0, 0, 1, 0]]
    assert DyCoke(keep=1).select({"features": x}, layout).keep.tolist() == [2]


def test_quota_gives_frames_by_their_scores_and_drops_those_without():
    layout = make([token for token in clip(9, 4, 4) if token["frame"] < 4]).features()
    signals = signals_for(Quota.signals, layout)
    kept = Quota(keep=0.5, scores=(0.0, 0.2, 0.9, 0.2)).select(signals, layout).keep
    shares = torch.bincount(kept // 16, minlength=4).tolist()
    assert shares[0] == 0 < shares[1] == shares[3] < shares[2] == 16
    with pytest.raises(InputError, match="2 scores for 4 frames"):
        Quota(keep=0.5, scores=(0.1, 0.2)).select(signals, layout)
    pair = make([token for media in (0, 1) for token in clip(3, 4, 4, media=media) if token["frame"] < 2]).features()
    kept = Quota(keep=0.5, scores=(1.0, 0.0, 0.0, 1.0)).select(signals_for(Quota.signals, pair), pair).keep
    assert set((kept // 16).tolist()) == {0, 3}
    assert frame_weights(torch.zeros(4)).tolist() == [0.25] * 4
    assert quotas(torch.tensor([0.9, 0.1, 0.1]), 100, 40, "v1")[0] > 40
    assert quotas(torch.tensor([0.9, 0.1, 0.1]), 100, 40, "v3")[0] == 40  # a frame has no more


def test_quota_never_makes_a_map_longer_or_wider():
    x = torch.randn(16, 8)
    assert [compressing(x, (2, 8), 9, "v1", enlarge=enlarge)[1] for enlarge in (False, True)] == [(2, 3), (3, 3)]
    layout = make(grid_view(2, 8, frame=0))
    signals = {"features": x, "text_embeddings": torch.randn(3, 8)}
    assert len(Quota(keep=9).select(signals, layout).keep) == 6
    assert likeness_to_words(torch.eye(3)[[0, 1]], torch.eye(3)[:1]).tolist() == pytest.approx([1.0, 0.1])


def test_quota_asks_less_of_frames_that_do_not_look_like_the_question():
    layout = make([token for token in clip(9, 4, 4) if token["frame"] < 3]).features()
    words = torch.eye(8)[:1]
    features = torch.cat([torch.eye(8)[i].expand(16, 8) for i in (3, 0, 3)])
    kept = Quota(keep=0.5).select({"features": features, "text_embeddings": words}, layout).keep
    assert torch.bincount(kept // 16, minlength=3).argmax() == 1


def test_prunevid_keeps_only_long_runs_of_a_cluster():
    assert refine(torch.tensor([0, 0, 1, 0, 2, 2, 2])).tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert refine(torch.tensor([5, 4])).tolist() == [0, 0]


def test_prunevid_cuts_a_clip_by_the_means_of_the_tokens_that_a_frame_has():
    layout = make([token for f in range(8) for token in grid_view(1, 4 if f < 6 else 2, view=f, frame=f)])
    (table,) = clips(layout)
    method = PruneVid(keep=0.5, threshold=0.3)
    still, *moving = method.sets(at(torch.ones(len(layout), 4), table), table)
    assert torch.equal(still, table[:, :2])  # one segment, though its last frames are smaller
    assert [source.tolist() for source in moving] == [[row[2:]] for row in table[:6].tolist()]
    frames = torch.tensor([[0.0], [0.0], [0.0], [9.0], [9.0]])
    assert cut(frames, 0.3) == [(0, 5)] and cut(frames, 0.4) == [(0, 3), (3, 5)]
    assert not static_places(torch.randn(1, 99, 7, generator=torch.Generator().manual_seed(0)), 0.5).any()


def test_prunevid_averages_what_stands_still():
    layout = make([token for token in clip(9, 4, 4) if token["frame"] < 8]).features()
    still = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    reduction = PruneVid(keep=0.5).select({"features": still}, layout)
    out = reduction.apply(still)
    assert len(out) <= 64
    assert all(float((row - still[:16]).norm(dim=1).min()) < 1e-5 for row in out)  # nothing is blurred


def test_ts_llava_keeps_a_thumbnail_and_equal_steps():
    layout = make([token for token in clip(9, 4, 4) if token["frame"] < 8]).features()
    reduction = TSLLaVA(keep=0.5, frames=4).select({}, layout)
    weights = dense(reduction, len(layout))
    means = weights[(weights > 0).sum(dim=1) > 1]
    assert len(reduction.keep) == 64 and 0 < len(means) <= 64 / 6
    assert all(len(set((row.nonzero().flatten() // 16).tolist())) == 1 for row in means)  # a cell of one frame each
    for keep in (5, 24):  # a picture has no thumbnail
        found = TSLLaVA(keep=keep).select({}, LAYOUTS["single"])
        assert found.weights is None and torch.equal(found.keep, torch.linspace(0, 53, keep).round().long())


def test_a_map_shrinks_to_cells_of_its_own():
    place = torch.arange(24)
    weights = shrunk(place // 6, place % 6, 6)  # 4 x 6 to 2 x 3
    cells = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    assert [row.nonzero().flatten().tolist() for row in weights] == cells
    assert set(weights[weights > 0].tolist()) == {0.25}


def test_a_thumbnail_leaves_its_lower_right_edge_empty_and_grows_smoothly():
    frames = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(frames, (4, 4), mode="bilinear")
    whole = torch.zeros(3, 9, 9)
    for number, frame in enumerate(large):
        row, col = 4 * (number // 2), 4 * (number % 2)
        whole[:, row : row + 4, col : col + 4] = frame
    torch.testing.assert_close(thumbnail(frames, 9), whole)


def test_the_question_is_stripped_to_what_it_is_about():
    assert keywords("<image>\nWhat is the man holding in his left hand?") == "man holding in his left hand"
    assert keywords("If so, who am I and then whom?") == "am whom"  # the authors' list, no more and no less
    assert keywords("Who is it?\nAnswer the question using a single word or phrase.") == "Who is it?\n"
    assert keywords("") == ""
    assert keywords("Why?") == "Why?"


def test_words_that_are_equally_like_the_picture_rate_all():
    """None of them is above the mean, and a score without raters would be no number."""
    visual, word = torch.randn(6, 4), torch.randn(1, 4)
    assert text_raters(visual, word).tolist() == [0]
    assert text_raters(visual, word.repeat(3, 1)).tolist() == [0, 1, 2]
