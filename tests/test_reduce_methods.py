"""What each token reduction outside the language model promises on layouts of every kind, without any model."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.adapters.shape import INSIDE, SITES, Shape
from foveate.errors import BudgetError, RecipeError, UnsupportedError
from foveate.reduce.allocate import largest_remainder, truncated
from foveate.reduce.base import top_k
from foveate.reduce.divprune import DivPrune
from foveate.reduce.dycoke import DyCoke
from foveate.reduce.fastervlm import FasterVLM
from foveate.reduce.flowcut import FlowCut
from foveate.reduce.globalcom2 import GlobalCom2
from foveate.reduce.grid import blocks, overview, seen_by
from foveate.reduce.hired import HiRED
from foveate.reduce.holitom import HoliTom
from foveate.reduce.mmtok import MMTok, covering
from foveate.reduce.pitome import PiToMe
from foveate.reduce.prumerge import PruMerge
from foveate.reduce.prunevid import PruneVid
from foveate.reduce.quota import Quota
from foveate.reduce.select import above_threshold, cosines, coverage, max_min, strongest
from foveate.reduce.text_dominance import TextDominance
from foveate.reduce.tome import ToMe
from foveate.reduce.ts_llava import TSLLaVA
from foveate.reduce.visionzip import VisionZip, gather
from foveate.reduce.yopo import neighbours
from foveate.registry import METHODS
from layouts import HEADS, LAYOUTS, dense, make, only, signals_for, single

VARIANTS = {
    "divprune": DivPrune,
    "dycoke": DyCoke,
    "dycoke-code": lambda keep: DyCoke(keep=keep, strict="code"),
    "fastervlm": FasterVLM,
    "flowcut": FlowCut,
    "globalcom2": GlobalCom2,
    "globalcom2-code": lambda keep: GlobalCom2(keep=keep, strict="code"),
    "hired": HiRED,
    "hired-code": lambda keep: HiRED(keep=keep, strict="code"),
    "holitom": HoliTom,
    "holitom-contextual": lambda keep: HoliTom(keep=keep, contextual=0.5),
    "mmtok": MMTok,
    "pitome": PiToMe,
    "prumerge": PruMerge,
    "prumerge-paper": lambda keep: PruMerge(keep=keep, strict="paper"),
    "prumerge-plus": lambda keep: PruMerge(keep=keep, plus=True),
    "prumerge-adaptive": lambda keep: PruMerge(keep=keep, adaptive=True),
    "prunevid": PruneVid,
    "quota": Quota,
    "quota-v2": lambda keep: Quota(keep=keep, version="v2"),
    "quota-v4": lambda keep: Quota(keep=keep, version="v4"),
    "quota-v5": lambda keep: Quota(keep=keep, version="v5"),
    "text_dominance": TextDominance,
    "tome": ToMe,
    "ts_llava": TSLLaVA,
    "visionzip": VisionZip,
    "visionzip-paper": lambda keep: VisionZip(keep=keep, strict="paper"),
}
AVERAGES = ("holitom", "pitome", "prumerge-paper", "prunevid", "quota", "tome", "ts_llava", "visionzip-paper")
"""Variants whose tokens are means of those that they stand for."""


def signals_of(method):
    """What the method is told outside the language model."""
    shape = Shape(blocks=6, layers=8, cls=True, sites=tuple(site for site in SITES if site != "encoder"))
    return tuple(dict.fromkeys(n for s in method.steps(shape) if s.site not in INSIDE for n in s.signals))


def chosen(method, layout, cls=True, seed=0):
    signals = signals_for(signals_of(method), layout, seed, cls)
    return method.select(signals, layout)


def budget(method, layout):
    return sum(method.count(len(group)) for group in layout.groups(method.scope))


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no-cls"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_tokens_stay_as_are_asked_for(variant, kind, cls):
    layout = LAYOUTS[kind]
    for keep in (0.75, 0.4, 0.1, 7, 1):
        method = VARIANTS[variant](keep=keep)
        reduction = chosen(method, layout, cls)
        kept, wanted = len(reduction.keep), budget(method, layout)
        assert len(set(reduction.keep.tolist())) == kept, keep
        assert int(reduction.keep.min()) >= 0 and int(reduction.keep.max()) < len(layout)
        if method.exact:
            assert kept == wanted, keep
        elif variant != "dycoke-code":  # which leaves whole frames, whatever the budget
            assert 0 < kept <= wanted + len(layout.groups("view")), keep  # holitom rounds each frame up
        features = torch.randn(len(layout), 3)
        out = reduction.apply(features)
        assert out.shape == (kept, 3) and bool(out.isfinite().all())
        block = blocks(layout)[reduction.keep]
        assert torch.equal(block, block.sort().values), "tokens must not cross into another view's place"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_keeping_all_changes_nothing(variant, kind):
    layout = LAYOUTS[kind]
    if variant == "dycoke-code" and kind == "clip":
        pytest.skip("the released code loses an odd last frame")
    for keep in (1.0, len(layout)):
        reduction = chosen(VARIANTS[variant](keep=keep), layout)
        assert reduction.weights is None
        assert reduction.keep.tolist() == list(range(len(layout)))


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"divprune"}))
def test_pictures_of_a_request_do_not_meet(variant):
    """Beside another picture or clip, a picture keeps what it keeps alone."""
    for kind in ("two", "mixed"):
        layout = LAYOUTS[kind]
        method = VARIANTS[variant](keep=0.4)
        signals = signals_for(signals_of(method), layout)
        whole = dense(method.select(signals, layout), len(layout))
        if variant.startswith("quota"):
            continue  # its frames are compared over the whole request, as a question is about all of it
        start = 0
        for media in (0, 1):
            inside = layout.media == media
            views = int(layout.view[inside].max()) + 1
            first = sum(int(layout.view[layout.media == m].max()) + 1 for m in range(media))
            own = {
                name: value
                if name == "text_embeddings"
                else value[first : first + views]
                if name.partition("@")[0] in ("cls_query", "cls_key", "cls_value")
                else value[inside]
                for name, value in signals.items()
            }
            alone = dense(method.select(own, only(layout, media)), int(inside.sum()))
            torch.testing.assert_close(whole[start : start + len(alone)][:, inside], alone)
            assert not bool(whole[start : start + len(alone)][:, ~inside].any())
            start += len(alone)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("variant", AVERAGES)
def test_merged_tokens_are_means(variant, kind):
    layout = LAYOUTS[kind]
    for keep in (0.6, 0.2):
        weights = dense(chosen(VARIANTS[variant](keep=keep), layout), len(layout))
        assert float(weights.min()) >= 0
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))


@pytest.mark.parametrize("variant", ["tome", "pitome"])
def test_every_token_lives_on_in_exactly_one(variant):
    layout = LAYOUTS["tiled"]
    sizes = torch.randint(1, 4, (len(layout),), generator=torch.Generator().manual_seed(1)).float()
    layout = dataclasses.replace(layout, size=sizes)
    reduction = chosen(VARIANTS[variant](keep=0.3), layout)
    weights = dense(reduction, len(layout))
    assert torch.equal((weights > 0).sum(dim=0), torch.ones(len(layout), dtype=torch.int64))
    own = weights[torch.arange(len(weights)), reduction.keep]
    assert float(own.min()) > 0, "a token stands at the place of one that went into it"
    for row in weights:  # weighted by what each token already stands for
        members = row > 0
        torch.testing.assert_close(row[members], sizes[members] / sizes[members].sum())


def test_visionzip_compares_mean_keys_and_gathers_no_more_than_there_is():
    layout = make(single(6, 9))
    signals = signals_for(signals_of(VisionZip(keep=0.5)), layout)
    mean = signals["keys@-1"].unflatten(-1, (HEADS, -1)).mean(dim=1)
    found = VisionZip(keep=20, contextual=0.5).select(signals, layout)
    dominant = top_k(signals["cls_attention@-1"].mean(dim=1), 10)
    targets, weights = gather(mean, dominant, 10)
    assert found.keep.tolist() == [*dominant.tolist(), *targets.tolist()]
    torch.testing.assert_close(dense(found, 54)[10:], weights)
    with pytest.raises(BudgetError, match="45 contextual tokens"):
        gather(mean, dominant, 45)


def test_yopo_lets_no_view_see_another():
    for kind in ("tiled", "two", "clip"):
        layout = LAYOUTS[kind]
        owner = 100 * layout.media + layout.view
        seen = neighbours(layout, 5)
        assert not seen[owner[:, None] != owner].any() and seen.diagonal().all()


def test_visionzip_gathers_every_other_token_once():
    layout = LAYOUTS["single"]
    reduction = chosen(VisionZip(keep=0.5, contextual=0.25), layout)
    weights = dense(reduction, len(layout))
    count = len(reduction.keep)
    late = int(count * 0.25)
    assert torch.equal((weights > 0).sum(dim=0), torch.ones(len(layout), dtype=torch.int64))
    assert reduction.keep[: count - late].tolist() == sorted(reduction.keep[: count - late].tolist())
    gathering = weights[count - late :]
    torch.testing.assert_close(gathering.sum(dim=1), 1 + (((gathering > 0).sum(dim=1) > 1).float()))


# ---- selectors


@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_coverage_reaches_its_bound(n, count, seed):
    count = min(count, n)
    gains = torch.rand(6, n, generator=torch.Generator().manual_seed(seed)) ** 3
    order = coverage(gains, count, chunk=2)

    def covered(columns):
        return float(gains[:, list(columns)].amax(dim=1).sum())

    best = max(covered(columns) for columns in itertools.combinations(range(n), count))
    assert len(set(order.tolist())) == count
    assert covered(order.tolist()) >= (1 - 1 / 2.718281828) * best - 1e-6
    # lazy or not, the greedy choice is the same
    taken: list[int] = []
    for pick in order.tolist():
        gain = torch.tensor([covered([*taken, j]) if j not in taken else -1.0 for j in range(n)])
        assert gain[pick] >= gain.max() - 1e-6
        taken.append(pick)


def test_mmtok_covers_the_text_and_the_view_at_least_to_its_bound():
    generator = torch.Generator().manual_seed(3)
    text, tokens, patches = (torch.randn(n, 8, generator=generator) for n in (4, 9, 9))
    rows = covering(text, tokens, patches, 0.5, 0.1, 0.2)
    torch.testing.assert_close(rows.sum(dim=1), torch.tensor([1 / 4] * 4 + [0.5 / 9] * 9))
    best = max(float(rows[:, list(c)].amax(dim=1).sum()) for c in itertools.combinations(range(9), 3))
    assert float(rows[:, coverage(rows, 3)].amax(dim=1).sum()) >= (1 - 1 / 2.718281828) * best


def test_mmtok_covers_the_view_as_the_encoder_sees_it():
    hidden = torch.eye(4)[[0, 0, 0, 1]]
    signals = {"features": torch.ones(4, 4), "hidden@-1": hidden, "text_embeddings": torch.ones(2, 4)}
    assert MMTok(keep=2).select(signals, make(single(2, 2))).keep.tolist() == [0, 3]


def test_coverage_takes_the_earliest_of_equal_columns_however_few_are_looked_at():
    assert coverage(torch.ones(2, 100), 2, chunk=3).tolist() == [0, 1]


def test_likeness_to_a_token_without_length_is_0():
    assert cosines(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 0], [0, 1]]


def test_coverage_never_picks_what_is_excluded():
    gains = torch.eye(6) * torch.arange(1.0, 7.0)
    shut = torch.tensor([False, True, False, False, False, True])
    assert coverage(gains, 6, shut).tolist() == [4, 3, 2, 0]


@given(st.integers(3, 9), st.integers(2, 4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_max_min_is_within_half_of_the_best(n, count, seed):
    count = min(count, n)
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))
    distance = torch.cdist(points, points)

    def closest(places):
        return min(float(distance[a, b]) for a, b in itertools.combinations(places, 2))

    order = max_min(distance, count).tolist()
    assert len(set(order)) == count
    best = max(closest(places) for places in itertools.combinations(range(n), count))
    assert closest(order) >= best / 2 - 1e-6


def test_max_min_picks_no_token_twice_where_all_are_equal():
    assert sorted(max_min(torch.zeros(5, 5), 5).tolist()) == [0, 1, 2, 3, 4]
    assert chosen(DivPrune(keep=3), LAYOUTS["single"]).keep.shape == (3,)


def test_divprune_follows_its_tokens_when_they_change_places():
    layout = LAYOUTS["single"]
    features = torch.randn(len(layout), 8, generator=torch.Generator().manual_seed(5))
    order = torch.randperm(len(layout), generator=torch.Generator().manual_seed(6))
    method = DivPrune(keep=0.3)
    here = method.select({"features": features}, layout).keep
    there = method.select({"features": 7 * features[order]}, layout).keep  # lengths do not matter either
    assert set(order[there].tolist()) == set(here.tolist())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 12))
def test_the_threshold_lets_at_most_k_pass_and_ties_fall_together(values, k):
    score = torch.tensor(values, dtype=torch.float32)
    kept = above_threshold(score, k).tolist()
    assert len(kept) <= max(k, 0) or k >= len(values)
    out = set(range(len(values))) - set(kept)
    assert all(values[i] > values[j] for i in kept for j in out)
    if len(set(values)) == len(values):
        assert kept == top_k(score, k).tolist()


def test_text_dominance_keeps_fewer_where_attention_ties():
    assert [TextDominance(keep=0.5).count(n) for n in (5, 4, 1)] == [2, 2, 1]
    layout = LAYOUTS["single"]
    score = torch.linspace(0, 1, len(layout))
    score[-20:-5] = 1.5  # these tie at the threshold
    score[-5:] = 3.0
    method = TextDominance(keep=10)
    assert method.select({"cls_attention": score}, layout).keep.tolist() == list(range(49, 54))
    assert len(method.select({"cls_attention": torch.ones(len(layout))}, layout).keep) == 1


# ---- budgets


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 50))
def test_the_largest_remainders_meet_the_budget_within_the_caps(groups, total):
    shares, caps = torch.tensor([share for share, _ in groups]), [cap for _, cap in groups]
    given_ = largest_remainder(shares, total, caps)
    assert sum(given_) == min(total, sum(caps))
    assert all(0 <= count <= cap for count, cap in zip(given_, caps))


def test_shares_are_as_even_as_whole_numbers_allow():
    assert largest_remainder(torch.tensor([1.0, 1.0, 1.0]), 4, [9, 9, 9]) == [2, 1, 1]
    assert largest_remainder(torch.tensor([3.0, 1.0]), 8, [4, 9]) == [4, 4]  # a cap sends its rest on
    assert largest_remainder(torch.zeros(2), 3, [2, 2]) == [2, 1]
    assert truncated(torch.tensor([1.0, 1.0, 1.0]), 4, [9, 9, 9]) == [1, 1, 1]
    assert truncated(torch.zeros(2), 5, [9, 1]) == [2, 1]


def tiles_with(hot: int):
    """A tiled layout and first-layer attention that lights up the thumbnail where tile `hot` lies."""
    layout = LAYOUTS["tiled"]
    whole, tiles = overview(layout, torch.arange(len(layout)))
    first = torch.full((len(layout),), 1e-3)
    first[whole[seen_by(layout, whole, tiles)[hot]]] = 1.0
    return layout, whole, tiles, first


@pytest.mark.parametrize("hot", range(6))
def test_a_tile_that_the_whole_picture_points_at_keeps_most(hot):
    layout, _, tiles, first = tiles_with(hot)
    noise = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    kept = HiRED(keep=0.3).select({"cls_attention@0": first[:, None], "cls_attention@-1": noise[:, None]}, layout).keep
    counts = [int(torch.isin(kept, tile).sum()) for tile in tiles]
    assert max(counts) == counts[hot] > sum(counts) / 2
    method = GlobalCom2(keep=0.3, temperature=1.0)
    kept = method.select({"cls_logits@-1": (5 * first + noise)[:, None]}, layout).keep
    counts = [int(torch.isin(kept, tile).sum()) for tile in tiles]
    assert max(counts) == counts[hot]


def test_what_the_tiles_cannot_hold_goes_to_the_whole_picture():
    layout, whole, *_ = tiles_with(0)
    method = HiRED(keep=0.95, alpha=0.05)
    kept = chosen(method, layout).keep
    assert len(kept) == method.count(len(layout)) and int(torch.isin(whole, kept).sum()) > 0.05 * len(kept)


def test_hired_of_the_released_code_counts_runs_of_the_raster_instead_of_tiles():
    layout, _, tiles, first = tiles_with(2)  # upper right tile: its votes lie in the upper half of the raster
    noise = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    signals = {"cls_attention@0": first[:, None], "cls_attention@-1": noise[:, None]}
    kept = HiRED(keep=0.3, strict="code").select(signals, layout).keep
    counts = [int(torch.isin(kept, tile).sum()) for tile in tiles]
    assert counts[0] == counts[1] == counts[2] > 0  # three runs of the upper half, though one tile alone lit up


def test_globalcom2_hands_the_thumbnail_over_in_score_order_as_the_code_does():
    layout = LAYOUTS["tiled"]
    signals = signals_for(GlobalCom2.signals, layout)
    whole, _ = overview(layout, torch.arange(len(layout)))
    score = signals["cls_logits@-1"].mean(dim=1)[whole]
    kept = GlobalCom2(keep=0.4, strict="code").select(signals, layout).keep
    own = [place for place in kept.tolist() if place < len(whole)]
    assert own == strongest(score, len(own)).tolist() != sorted(own)
    assert GlobalCom2(keep=0.4).select(signals, layout).keep.tolist()[: len(own)] == sorted(own)


KEEPING = {"dycoke", "fastv", "framefusion", "prunevid", "random", "schedule", "uniform", "yopo"}
DROPPING = {"flowcut", "hired", "mmtok", "pitome", "prumerge", "tome", "ts_llava", "visiondrop", "visionzip"}
ROWS = {"holitom", "prunevid", "quota"}


def test_positions_and_separators_are_those_of_the_papers():
    known = {name: METHODS.get(name) for name in METHODS.names()}
    ours = {name: method for name, method in known.items() if method.__module__.startswith("foveate.")}
    methods = {name: method for name, method in ours.items() if method.socket == "reduce"}
    assert {name for name, method in methods.items() if method.position == "keep"} == KEEPING
    assert {name for name, method in methods.items() if method.newline == "drop"} == DROPPING
    assert {name for name, method in methods.items() if method.newline == "row"} == ROWS


# ---- mistakes


@pytest.mark.parametrize(
    ("make_method", "says"),
    [
        (lambda: HiRED(keep=0.5, alpha=1.0), "alpha is 1.0"),
        (lambda: HiRED(keep=0.5, strict="codes"), "strict"),
        (lambda: VisionZip(keep=0.5, contextual=1.0), "contextual is 1.0"),
        (lambda: MMTok(keep=0.5, text_temperature=0.0), "above 0"),
        (lambda: GlobalCom2(keep=0.5, temperature=-1.0), "temperature is -1.0"),
        (lambda: PiToMe(keep=0.5, margin=0.9), "margin is 0.9"),
        (lambda: HoliTom(keep=0.5, beta=1.5), "beta is 1.5"),
        (lambda: HoliTom(keep=0.5, window=0), "window is 0"),
        (lambda: PruneVid(keep=0.5, segments=0.0), "segments is 0.0"),
        (lambda: Quota(keep=0.5, scores=(0.5, 1.5)), "probabilities"),
        (lambda: TSLLaVA(keep=0.5, frames=0), "frames is 0"),
        (lambda: DivPrune(keep=0.0), "keep is 0.0"),
    ],
)
def test_parameters_out_of_range_are_refused(make_method, says):
    with pytest.raises(RecipeError, match=says):
        make_method()


def test_a_signal_that_was_not_delivered_is_named():
    with pytest.raises(UnsupportedError, match="cls_attention@0 or received_attention@0"):
        HiRED(keep=0.5).select({}, LAYOUTS["single"])
