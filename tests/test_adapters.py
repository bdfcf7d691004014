"""Every family of transformers, on a tiny random model: the same logits, tokens and signals as its own code gives."""

from __future__ import annotations

import copy
import dataclasses
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foveate
from families import FAMILIES, clip, picture, tiny
from foveate.adapters.attention import observe, rotate, unrotate
from foveate.adapters.decoder import _narrow_mlp, attention_mask, project
from foveate.adapters.hf import PATCHES_PER_PASS
from foveate.adapters.layout import NEWLINE, PADDING, VALID
from foveate.adapters.shape import Shape, steps_of
from foveate.adapters.tower import capture
from foveate.data.execute import Inputs, normalise
from foveate.data.plan import Plan
from foveate.data.sample import VideoSource
from foveate.errors import UnsupportedError
from foveate.reduce.fastv import FastV
from foveate.reduce.uniform import Uniform
from foveate.vlm import VLM, Request
from goldens_io import goldens_dir
from layouts import make
from plain_hf import CASES, MIXES, QWEN, plain, prepared


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_logits_are_those_of_the_family_itself(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    expected = vlm.model(**plain(vlm, plan, inputs)).logits[0, -1]
    torch.testing.assert_close(vlm.logits(Request("What is it?", MIXES[mix])), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_decide_the_logits(family: str):
    vlm = tiny(family)
    one, other = (vlm.logits(Request("What is it?", [picture(seed)])) for seed in (0, 1))
    assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize(("family", "mix"), [c for c in CASES if c[1] in ("picture", "text", "clip and picture")])
def test_answers_are_those_of_generate(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    expected = vlm.model.generate(
        **plain(vlm, plan, inputs), max_new_tokens=6, do_sample=False, eos_token_id=vlm.stop_ids, pad_token_id=0
    )
    answer = vlm.respond(Request("What is it?", MIXES[mix]), max_new_tokens=6)
    found = [*answer.ids, *expected[0, plan.num_tokens + len(answer.ids) :].tolist()]  # generate keeps the stop token
    assert found == expected[0, plan.num_tokens :].tolist()
    assert len(found) - len(answer.ids) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_request_alone(family: str):
    vlm = tiny(family)
    requests = [Request(f"What is {mix}?", MIXES[mix]) for f, mix in CASES if f == family]
    together = vlm.answer(requests, max_new_tokens=4)
    for request, answer in zip(requests, together):
        assert answer.ids == vlm.respond(request, max_new_tokens=4).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_two_requests_leave_nothing_behind(family: str):
    """No state of a request stays on the model: the first one's logits are the same after others ran."""
    vlm = tiny(family)
    before = vlm.logits(Request("What?", [picture(0)]))
    vlm.respond(Request("And that?", [picture(5, 100, 30)]), max_new_tokens=3)
    vlm.respond(Request("No picture"), max_new_tokens=3)
    assert torch.equal(before, vlm.logits(Request("What?", [picture(0)])))


# ---- features and signals


@pytest.mark.parametrize(("family", "mix"), [c for c in CASES if c[1] != "text"])
def test_layout_counts_every_feature_and_placeholder(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    layout = vlm.adapter.layout(plan)
    slots = torch.isin(torch.as_tensor(plan.input_ids), torch.tensor(vlm.adapter.placeholders))
    assert torch.equal(layout.position, slots.nonzero().squeeze(1))
    (encoded,) = vlm.adapter.encode([inputs], [plan])
    assert len(encoded.features) == len(layout.features()) == sum(media.num_features for media in plan.media)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_connector_alone_gives_the_features(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "pictures")
    (patches_only,) = vlm.adapter.encode([inputs], [plan], stop="post_encoder")
    (whole,) = vlm.adapter.encode([inputs], [plan])
    assert torch.equal(vlm.adapter.connect(patches_only.features), whole.features)


def reference(vlm: VLM, inputs: Inputs) -> Any:
    """Attention maps [V, H, T, T] and states [V, T, C] of every block, by the tower's own code without fast kernels."""
    tower = vlm.adapter.tower
    config, kernel = tower.config, tower.config._attn_implementation
    pixels = torch.cat([normalise(item.pixels, vlm.spec) for item in inputs.media])
    config._attn_implementation = "eager"
    try:
        return tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    finally:
        config._attn_implementation = kernel


def expected_tokens(vlm: VLM, plan: Plan, values: Tensor) -> Tensor:
    """Values of patches [V, P, ...] -> of tokens, one by one: the mean over the patches that a token joins."""
    side, ratio = vlm.spec.side, vlm.spec.downsample
    layout, out = vlm.adapter.layout(plan).features(), []
    firsts = [0, *np.cumsum([len(media.views) for media in plan.media]).tolist()]
    for media, view, row, col in zip(*(getattr(layout, n).tolist() for n in ("media", "view", "row", "col"))):
        cells = [(row * ratio + y) * side + col * ratio + x for y in range(ratio) for x in range(ratio)]
        out.append(values[firsts[media] + view, cells].mean(dim=0))
    return torch.stack(out)


VIEWS = ["llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3"]


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize("family", VIEWS)
def test_signals_are_those_of_the_tower(family: str, block: int):
    vlm = tiny(family)
    adapter = vlm.adapter
    plan, inputs = prepared(vlm, "pictures")
    names = [f"{name}@{block}" for name in adapter.signals[3:]]
    (encoded,) = adapter.encode([inputs], [plan], names)
    found = {name.partition("@")[0]: value for name, value in encoded.signals.items()}
    assert sorted(encoded.signals) == sorted(names)
    out, index = reference(vlm, inputs), block % adapter.num_blocks
    attention, first = out.attentions[index].float(), int(adapter.has_cls)
    check = {"received_attention": attention.mean(dim=2)[:, :, first:].transpose(1, 2)}
    check["hidden"] = out.hidden_states[index + 1][:, first:]
    facts = adapter.attention_of(adapter.blocks[index])
    with capture({"q": facts.q, "k": facts.k}) as seen:
        reference(vlm, inputs)
    query, key = (seen[name][0].unflatten(-1, (facts.heads, -1)) for name in "qk")
    logits = torch.einsum("vhd,vphd->vph", query[:, first:].mean(dim=1), key) * facts.scale
    check["mean_query_attention"] = logits.softmax(dim=1)[:, first:]
    if adapter.has_cls:
        check["cls_attention"] = attention[:, :, 0, 1:].transpose(1, 2)
    for name, values in check.items():
        torch.testing.assert_close(found[name], expected_tokens(vlm, plan, values), atol=1e-5, rtol=1e-4)
    if adapter.has_cls:  # logits and the states they come from say the same as the map
        logits = found["cls_logits"] - found["cls_attention"].log()
        views = adapter.view_index(plan)[:, 0] if adapter.spec.downsample == 1 else None
        if views is not None:
            assert max(logits[views == view].std(dim=0).max() for view in views.unique()) < 1e-4
            heads = adapter.num_heads
            query, keys = found["cls_query"][views].unflatten(-1, (heads, -1)), found["keys"].unflatten(-1, (heads, -1))
            scale = adapter.attention_of(adapter.blocks[index]).scale
            torch.testing.assert_close((query * keys).sum(-1) * scale, found["cls_logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bare_attention_is_the_mean_over_heads_of_the_last_block(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    (encoded,) = vlm.adapter.encode([inputs], [plan], ["received_attention", "received_attention@-1"])
    scores, heads = encoded.signals["received_attention"], encoded.signals["received_attention@-1"]
    assert scores.shape == (len(encoded.features),) and heads.shape[1] == vlm.adapter.num_heads
    torch.testing.assert_close(scores, heads.mean(dim=1))
    assert scores.std() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_block_is_refused(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    for block in (9, vlm.adapter.num_blocks, -vlm.adapter.num_blocks - 1):
        with pytest.raises(
            UnsupportedError, match=rf"'keys@{block}' asks for encoder block {block}, the tower uses \d"
        ):
            vlm.adapter.encode([inputs], [plan], [f"keys@{block}"])


def test_other_threads_leave_no_trace_in_what_is_caught():
    module = torch.nn.Identity()
    with capture({"out": module}) as seen:
        other = threading.Thread(target=module, args=(torch.zeros(1),))
        other.start()
        other.join()
        module(torch.ones(2))
    assert [value.tolist() for value in seen["out"]] == [[1, 1]] and not module._forward_hooks


def test_views_are_counted_through_all_pictures():
    vlm = tiny("llava")
    plan = vlm.plan(Request("What?", [picture(seed) for seed in range(4)]).to_messages())
    index = vlm.adapter.view_index(plan)
    assert index[:, 0].unique_consecutive().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", QWEN)
def test_qwen_signals_are_those_of_the_tower(family: str):
    """Recomputed for the one window or frame of a small picture, where the tower's order is plain."""
    vlm = tiny(family)
    adapter = vlm.adapter
    plan = vlm.plan(Request("What?", [picture(0, 16, 16)]).to_messages())
    inputs = vlm.prepare(plan)
    block, seen = adapter.blocks[1], {}
    handles = [
        block.attn.register_forward_hook(
            lambda m, a, k, o: seen.update(states=a[0] if a else k["hidden_states"], rotary=k["position_embeddings"]),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda m, a, o: seen.update(hidden=o)),
    ]
    names = ["received_attention@1", "mean_query_attention@1", "keys@1", "values@1", "hidden@1"]
    (encoded,) = adapter.encode([inputs], [plan], names)
    for handle in handles:
        handle.remove()
    heads, count = adapter.num_heads, len(seen["states"])
    q, k, v = block.attn.qkv(seen["states"]).reshape(count, 3, heads, -1).unbind(1)
    cos, sin = (x[:, None] for x in seen["rotary"])
    turn = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)  # noqa: E731
    rq, rk = (x * cos + turn(x) * sin for x in (q, k))
    weights = (torch.einsum("qhd,khd->hqk", rq, rk) * q.shape[-1] ** -0.5).softmax(-1)
    mean = (torch.einsum("hd,khd->kh", rq.mean(dim=0), rk) * q.shape[-1] ** -0.5).softmax(0)
    check = [weights.mean(dim=1).T, mean, k.flatten(1), v.flatten(1), seen["hidden"]]
    for name, values in zip(names, check):
        torch.testing.assert_close(encoded.signals[name], values.reshape(count // 4, 4, -1).mean(dim=1))


def test_windows_put_signals_at_their_tokens():
    """Qwen2.5-VL's first block sees windows of 2 x 2 tokens: a changed patch changes the states of its window only."""
    vlm = tiny("qwen2_5_vl")
    array = np.array(picture(0, 48, 40))
    plan = vlm.plan(Request("What?", [array]).to_messages())
    changed = array.copy()
    changed[0:2, 40:42] = 255 - changed[0:2, 40:42]
    other = vlm.plan(Request("What?", [changed]).to_messages())
    assert plan.media[0].view_size == (48, 40)
    states = [vlm.adapter.encode([vlm.prepare(p)], [p], ["hidden@0"])[0].signals["hidden@0"] for p in (plan, other)]
    moved = (states[0] - states[1]).abs().amax(dim=1) > 1e-6
    layout = vlm.adapter.layout(plan)
    window = (layout.row // 2 == 0) & (layout.col // 2 == (40 // 8) // 2)
    assert torch.equal(moved, window) and window.sum() == 4


@pytest.mark.parametrize("family", [*FAMILIES, "nvila"])
@torch.inference_mode()
def test_what_goes_through_the_tower_in_several_passes_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch):
    vlm = tiny(family)
    plan = vlm.plan(Request("What?", [picture(1), picture(2, 90, 40), picture(3, 20, 70)]).to_messages())
    inputs = vlm.prepare(plan)
    (whole,) = vlm.adapter.encode([inputs], [plan], ["received_attention"])
    monkeypatch.setitem(PATCHES_PER_PASS, "cpu", 1)
    (parts,) = vlm.adapter.encode([inputs], [plan], ["received_attention"])
    torch.testing.assert_close(parts.features, whole.features)
    for one, other in zip([*parts.deep, *parts.signals.values()], [*whole.deep, *whole.signals.values()], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_tower_in_pieces_gives_the_patches(family: str):
    vlm = tiny(family)
    adapter = vlm.adapter
    plan, inputs = prepared(vlm, "pictures")
    hidden = adapter.tower_embed(inputs, plan)
    for block in adapter.blocks:
        hidden = block(hidden, None)
    index = adapter.view_index(plan)
    (encoded,) = adapter.encode([inputs], [plan], stop="post_encoder")
    torch.testing.assert_close(adapter.tower_finish(hidden)[index[:, 0], index[:, 1]], encoded.features)


@pytest.mark.parametrize("family", QWEN)
def test_the_mean_query_is_that_of_one_picture(family: str):
    """Whatever else passes the tower beside it."""
    vlm = tiny(family)
    first, second = picture(0, 32, 16), picture(1, 16, 32)
    found = {}
    for name, pictures in {"alone": [first], "both": [first, second]}.items():
        plan = vlm.plan(Request("What?", pictures).to_messages())
        (encoded,) = vlm.adapter.encode([vlm.prepare(plan)], [plan], ["mean_query_attention@1"])
        found[name] = encoded.signals["mean_query_attention@1"]
    torch.testing.assert_close(found["both"][: len(found["alone"])], found["alone"])


# ---- places, times and the rotary embedding


@pytest.mark.parametrize(("fps", "apart"), [(2.0, 4), (1.0, 8)])
def test_units_of_a_clip_are_apart_as_their_times_are(fps: float, apart: int):
    vlm = tiny("qwen2_5_vl")
    plan = vlm.plan(Request("what?", VideoSource(clip(1, 8).data, fps=fps)).to_messages())
    times = vlm.adapter.positions(plan)[0][vlm.adapter.layout(plan).position].unique()
    assert times.diff().tolist() == [apart] * 3  # two frames each, at four positions a second


def test_views_of_a_clip_pooled_over_time_know_their_first_frame(monkeypatch: pytest.MonkeyPatch):
    adapter = foveate.load(goldens_dir("nvila") / "video" / "ckpt", device="cpu").adapter
    monkeypatch.setattr(adapter.model.config, "video_pool_sizes", [[2, 1, 1], [4, 1, 1]])
    values = torch.arange(8.0)[:, None].expand(8, adapter.spec.side**2)
    means = adapter._to_tokens(values, 8, True).unflatten(0, (6, -1))  # signals in the same order
    assert means.mean(dim=1).tolist() == [0.5, 2.5, 4.5, 6.5, 1.5, 5.5]
    adapter = adapter.with_spec(dataclasses.replace(adapter.spec, video_pool=((2, 1, 1), (4, 1, 1))))
    layout = adapter.layout(adapter.plan(Request("what?", clip(1, 8)).to_messages())).features()
    frames = dict(zip(layout.view.tolist(), layout.frame.tolist()))
    assert frames == {0: 0, 1: 2, 2: 4, 3: 6, 4: 0, 5: 4}


def test_padding_is_a_feature_and_groups_follow_the_prompt():
    kinds = make([{"kind": VALID}, {"kind": PADDING}, {"kind": NEWLINE}])
    assert kinds.features().kind.tolist() == [VALID, PADDING]
    views = make([{"media": media, "view": view} for media in (0, 1) for view in (1, 0)]).groups("view")
    assert [view.tolist() for view in views] == [[1], [0], [3], [2]]


def test_steps_come_in_the_order_in_which_a_request_passes_them():
    shape = Shape(blocks=2, layers=4, no_encoder="maps are resized")
    steps = steps_of([FastV(keep=0.5, layer=3), FastV(keep=0.5, layer=1), Uniform(keep=0.5)], shape)
    assert [(step.site, step.layer) for step in steps] == [("post_projector", 0), ("llm", 1), ("llm", 3)]
    assert "maps are resized" in shape.unserved("tome", ("encoder",))
    assert "maps are resized" not in shape.unserved("visionzip", ("post_encoder",))


def test_a_rotary_embedding_that_also_scales_is_taken_off():
    module = tiny("llava").adapter.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, module.head_dim, generator=generator)
    angle = torch.rand(1, 5, module.head_dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()
    turned = rotate(module, states, cos, sin)
    assert float(turned.norm() / states.norm()) == pytest.approx(1.3, rel=1e-4)
    torch.testing.assert_close(unrotate(module, turned, cos, sin), states)


def test_listening_twice_adds_no_hook():
    layers = tiny("llava").adapter.layers
    counts = [len(module._forward_pre_hooks) for _ in range(2) for module in observe(layers)]
    assert counts[: len(layers)] == counts[len(layers) :]


# ---- decoder layers from outside


def test_heads_are_normalised_where_the_family_does():
    layer = tiny("qwen3_vl").adapter.layers[0]
    own, states = layer.self_attn, torch.randn(5, layer.self_attn.q_proj.in_features)
    for kind, norm in (("q", own.q_norm), ("k", own.k_norm), ("v", torch.nn.Identity())):
        heads = getattr(own, f"{kind}_proj")(layer.input_layernorm(states)).unflatten(-1, (-1, own.head_dim))
        torch.testing.assert_close(project(layer, kind, states, None), norm(heads).transpose(0, 1))


def test_masks_have_the_form_that_each_attention_takes():
    real = torch.tensor([[False, True, True]])

    def mask(kind: str, real: Tensor | None, new: int) -> Any:
        config = SimpleNamespace(_attn_implementation=kind)
        return attention_mask(real, new, config, torch.float32, torch.device("cpu"))

    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    assert mask("sdpa", None, 3) is mask("eager", None, 1) is mask("flash_attention_2", None, 3) is None
    assert torch.equal(mask("eager", None, 3)[0, 0] == 0, causal)
    assert torch.equal(mask("sdpa", real, 3)[0, 0], causal & real)
    assert torch.equal(mask("eager", real, 2)[0, 0] == 0, (causal & real)[1:])
    assert mask("flash_attention_2", real, 3).tolist() == [[0, 1, 1]]
    with pytest.raises(UnsupportedError, match="attn='sdpa'"):
        mask("flex_attention", real, 3)


def test_layers_of_any_kind_use_a_share_of_the_channels():
    mlp = copy.deepcopy(tiny("llava").adapter.layers[0].mlp)
    states = torch.randn(4, mlp.gate_proj.in_features)
    plain = _narrow_mlp(mlp, states, 0.3)
    mlp.up_proj.__class__ = type("Compressed", (torch.nn.Linear,), {})
    torch.testing.assert_close(_narrow_mlp(mlp, states, 0.3), plain)
    assert not torch.allclose(plain, mlp(states))
