"""Token reduction: goldens, pure selectors, signals against an eager oracle, and what stays of a request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.adapters.layout import NEWLINE, VALID, VisualLayout
from foveate.adapters.tower import received
from foveate.errors import RecipeError, UnsupportedError
from foveate.recipe import Recipe
from foveate.reduce.base import Reduction, Scorer, evenly, tokens_per_layer, top_k
from foveate.reduce.fastervlm import FasterVLM
from foveate.reduce.fastv import FastV
from foveate.reduce.random import Random
from foveate.reduce.uniform import Uniform, grid
from foveate.runtime import Clock, request_key, select
from foveate.vlm import Request
from goldens_io import goldens_dir
from layouts import LAYOUTS, make

RNG = np.random.default_rng(1)
PICTURE, OTHER = (RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))
CLIP = RNG.integers(0, 256, (7, 60, 60, 3), dtype=np.uint8)
MEDIA = {"picture": PICTURE, "two": [PICTURE, OTHER], "clip": CLIP}
FAMILIES = ("nvila", "lite", "video")
METHODS = ("random", "uniform", "fastervlm")


@pytest.fixture(scope="module")
def models():
    return {f: foveate.load(goldens_dir("nvila") / f / "ckpt", device="cpu") for f in FAMILIES}


def rows(vlm, request):
    plan = vlm.plan(request.to_messages())
    with torch.inference_mode():
        return vlm._rows([plan], [vlm.prepare(plan)], [vlm.reducers(request.reduce)], Clock(vlm.device))[0], plan


def flat_layout(views, patches, side=None):
    """A layout of `views` views of one picture, each a raster of side x patches / side."""
    side = side or 1
    n = views * patches
    cell = torch.arange(n) % patches
    cols = patches // side
    view = torch.arange(n) // patches
    none = torch.full((n,), -1)
    return VisualLayout(
        media=torch.zeros(n, dtype=torch.int64),
        view=view,
        frame=none,
        row=cell // cols,
        col=cell % cols,
        global_row=none,
        global_col=none,
        kind=torch.full((n,), VALID),
        position=torch.arange(n),
        size=torch.ones(n),
    )


# ---- pure parts


@given(st.integers(1, 20), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_grid_is_even_and_exact(rows, cols, data):
    count = data.draw(st.integers(0, rows * cols))
    picked = grid(rows, cols, count)
    assert len(picked) == count == len(set(picked.tolist()))
    assert picked.tolist() == sorted(picked.tolist())
    assert not count or 0 <= int(picked.min()) <= int(picked.max()) < rows * cols
    per_row = torch.bincount(picked // cols, minlength=rows)
    used = per_row[per_row > 0]
    assert not count or int(used.max() - used.min()) <= 1
    assert evenly(count, rows * cols).unique().tolist() == evenly(count, rows * cols).tolist()


def test_uniform_spreads_over_both_directions():
    picked = grid(8, 8, 16)
    quadrants = (picked // 8 // 4) * 2 + picked % 8 // 4
    assert torch.bincount(quadrants, minlength=4).tolist() == [4, 4, 4, 4]
    assert len(set((picked % 8).tolist())) >= 6  # rows are shifted against each other


def test_uniform_spreads_over_the_map_of_all_tiles_whatever_their_order():
    tokens = [
        {"view": v, "row": r, "col": c, "global_row": r, "global_col": 2 * v + c}
        for v in (0, 1)
        for r in (0, 1)
        for c in (0, 1)
    ]
    assert Uniform(keep=3).select({}, make(tokens)).keep.tolist() == [2, 6, 7]  # columns 0, 2 and 3 of one row
    gap = [{"row": i // 3, "col": i % 3} for i in range(5)]
    assert Uniform(keep=3).select({}, make(gap)).keep.tolist() == [0, 2, 4]
    assert len(set((grid(8, 2, 4) // 2).tolist())) == 4


def test_even_places_lie_in_the_middle_of_their_shares():
    assert evenly(2, 8).tolist() == [2, 6] and evenly(3, 3).tolist() == [0, 1, 2]


def test_ties_go_to_the_earlier_token():
    assert top_k(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("keep", "n", "count"),
    [(0.5, 5, 3), (0.25, 10, 3), (0.01, 10, 1), (1.0, 7, 7), (3, 10, 3), (12, 10, 10), (1, 9, 1)],
)
def test_keep_is_a_fraction_or_a_number(keep, n, count):
    assert Uniform(keep=keep).count(n) == count


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, 0, -3, "half", True, None, float("nan")])
def test_keep_out_of_range_is_refused(keep):
    with pytest.raises(RecipeError, match="keep is"):
        Uniform(keep=keep)


PINNED = [0, 2, 5, 14]


def test_random_is_pinned_seeded_and_different_for_each_request():
    layout = flat_layout(1, 16, 4)
    kept = Random(keep=4).select({"request_key": torch.tensor(123)}, layout).keep.tolist()
    assert len(Random(keep=7).select({"request_key": torch.tensor(1)}, LAYOUTS["tiled"]).keep) == 7  # of a picture
    assert kept == PINNED  # another process, machine or release draws the same
    assert Random(keep=4, seed=1).select({"request_key": torch.tensor(123)}, layout).keep.tolist() != kept
    other = Random(keep=4).select({"request_key": torch.tensor(124)}, layout).keep.tolist()
    assert kept != other != Random(keep=4, seed=1).select({"request_key": torch.tensor(123)}, layout).keep.tolist()


def test_merging_weights_are_applied_and_the_identity_changes_no_bit():
    features = torch.randn(4, 3)
    assert torch.equal(Reduction(torch.arange(4)).apply(features), features)
    assert Reduction(torch.tensor([1, 0])).changes(2) and not Reduction(torch.arange(2)).changes(2)
    merge = Reduction(torch.tensor([0, 2]), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]]))
    expected = torch.stack([features[:2].mean(0), 0.25 * features[2] + 0.75 * features[3]])
    torch.testing.assert_close(merge.apply(features), expected)
    torch.testing.assert_close(Reduction(merge.keep, merge.weights.to_sparse()).apply(features), expected)


# ---- on models


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_places_every_visual_token(models, family, media):
    vlm = models[family]
    plan = vlm.plan(Request("what?", MEDIA[media]).to_messages())
    layout = vlm.adapter.layout(plan)
    ids = torch.as_tensor(plan.input_ids)
    features = layout.features()
    assert len(layout) == plan.num_visual
    assert len(features) == sum(item.num_features for item in plan.media)
    assert set(ids[features.position].tolist()) <= set(vlm.adapter.placeholders)
    assert not set(ids[layout[layout.kind == NEWLINE].position].tolist()) & set(vlm.adapter.placeholders)
    assert layout.position.tolist() == sorted(layout.position.tolist())
    side = vlm.spec.token_side
    for group in features.groups("view"):
        part = features[group]
        assert len(group) == side * side
        assert (part.row * side + part.col).sort().values.tolist() == list(range(side * side))
    joined = features[features.global_row >= 0]
    where = torch.stack([joined.media, joined.frame, joined.global_row, joined.global_col])
    assert where.unique(dim=1).shape[1] == len(joined)  # no two tokens of a picture at one place


def test_views_of_a_layout_are_the_tiles_they_show(models):
    """Row and column in the whole picture follow from the tile and the place in it, for S2 and for Lite."""
    for family in ("nvila", "lite"):
        vlm = models[family]
        plan = vlm.plan(Request("what?", PICTURE).to_messages())
        (media,) = plan.media
        layout = vlm.adapter.layout(plan).features()
        last = max(view.scale for view in media.views)
        tiles = [view for view in media.views if view.scale == last]
        for group, tile in zip(layout.groups("view"), tiles):
            part = layout[group]
            assert torch.equal(part.global_row, tile.row * vlm.spec.token_side + part.row), family
            assert torch.equal(part.global_col, tile.col * vlm.spec.token_side + part.col), family


@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_identity_bit_for_bit(models, family, method, media):
    vlm = models[family]
    dense = vlm.logits(Request("what?", MEDIA[media]))
    assert torch.equal(vlm.logits(Request("what?", MEDIA[media], reduce=f"{method}(keep=1.0)")), dense)
    halved = vlm.logits(Request("what?", MEDIA[media], reduce=f"{method}(keep=0.3)"))
    assert not torch.equal(halved, dense)


@pytest.mark.parametrize("keep", [0.25, 0.6, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_tokens_stay_as_were_asked_for(models, family, method, keep):
    vlm = models[family]
    for media in MEDIA.values():
        request = Request("what?", media, reduce=f"{method}(keep={keep})")
        row, plan = rows(vlm, request)
        (reducer,) = vlm.reducers(request.reduce)
        layout = vlm.adapter.layout(plan).features()
        groups = layout.groups(reducer.scope)
        inside = [torch.isin(row.origin, group).sum().item() for group in groups]
        assert inside == [reducer.count(len(group)) for group in groups]
        assert row.kept == sum(inside) == tokens_per_layer([reducer], layout.sizes(), vlm.adapter.shape)[-1]
        placeholders = torch.isin(row.input_ids, torch.tensor(vlm.adapter.placeholders))
        assert int(placeholders.sum()) == row.kept
        # text and separators stay, in order
        ids = torch.as_tensor(plan.input_ids)
        text = ~torch.isin(ids, torch.tensor(vlm.adapter.placeholders))
        assert torch.equal(row.input_ids[~placeholders], ids[text])


def test_positions_are_kept_or_renumbered_as_the_method_says(models):
    vlm = models["nvila"]
    row, plan = rows(vlm, Request("what?", PICTURE, reduce="uniform(keep=0.25)"))
    layout = vlm.adapter.layout(plan).features()
    visual = torch.isin(row.input_ids, torch.tensor(vlm.adapter.placeholders))
    assert torch.equal(row.positions[visual], layout.position[row.origin])
    assert row.next_position == plan.num_tokens
    row, plan = rows(vlm, Request("what?", PICTURE, reduce="fastervlm(keep=0.25)"))
    assert row.positions.tolist() == list(range(len(row.input_ids)))
    assert row.next_position == len(row.input_ids)


def test_a_method_may_hand_its_tokens_over_in_another_order(models):
    class Backwards(Uniform):
        def select(self, signals, layout):
            return Reduction(super().select(signals, layout).keep.flip(0))

    vlm = models["nvila"]
    plan = vlm.plan(Request("what?", PICTURE).to_messages())
    with torch.inference_mode():
        encoded = vlm.adapter.encode([vlm.prepare(plan)], [plan])[0]
    row = select(vlm.adapter, plan, encoded, Backwards(keep=5).steps(vlm.adapter.shape))
    visual = torch.isin(row.input_ids, torch.tensor(vlm.adapter.placeholders))
    layout = vlm.adapter.layout(plan).features()
    assert torch.equal(row.features, encoded.features[row.origin])
    assert torch.equal(row.positions[visual], layout.position[row.origin])
    assert row.positions[visual].tolist() == sorted(row.positions[visual].tolist(), reverse=True)


def test_the_request_key_follows_prompt_and_pixels(models):
    vlm = models["nvila"]

    def key(text, media):
        return request_key(vlm.prepare(vlm.plan(Request(text, media).to_messages())))

    assert key("what?", PICTURE) == key("what?", PICTURE.copy())
    assert len({key("what?", PICTURE), key("who?", PICTURE), key("what?", OTHER)}) == 3


def test_attention_of_all_queries_and_of_their_mean_is_that_of_the_layer():
    """Against the eager attention of SigLIP itself, in the layer whose output is used."""
    vlm = foveate.load(goldens_dir("nvila") / "video" / "ckpt", device="cpu", attn="eager")
    plan = vlm.plan(Request("what?", [PICTURE, OTHER]).to_messages())
    inputs = vlm.prepare(plan)
    weights: list[torch.Tensor] = []
    model = vlm.model
    layers = model.vision_tower.encoder.layers[: model.config.num_vision_layers]
    normed: list[torch.Tensor] = []
    handles = [
        layers[-1].self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1])),
        layers[-1].layer_norm1.register_forward_hook(lambda m, a, out: normed.append(out)),
    ]
    with torch.inference_mode():
        model.tower(inputs.pixel_values)
        for handle in handles:
            handle.remove()
        names = {"received_attention", "mean_query_attention", "mean_query_attention@-1"}
        found = vlm.adapter.encode([inputs], [plan], names)[0].signals
        attention = layers[-1].self_attn
        states = [project(normed[0]).unflatten(-1, (attention.num_heads, -1)) for project in _query_key(attention)]
    maps = weights[0].mean(dim=(1, 2))  # [views, P]: mean over heads and queries
    torch.testing.assert_close(found["received_attention"], _of_cells(maps, vlm.spec))
    logits = torch.einsum("vhd,vphd->vph", states[0].mean(dim=1), states[1]) * attention.scale
    shares = logits.softmax(dim=1)
    heads = torch.stack([_of_cells(shares[..., head], vlm.spec) for head in range(attention.num_heads)], dim=1)
    torch.testing.assert_close(found["mean_query_attention@-1"], heads)
    torch.testing.assert_close(found["mean_query_attention"], heads.mean(dim=1))


def _query_key(attention):
    return attention.q_proj, attention.k_proj


def _of_cells(maps, spec):
    """Maps [2, P] of two pictures -> the means of the cells that become tokens."""
    cells = maps.view(2, spec.side, spec.side)
    expected = [
        cells[v, r : r + spec.downsample, c : c + spec.downsample].mean()
        for v in range(2)
        for r in range(0, spec.side, spec.downsample)
        for c in range(0, spec.side, spec.downsample)
    ]
    return torch.stack(expected)


def test_received_attention_is_the_same_in_small_pieces():
    query, key = torch.randn(5, 9, 8), torch.randn(5, 9, 8)
    whole = received(query, key, 2, 0.5)
    torch.testing.assert_close(received(query, key, 2, 0.5, limit=1), whole)
    torch.testing.assert_close(whole.sum(dim=1), torch.ones(5, 2))


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_received_attention_of_logits_of_any_size(size, dtype):
    """Also where a power of two of a logit is beyond float32, above or below."""
    query, key = (size * torch.randn(2, 9, 8) for _ in range(2))
    query[0] -= size  # one sequence whose logits are mostly of one sign
    query, key = query.to(dtype), key.to(dtype)
    q, k = (x.float().unflatten(-1, (2, -1)).transpose(1, 2) for x in (query, key))
    expected = (q @ k.transpose(-1, -2) * 0.5).softmax(dim=-1).mean(dim=2).transpose(1, 2)
    found = received(query, key, 2, 0.5)
    assert found.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:  # logits are bfloat16 there, as in the tower itself
        assert (found - expected).abs().mean() < 0.05


def test_the_most_attended_patch_is_the_token_at_its_place(models):
    """A single bright patch of a tile lights up the token whose layout entry says tile, row and column."""
    for family in ("nvila", "lite"):
        vlm = models[family]
        plan = vlm.plan(Request("what?", PICTURE).to_messages())
        (media,) = plan.media
        layout = vlm.adapter.layout(plan).features()
        last = max(view.scale for view in media.views)
        r, side = vlm.spec.downsample, vlm.spec.side
        for index, view in enumerate(media.views):
            if view.scale != last:
                continue
            row, col = side - 2, 1
            scores = torch.zeros(len(media.views), side * side)
            scores[index, row * side + col] = 1.0
            units = [media.block] if media.block else [(0, 0)] * len(media.views)
            counts = [len(media.views)] if media.block else [1] * len(media.views)
            parts = scores.split(counts)
            found = torch.cat([vlm.adapter._to_tokens(p, u, False) for p, u in zip(parts, units)])
            best = int(found.argmax())
            assert int(layout.global_row[best]) == view.row * vlm.spec.token_side + row // r
            assert int(layout.global_col[best]) == view.col * vlm.spec.token_side + col // r


def test_a_clip_keeps_an_equal_share_of_each_group(models):
    vlm = models["nvila"]
    row, plan = rows(vlm, Request("what?", CLIP, reduce="uniform(keep=0.5)"))
    layout = vlm.adapter.layout(plan).features()[row.origin]
    shares = torch.bincount(layout.view)
    assert int(shares.max() - shares.min()) == 0


def test_a_method_without_its_signal_or_site_says_what_to_use(models):
    class Unmet(FasterVLM):
        signals = ("moon_phase",)

    class Elsewhere(Uniform):
        sites = ("beneath",)

    class Early(Uniform):
        def steps(self, shape):
            return (self.step("llm", self.select, layer=0),)

    with pytest.raises(RecipeError, match=r"before layer 0 of the language model; .* so 1 to"):
        Early(keep=0.5).check(models["nvila"])
    with pytest.raises(UnsupportedError, match=r"moon_phase.*try 'uniform'"):
        Unmet(keep=0.5).check(models["nvila"])
    shape = models["nvila"].adapter.shape
    with pytest.raises(UnsupportedError, match=r"this one has 1; use .*'uniform'"):
        FastV(keep=0.5).steps(replace(shape, layers=1))
    with pytest.raises(UnsupportedError, match=r"text only.*'int8'"):
        Uniform(keep=0.5).steps(replace(shape, sites=("cache",)))
    with (
        pytest.raises(UnsupportedError, match=r"site beneath.*post_projector"),
        Elsewhere(keep=0.5).attach(models["nvila"]),
    ):
        pass
    with pytest.raises(RecipeError, match="weights"), Recipe.parse("rtn").methods[0].attach(models["nvila"]):
        pass


def test_a_scorer_of_features_is_twenty_lines(models):
    """What CONTRIBUTING shows: a new method needs a score, and works on every family."""

    class Norm(Scorer):
        name = "norm"
        signals = ("features",)

        def score(self, signals, layout):
            return signals["features"].norm(dim=-1)

    for vlm in models.values():
        answer = vlm.ask(PICTURE, "what?", max_new_tokens=2, reduce=Norm(keep=0.5))
        assert answer.tokens["kept"] == len(answer.kept) < answer.tokens["visual"]
