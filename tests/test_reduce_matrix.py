"""Every reduction on every family: what must hold whatever the method does and whatever the model is.

Keeping all changes no bit; as many tokens stay as were asked for, in every layer; a row of a batch is the request
alone; decoding with a cache equals one pass without; a method that cannot work on a family says why and what instead.
"""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch

from families import CLIPS, FAMILIES, clip, picture, tiny
from foveate.errors import UnsupportedError
from foveate.reduce.base import tokens_per_layer
from foveate.registry import METHODS
from foveate.runtime import Clock, open_batch
from foveate.vlm import Request
from reduce_oracle import masked, recorded, replayed, rows_of

REDUCERS = [name for name in METHODS.names() if METHODS.get(name).socket == "reduce"]
TOKENS = (65, 70)


@cache
def media(family):
    """A picture, or a clip for methods of video."""
    return picture(1, 70, 44), (clip(1, 8) if family in CLIPS or family == "nvila" else None)


ALONE: dict = {}


def dense_of(family, place, request):
    """Logits of a companion on its own, the same for every method."""
    if (family, place) not in ALONE:
        ALONE[family, place] = tiny(family).logits(request)
    return ALONE[family, place]


def usual(name, family, keep):
    """The method with this budget and all else at its defaults, checked on the family."""
    method = METHODS.get(name)(keep=keep)
    method.check(tiny(family))
    return method


def pairs():
    return [pytest.param(name, family, id=f"{name}-{family}") for name in REDUCERS for family in (*FAMILIES, "nvila")]


@pytest.mark.parametrize(("name", "family"), pairs())
@torch.inference_mode()
def test_a_method_on_a_family(name, family):
    vlm = tiny(family)
    try:
        whole, half, few = (usual(name, family, keep) for keep in (1.0, 0.5, 0.3))
    except UnsupportedError as error:
        assert name in str(error)
        assert any(word in str(error) for word in ("try", "use", "it serves", "works on")), error
        return
    still, moving = media(family)
    shown = moving if moving is not None and "clip" in METHODS.get(name).summary else still
    request = Request("what?", shown, reduce=half)
    dense = vlm.logits(Request("what?", shown))
    assert torch.equal(vlm.logits(Request("what?", shown, reduce=whole)), dense)

    # one request on its own: counts, then two tokens from the cache against one pass without
    (row,) = rows_of(vlm, [request])
    row, notes = recorded(row)
    batch = open_batch(vlm.adapter, [row], vlm.new_cache(), Clock(vlm.device))
    steps = [batch.prefill()]
    chosen = list(notes)
    steps += [batch.decode(torch.tensor([token])) for token in TOKENS]
    sizes = vlm.adapter.layout(vlm.plan(request.to_messages())).features().sizes()
    expected = tokens_per_layer([half], sizes, vlm.adapter.shape)
    if half.exact:
        assert row.per_layer == expected
    assert row.per_layer == sorted(row.per_layer, reverse=True) and row.per_layer[-1] == row.kept == len(row.origin)
    acts = half.steps(vlm.adapter.shape)
    if not any(step.site in ("cache", "compute") for step in acts):
        assert not torch.allclose(steps[0][0], dense)
        lengths = [layer.get_seq_length() for layer in batch.cache.layers]
        assert lengths[-1] == len(row) + len(TOKENS)
        for count in range(len(TOKENS) + 1):
            oracle = replayed(vlm, request, chosen, list(TOKENS[:count]))
            torch.testing.assert_close(steps[count][0], oracle, atol=1e-5, rtol=1e-5)
        if chosen and all(reduction.weights is None for _, reduction in chosen):
            stages = [(stage.first, stage.origin[0]) for stage in batch.stages]
            closing = any(step.position == "renumber" for step, _ in chosen)
            oracle = masked(vlm, request, stages, closing, list(TOKENS))
            torch.testing.assert_close(steps[-1][0], oracle, atol=1e-5, rtol=1e-5)

    # in a batch of other methods, layers, budgets and lengths
    others = [
        Request("what is all of this, and where?", [still, picture(2, 40, 60)], reduce=few),
        request,
        Request("what?", still, reduce="fastv(keep=0.4, layer=2)"),
        Request("who?", picture(3), reduce="uniform(keep=0.4)"),
        Request("who?"),
    ]
    rows = rows_of(vlm, others)
    together = open_batch(vlm.adapter, rows, vlm.new_cache(), Clock(vlm.device))
    first, second = together.prefill(), together.decode(torch.full((len(others),), TOKENS[0]))
    torch.testing.assert_close(first[1], steps[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[1], steps[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[0], vlm.logits(others[0]), atol=1e-5, rtol=1e-5)
    for place in (2, 3, 4):
        torch.testing.assert_close(first[place], dense_of(family, place, others[place]), atol=1e-5, rtol=1e-5)
    assert torch.equal(rows[1].origin, row.origin)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl"])
@torch.inference_mode()
def test_reductions_follow_each_other(family):
    vlm = tiny(family)
    recipe = "visionzip(keep=0.6) + fastv(keep=0.5, layer=1) + pyramiddrop(keep=0.1, layers=[2, 3])"
    request = Request("what?", picture(4, 50, 80), reduce=recipe)
    sizes = vlm.adapter.layout(vlm.plan(request.to_messages())).features().sizes()
    (row,) = rows_of(vlm, [request])
    open_batch(vlm.adapter, [row], vlm.new_cache(), Clock(vlm.device)).prefill()
    assert row.per_layer == tokens_per_layer(vlm.reducers(recipe), sizes, vlm.adapter.shape)
    assert len(set(row.per_layer)) >= 3 and row.per_layer[0] < sum(map(sum, sizes))


def _hooks(vlm):
    """How many hooks the modules have; a cache method leaves one without state on each attention module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_methods_in_two_threads_do_not_meet(family):
    vlm = tiny(family)
    requests = [
        Request("what?", picture(5), reduce=text) for text in ("fastv(keep=0.3)", "pyramiddrop(keep=0.2)", None)
    ]
    expected = [vlm.respond(request, 3) for request in requests]
    hooks = _hooks(vlm)
    found: list[list] = [[] for _ in requests]

    def work(index):
        found[index] += [vlm.respond(requests[index], 3) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[(a.ids, a.kept) for a in answers] for answers in found] == [[(a.ids, a.kept)] * 3 for a in expected]
    assert _hooks(vlm) == hooks
