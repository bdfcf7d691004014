"""Tokens that leave inside the language model: signals, caches, positions and batches against plain oracles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import foveate
from foveate.adapters.shape import Shape
from foveate.errors import RecipeError
from foveate.reduce.base import Reducer, Reduction, layer_index, tokens_per_layer, top_k
from foveate.reduce.fastv import FastV
from foveate.reduce.uniform import Uniform
from foveate.vlm import Request
from goldens_io import goldens_dir
from reduce_oracle import decoded, masked, rows_of

RNG = np.random.default_rng(4)
PICTURE, OTHER = (RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@dataclass(frozen=True)
class Staged(Reducer):
    """Half of what is left at each of two layers, by the attention of the layer before."""

    layers: tuple[int, ...] = (1, 2)
    closing: bool = False

    name: ClassVar[str] = "staged"

    def select(self, signals, layout):
        keep = top_k(signals["last_attention"].mean(0), self.count(len(layout)))
        return Reduction(keep)

    def steps(self, shape):
        position = "renumber" if self.closing else "keep"
        return tuple(
            self.step("llm", self.select, layer=k, signals=("last_attention",), scope="request", position=position)
            for k in self.layers
        )


@pytest.mark.parametrize("closing", [False, True])
@torch.inference_mode()
def test_decoding_with_ragged_caches_equals_a_masked_prompt_without_one(tiny, closing):
    """Rows of unequal length, method, layer and budget in one batch, five tokens on."""
    requests = [
        Request("what?", PICTURE, reduce=Staged(keep=0.5, closing=closing)),
        Request("and what is this, then?", OTHER, reduce=Staged(keep=7, layers=(2,), closing=closing)),
        Request("who are you?"),
        Request("what?", [PICTURE, OTHER], reduce=Staged(keep=0.3, layers=(1,), closing=closing)),
        Request("what?", PICTURE, reduce=None),
    ]
    tokens = torch.randint(3, 200, (5, len(requests)), generator=torch.Generator().manual_seed(0))
    batch, logits = decoded(tiny, requests, tokens)
    assert [stage.first for stage in batch.stages] == [0, 1, 2]
    lengths = [layer.get_seq_length() for layer in batch.cache.layers]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[0]
    for b, request in enumerate(requests):
        stages = [(stage.first, stage.origin[b]) for stage in batch.stages]
        stages = [s for i, s in enumerate(stages) if not i or len(s[1]) < len(stages[i - 1][1])]
        for step, found in enumerate(logits):
            expected = masked(tiny, request, stages, closing, tokens[:step, b].tolist())
            torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["fastv(keep=0.5)", "uniform(keep=0.5) + fastv(keep=4, layer=2)"])
def test_rows_of_a_batch_equal_the_requests_alone(tiny, reduce):
    requests = [
        Request("what?", PICTURE, reduce=reduce),
        Request("what is all of this?", [OTHER, PICTURE], reduce="fastv(keep=0.2, layer=1)"),
        Request("who?", OTHER, reduce="fastervlm(keep=0.5)"),
        Request("who?"),
    ]
    for together, request in zip(tiny.answer(requests, 5), requests):
        alone = tiny.respond(request, 5)
        assert (together.ids, together.tokens, together.kept) == (alone.ids, alone.tokens, alone.kept)


def test_keeping_all_runs_the_layers_as_the_model_does(tiny):
    for media in (PICTURE, [PICTURE, OTHER]):
        dense = tiny.logits(Request("what?", media))
        assert torch.equal(tiny.logits(Request("what?", media, reduce="fastv(keep=1.0)")), dense)


@torch.inference_mode()
def test_each_layer_sees_as_many_tokens_as_are_counted_beforehand(tiny):
    for reduce in ("fastv(keep=0.3, layer=2)", "uniform(keep=0.5) + fastv(keep=5, layer=1)", Staged(keep=0.4)):
        request = Request("what?", [PICTURE, OTHER], reduce=reduce)
        sizes = tiny.adapter.layout(tiny.plan(request.to_messages())).features().sizes()
        batch, _ = decoded(tiny, [request], [])
        expected = tokens_per_layer(tiny.reducers(reduce), sizes, tiny.adapter.shape)
        assert batch.rows[0].per_layer == expected
        text = batch.rows[0].text
        assert [layer.get_seq_length() - text for layer in batch.cache.layers] == expected
        answer = tiny.respond(request, 2)
        assert answer.tokens["kept"] == len(answer.kept) == expected[-1]


def test_fastv_keeps_what_the_last_token_attends_to(tiny):
    """Against the eager attention of the layer before, read from transformers itself."""
    eager = foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu", attn="eager")
    (row,) = rows_of(eager, [Request("what?", PICTURE)])
    prompt = eager.adapter.embed(row.input_ids[None], row.features)
    with torch.inference_mode():
        attention = eager.model.llm(**prompt, output_attentions=True).attentions[0][0, :, -1]
    best = attention.mean(0)[row.where].topk(9).indices.sort().values
    for model in (eager, tiny):
        assert model.respond(Request("what?", PICTURE, reduce="fastv(keep=9, layer=1)"), 1).kept == best.tolist()


def test_a_cache_method_and_a_shrinking_batch_go_with_it(tiny):
    small = foveate.Recipe.parse("fastv(keep=0.5) + int8").apply(tiny, quiet=True)
    requests = [Request("what?" * i, PICTURE) for i in (1, 3, 2)]
    stop = small.respond(requests[1], 3).ids[1]
    small._stop = [stop]
    together = small.answer(requests, 6)
    assert [a.ids for a in together] == [small.respond(r, 6).ids for r in requests]
    assert len({len(a.ids) for a in together}) > 1


def test_layers_are_indices_or_fractions():
    assert [layer_index(v, 32, "m") for v in (2, 0.25, 2 / 32, 0.99)] == [2, 8, 2, 31]
    assert layer_index(2 / 32, 4, "m") == 1
    for wrong in (0, 32, -1, 1.0, 0.0):
        with pytest.raises(RecipeError, match="m: layer is"):
            layer_index(wrong, 32, "m")


def test_tokens_per_layer_of_views_pictures_and_requests():
    shape = Shape(blocks=3, layers=4)
    groups = ((9, 9), (7,))
    assert tokens_per_layer((), groups, shape) == [25] * 4
    assert tokens_per_layer((FastV(keep=0.5, layer=2),), groups, shape) == [25, 25, 12, 12]
    assert tokens_per_layer((Uniform(keep=0.5), FastV(keep=0.5, layer=3)), groups, shape) == [13, 13, 13, 6]


@torch.inference_mode()
def test_separators_stay_or_go_as_the_method_says(tiny):
    (row,) = rows_of(tiny, [Request("what?", [PICTURE, OTHER])])
    breaks = len(row.breaks)
    assert breaks == 2
    for policy, left in (("keep", 2), ("drop", 0), ("row", 1)):
        (row,) = rows_of(tiny, [Request("what?", [PICTURE, OTHER])])
        first = (row.layout.media == 0).nonzero().flatten()
        step = Staged(keep=0.5).step("post_projector", None, newline=policy)
        row.cut(Reduction(first[:3]), step)
        assert (len(row.breaks), row.kept, len(row.features)) == (left, 3, 3)
        (row,) = rows_of(tiny, [Request("what?", [PICTURE, OTHER])])
        row.cut(Reduction(torch.arange(row.kept)), step)
        assert len(row.breaks) == 2
