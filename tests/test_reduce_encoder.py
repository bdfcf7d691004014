"""Tokens that leave or merge between the blocks of the encoder, against the blocks run by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from families import picture, tiny
from foveate.errors import RecipeError, UnsupportedError
from foveate.reduce.base import Reducer, Reduction, tokens_per_layer, top_k
from foveate.registry import METHODS
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
        count = self.count(len(layout))
        keep = top_k(signals["cls_attention"], count)
        if not self.joining or count == len(layout):
            return Reduction(keep)
        gone = torch.ones(len(layout), dtype=torch.bool)
        gone[keep] = False
        weights = torch.zeros(count, len(layout))
        weights[torch.arange(count), keep] = 1.0
        weights[0, gone] = 1.0
        return Reduction(keep, weights / weights.sum(1, keepdim=True))

    def steps(self, shape):
        return (self.step("encoder", self.select, layer=self.block, signals=("cls_attention",), where=self.where),)


MEDIA = {"one": picture(1, 50, 50), "tall": picture(2, 30, 90), "two": [picture(1, 50, 50), picture(3, 80, 40)]}


@pytest.mark.parametrize("where", ["output", "mid"])
@pytest.mark.parametrize("media", MEDIA)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
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


def test_a_tower_whose_connector_joins_patches_says_so():
    with pytest.raises(UnsupportedError, match=r"between acts at site 'encoder'.*serves"):
        Between(keep=0.5).check(tiny("internvl"))
    with pytest.raises(RecipeError, match="block 7 of the encoder"):
        Between(keep=0.5, block=7).check(tiny("llava"))
