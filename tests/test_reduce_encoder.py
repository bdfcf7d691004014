"""Tokens that leave or merge between the blocks of the encoder, against the blocks run by hand."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from families import clip, picture, tiny
from foveate.adapters.shape import steps_of
from foveate.encoder_site import encode_reduced
from foveate.errors import RecipeError, UnsupportedError
from foveate.reduce.base import Reducer, Reduction, in_order, tokens_per_layer, top_k
from foveate.registry import METHODS
from foveate.runtime import encode
from foveate.vlm import Request
from reduce_oracle import rows_of


@dataclass(frozen=True)
class Between(Reducer):
    """Some tokens of each view leave in one block, by what CLS pays them; or the last ones join the first."""

    block: int = 0
    where: str = "output"
    joining: bool = False

    name: ClassVar[str] = "between"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    def select(self, signals, layout):
        (signal,) = signals.values()
        views = layout.groups("view")
        kept = [view[top_k(signal[view], self.count(len(view)))] for view in views]
        keep = in_order(kept)
        if not self.joining or len(keep) == len(layout):
            return Reduction(keep)
        weights = torch.eye(len(layout))
        for view, own in zip(views, kept):
            weights[own[0], view[~torch.isin(view, own)]] = 1.0
        return Reduction(keep, weights[keep] / weights[keep].sum(1, keepdim=True))

    def steps(self, shape):
        return (self.step("encoder", self.select, layer=self.block, signals=(SIGNAL,), where=self.where),)


SIGNAL = "cls_attention|received_attention"
FAMILIES = ("llava", "llava_next", "internvl", "smolvlm", "idefics3")
MEDIA = {"one": picture(1, 50, 50), "tall": picture(2, 30, 90), "two": [picture(1, 50, 50), picture(3, 80, 40)]}


@pytest.mark.parametrize("where", ["output", "mid"])
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_identity_and_counts_are_exact(family, media, where):
    vlm = tiny(family)
    dense = vlm.logits(Request("what?", MEDIA[media]))
    whole, part = (Between(keep=keep, block=1, where=where) for keep in (1.0, 0.4))
    assert torch.equal(vlm.logits(Request("what?", MEDIA[media], reduce=whole)), dense)
    request = Request("what?", MEDIA[media], reduce=part)
    sizes = vlm.adapter.layout(vlm.plan(request.to_messages())).features().sizes()
    with torch.inference_mode():
        (row,) = rows_of(vlm, [request])
    assert row.kept == len(row.features) == tokens_per_layer([part], sizes, vlm.adapter.shape)[-1]
    assert row.origin.tolist() == sorted(row.origin.tolist())
    assert row.features.shape[1] == vlm.adapter.text_config.hidden_size


@pytest.mark.parametrize("where", ["output", "mid"])
@torch.inference_mode()
def test_blocks_run_by_hand_give_the_same_features(where):
    vlm = tiny("llava")
    adapter = vlm.adapter
    plan = vlm.plan(Request("what?", MEDIA["one"]).to_messages())
    hidden = adapter.tower_embed(vlm.prepare(plan), plan)
    first, second = adapter.blocks
    attention = first.self_attn
    normed = first.layer_norm1(hidden)
    q, k = (p(normed).unflatten(-1, (4, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    seen = (q[:, :, :1] @ k.transpose(-1, -2) * attention.scale).softmax(-1)[0, :, 0, 1:].mean(0)
    keep = top_k(seen, 6)
    if where == "mid":
        half = hidden + attention(hidden_states=normed, attention_mask=None)[0]
        half = half[:, torch.cat([torch.tensor([0]), keep + 1])]
        hidden = half + first.mlp(first.layer_norm2(half))
    else:
        hidden = first(hidden, None)[:, torch.cat([torch.tensor([0]), keep + 1])]
    expected = adapter.connect(second(hidden, None)[0, 1:])
    (row,) = rows_of(vlm, [Request("what?", MEDIA["one"], reduce=Between(keep=6, where=where))])
    assert torch.equal(row.origin, keep)
    torch.testing.assert_close(row.features, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_merged_tokens_count_their_members_and_later_sites_follow():
    vlm = tiny("llava_next")
    method = Between(keep=0.5, joining=True)
    (row,) = rows_of(vlm, [Request("what?", MEDIA["tall"], reduce=method)])
    assert float(row.layout.size.sum()) == row.visual and float(row.layout.size.max()) > 1
    recipe = "between(keep=0.5) + fastervlm(keep=0.5) + fastv(keep=0.5)"
    METHODS.register("between", Between)
    try:
        answer = vlm.respond(Request("what?", MEDIA["two"], reduce=recipe), 2)
        request = Request("what?", MEDIA["two"], reduce=recipe)
        sizes = vlm.adapter.layout(vlm.plan(request.to_messages())).features().sizes()
        assert answer.tokens["kept"] == tokens_per_layer(vlm.reducers(recipe), sizes, vlm.adapter.shape)[-1]
        others = [Request("who?", MEDIA["one"], reduce="uniform(keep=0.5)"), request, Request("who?")]
        for together, other in zip(vlm.answer(others, 3), others):
            assert (together.ids, together.kept) == (vlm.respond(other, 3).ids, vlm.respond(other, 3).kept)
    finally:
        METHODS._entries.pop("between")


@pytest.mark.parametrize("where", ["output", "mid"])
@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
@torch.inference_mode()
def test_the_patches_of_a_token_leave_together(family, where):
    """Blocks run by hand: cells of 2 x 2 patches, scored by their mean, and the family's own code that joins them."""
    vlm = tiny(family)
    adapter, side = vlm.adapter, vlm.spec.side
    request = Request("what?", MEDIA["one"], reduce=Between(keep=2, where=where))
    plan = vlm.plan(request.to_messages())
    hidden = adapter.tower_embed(vlm.prepare(plan), plan)
    (row,) = rows_of(vlm, [request])
    first, *others = adapter.blocks
    facts, cls = adapter.attention_of(first), int(adapter.has_cls)
    norm = first.layernorm_before if family == "internvl" else first.layer_norm1
    q, k = (p(norm(hidden)).unflatten(-1, (4, -1)).transpose(1, 2) for p in _projections(first, family))
    logits = (q @ k.transpose(-1, -2) * facts.scale).softmax(-1).mean(1)
    seen = logits[:, 0, 1:] if cls else logits.mean(1)
    scores = seen.view(-1, side // 2, 2, side // 2, 2).mean(dim=(2, 4)).flatten(1)
    # a map whose four tokens' patches are told apart, so that only those of kept tokens may matter
    numbers = torch.arange(side * side).view(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    parts, start = [], 0
    for view, score in enumerate(scores):
        keep = top_k(score, 2)
        assert row.origin[start : start + 2].tolist() == (keep + view * len(score)).tolist()
        start += 2
        patches = numbers[keep].flatten().sort().values + cls
        stays = torch.cat([torch.arange(cls), patches])
        states = hidden[view : view + 1]
        if where == "mid":
            states = adapter.feed(first, adapter.attend(first, states)[:, stays])
        else:
            states = adapter.run_block(first, states)[:, stays]
        for block in others:
            states = adapter.run_block(block, states)
        place = {int(patch) - cls: i for i, patch in enumerate(patches)}
        finished = adapter.tower_finish(states)[0]
        for token in keep.tolist():
            # the family's own connector, on a whole map made of this token's patches over and over
            cell = finished[[place[int(n)] for n in numbers[token]]].view(2, 2, -1)
            whole = cell.repeat(side // 2, side // 2, 1)
            parts.append(_connector(vlm, family, whole))
    torch.testing.assert_close(row.features, torch.stack(parts), atol=1e-5, rtol=1e-5)


def _projections(block, family):
    if family == "internvl":
        attention = block.attention
        return (
            lambda x: attention.q_norm(attention.q_proj(x)),
            lambda x: attention.k_norm(attention.k_proj(x)),
        )
    return block.self_attn.q_proj, block.self_attn.k_proj


def _connector(vlm, family, whole):
    """The first token of transformers' own connector for a map [side, side, C]."""
    inner = vlm.model.model
    if family == "internvl":
        shuffled = inner.pixel_shuffle(whole[None], scale_factor=vlm.model.config.downsample_ratio)
        return inner.multi_modal_projector(shuffled.flatten(1, 2))[0, 0]
    return inner.connector(whole.flatten(0, 1)[None])[0, 0]


@pytest.mark.parametrize("method", ["between", "tome"])
@pytest.mark.parametrize("family", ["internvl", "smolvlm", "llava_next"])
def test_rows_of_a_batch_answer_as_they_do_alone(family, method):
    reducers = {"between": (Between(keep=0.4), Between(keep=0.7, where="mid")), "tome": ("tome(keep=0.5)", None)}
    first, second = reducers[method]
    vlm = tiny(family)
    clip_or_picture = clip(0) if vlm.adapter.takes_clips else MEDIA["tall"]
    requests = [
        Request("what is it?", MEDIA["two"], reduce=first),
        Request("who?", MEDIA["one"]),
        Request("and?", clip_or_picture, reduce=second or first),
        Request("no picture at all", reduce=first),
    ]
    for together, request in zip(vlm.answer(requests, 3), requests):
        alone = vlm.respond(request, 3)
        assert (together.ids, together.kept) == (alone.ids, alone.kept)


@pytest.mark.parametrize(
    ("family", "why"),
    [("nvila", "several scales"), ("llava_onevision", "resized"), ("qwen2_5_vl", "windows"), ("qwen3_vl", "deepstack")],
)
def test_a_tower_whose_tokens_cannot_leave_says_why_and_what_to_use(family, why):
    with pytest.raises(
        UnsupportedError, match=rf"between acts at site encoder.*\(.*{why}.*\).*Try 'visionzip'"
    ) as error:
        Between(keep=0.5).check(tiny(family))
    assert "\n" not in str(error.value)


def test_a_block_that_there_is_not():
    vlm = tiny("llava")
    Between(keep=0.5, block=vlm.adapter.num_blocks - 1).check(vlm)
    for block in (vlm.adapter.num_blocks, 7):
        with pytest.raises(RecipeError, match=f"block {block} of the encoder"):
            Between(keep=0.5, block=block).check(vlm)


@dataclass(frozen=True)
class Watching(Between):
    """Writes down what it is told, and keeps the tokens whose first key is largest."""

    name: ClassVar[str] = "watching"

    def select(self, signals, layout):
        SEEN.append({"where": self.where, "layout": layout, **signals})
        return Reduction(top_k(signals["keys"][:, 0], self.count(len(layout))))

    def steps(self, shape):
        return (self.step("encoder", self.select, layer=self.block, signals=("keys", "hidden"), where=self.where),)


SEEN: list = []


@torch.inference_mode()
def test_steps_of_one_block_come_in_turn_and_are_told_what_is_left():
    """Between attention and MLP first, whichever was named first; states are those at that place."""
    vlm = tiny("llava")
    adapter = vlm.adapter
    plan = vlm.plan(Request("what?", MEDIA["one"]).to_messages())
    states = adapter.tower_embed(vlm.prepare(plan), plan)
    half = adapter.attend(adapter.blocks[0], states)
    late, early = Watching(keep=3), Watching(keep=8, where="mid")
    SEEN.clear()
    (encoded,) = encode(adapter, [plan], [vlm.prepare(plan)], [steps_of((late, early), adapter.shape)])
    first, second = SEEN
    assert (first["where"], second["where"]) == ("mid", "output")
    torch.testing.assert_close(first["hidden"], half[0, 1:])
    kept = top_k(first["keys"][:, 0], 8)
    torch.testing.assert_close(second["keys"], first["keys"][kept])
    assert second["layout"].position.tolist() == first["layout"].position[kept].tolist()
    left = half[:, torch.cat([torch.tensor([0]), kept + 1])]
    torch.testing.assert_close(second["hidden"], adapter.feed(adapter.blocks[0], left)[0, 1:])
    assert encoded.layout.position.tolist() == second["layout"].position[top_k(second["keys"][:, 0], 3)].tolist()


@torch.inference_mode()
def test_states_for_later_sites_are_those_that_leave_the_block():
    vlm = tiny("llava")
    adapter = vlm.adapter
    plan = vlm.plan(Request("what?", MEDIA["one"]).to_messages())
    inputs = vlm.prepare(plan)
    keep = Between(keep=1.0, where="mid")
    (found,) = (encode_reduced(adapter, inputs, plan, keep.steps(adapter.shape), {"hidden@0", "values@0"}),)
    (dense,) = adapter.encode([inputs], [plan], {"hidden@0", "values@0"})
    for name in ("hidden@0", "values@0"):
        torch.testing.assert_close(found.signals[name], dense.signals[name])


def test_the_connector_is_no_part_of_the_time_of_selecting():
    """Behind the encoder it comes after the choice, but is the tower's."""
    vlm = tiny("llava")
    seen, connect = [], vlm.adapter.connect
    vlm.adapter.connect = lambda features: (time.sleep(0.2), seen.append(len(features)), connect(features))[2]
    try:
        answer = vlm.respond(Request("what?", MEDIA["one"], reduce="visionzip(keep=0.5)"), 1)
    finally:
        del vlm.adapter.connect
    assert seen and answer.ms["select"] < 150 < answer.ms["encode"]


@dataclass(frozen=True)
class Backwards(Between):
    """Hands the same tokens over the other way round."""

    def select(self, signals, layout):
        found = super().select(signals, layout)
        return Reduction(found.keep.flip(0), found.weights.flip(0))


@torch.inference_mode()
def test_tokens_that_are_handed_over_in_another_order_stay_at_their_places():
    vlm = tiny("llava_next")
    request = Request("what?", MEDIA["tall"])
    (row,) = rows_of(vlm, [replace(request, reduce=Between(keep=0.5, joining=True))])
    (other,) = rows_of(vlm, [replace(request, reduce=Backwards(keep=0.5, joining=True))])
    assert torch.equal(row.features, other.features)
    assert torch.equal(row.origin, other.origin) and torch.equal(row.layout.size, other.layout.size)
