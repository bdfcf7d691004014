"""Tokens that leave inside the language model: signals, caches, positions and batches against plain oracles."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import foveate
from foveate.adapters.decoder import check_layers, project
from foveate.adapters.shape import Shape
from foveate.errors import RecipeError, UnsupportedError
from foveate.reduce import dominance, schedule
from foveate.reduce.adatoken3d import AdaToken3D, calibrate, contributions, falls
from foveate.reduce.base import Reducer, Reduction, layer_index, tokens_per_layer, top_k
from foveate.reduce.fastervlm import FasterVLM
from foveate.reduce.fastv import FastV
from foveate.reduce.pyramiddrop import PyramidDrop
from foveate.reduce.sparsevlm import SparseVLM
from foveate.reduce.uniform import Uniform
from foveate.reduce.yopo import YOPO, head_votes, neighbours
from foveate.vlm import Request
from goldens_io import goldens_dir
from layouts import make, single
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


def test_a_method_is_the_same_attached_asked_for_and_in_a_recipe(tiny):
    method = FastV(keep=0.25, layer=2)
    expected = tiny.ask(PICTURE, "what?", reduce="fastv(keep=0.25, layer=2)", max_new_tokens=3)
    with method.attach(tiny), Uniform(keep=0.5).attach(tiny), pytest.raises(RecipeError, match="write uniform first"):
        tiny.ask(PICTURE, "what?")
    with method.attach(tiny):
        attached = tiny.ask(PICTURE, "what?", max_new_tokens=3)
    small = foveate.Recipe.parse("fastv(keep=0.25, layer=2)").apply(tiny, quiet=True)
    asked = tiny.ask(PICTURE, "what?", reduce=small.recipe, max_new_tokens=3)
    for answer in (attached, asked, small.ask(PICTURE, "what?", max_new_tokens=3)):
        assert (answer.ids, answer.kept, answer.tokens) == (expected.ids, expected.kept, expected.tokens)
    assert tiny.ask(PICTURE, "what?", max_new_tokens=3).kept is None


def test_keeping_all_runs_the_layers_as_the_model_does(tiny):
    for media in (PICTURE, [PICTURE, OTHER]):
        dense = tiny.logits(Request("what?", media))
        assert torch.equal(tiny.logits(Request("what?", media, reduce="fastv(keep=1.0)")), dense)


@torch.inference_mode()
def test_each_layer_sees_as_many_tokens_as_are_counted_beforehand(tiny):
    for reduce in (
        "random(keep=0.3, layer=0.5)",
        "fastv(keep=0.3, layer=2)",
        "uniform(keep=0.5) + fastv(keep=5, layer=1)",
        Staged(keep=0.4),
    ):
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
        attention = eager.model.llm(**prompt, output_attentions=True).attentions[0][0].mean(0)
    last, received = attention[-1, row.where], attention[row.where[0] :, row.where].mean(0)
    for score, strict in ((last, "code"), (received, "paper")):
        best = score.topk(9).indices.sort().values.tolist()
        for model in (eager, tiny):
            reduce = FastV(keep=9, layer=1, strict=strict)
            assert model.respond(Request("what?", PICTURE, reduce=reduce), 1).kept == best


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
    assert layer_index(2 / 32, 4, "m") == 1 and layer_index(0.3, 5, "m") == 2
    for wrong in (0, 32, -1, 1.0, 0.0):
        with pytest.raises(RecipeError, match="m: layer is"):
            layer_index(wrong, 32, "m")


def test_tokens_per_layer_of_views_pictures_and_requests():
    shape = Shape(blocks=3, layers=4)
    groups = ((9, 9), (7,))
    assert tokens_per_layer((), groups, shape) == [25] * 4
    assert tokens_per_layer((FastV(keep=0.5, layer=2),), groups, shape) == [25, 25, 12, 12]
    assert tokens_per_layer((Uniform(keep=0.5), FastV(keep=0.5, layer=3)), groups, shape) == [13, 13, 13, 6]
    # of 4 tokens that views of 2 and 5 share one is the first's, and halves of 1 and 3 are 1 and 2
    assert tokens_per_layer((Uniform(keep=0.5), FasterVLM(keep=0.5)), ((2, 5),), shape) == [1 + 2] * 4


def test_of_stages_that_fall_on_one_layer_the_last_holds():
    (step,) = PyramidDrop(keep=0.125).steps(Shape(blocks=1, layers=2))
    assert step.layer == 1 and step.count(64, 64) == 8


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


# ---- steps while decoding, and layers that compute less


@dataclass(frozen=True)
class Glance(Reducer):
    """From layer 1 on, an answer's token sees only the visual tokens that layer 0 attends to most."""

    name: ClassVar[str] = "glance"

    def select(self, signals, layout):
        assert int(signals["length"]) > len(layout)
        return Reduction(top_k(signals["last_attention"].mean(0), self.count(len(layout))))

    def steps(self, shape):
        return (self.step("cache", self.select, layer=1, signals=("last_attention", "length")),)

    def count(self, n):
        return max(1, n // 4)


@torch.inference_mode()
def test_a_decoding_step_may_look_at_a_part_of_the_cache(tiny):
    """Against the layers run over the whole sequence at once, with the unseen keys masked for the last token only."""
    seen = []

    class Noted(Glance):
        def select(self, signals, layout):
            seen.append(super().select(signals, layout).keep)
            return Reduction(seen[-1])

    requests = [Request("and you?", [PICTURE, OTHER]), Request("what?", PICTURE, reduce=Noted(keep=0.5))]
    token = torch.tensor([70, 65])
    batch, logits = decoded(tiny, requests, [token])
    dense_batch, dense = decoded(tiny, [Request(r.text, r.media) for r in requests], [token])
    torch.testing.assert_close(logits[0], dense[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1][0], dense[1][0], atol=1e-5, rtol=1e-5)
    assert len(seen) == 1 and not torch.allclose(logits[1][1], dense[1][1], atol=1e-3)
    assert batch.cache.layers[2].get_seq_length() == dense_batch.cache.layers[2].get_seq_length()
    adapter = tiny.adapter
    (row,) = rows_of(tiny, [Request("what?", PICTURE)])
    hidden = adapter.embed(torch.cat([row.input_ids, token[1:]])[None], row.features)["inputs_embeds"]
    n = hidden.shape[1]
    rotary = adapter.text_model.rotary_emb(hidden, torch.arange(n)[None])
    for index, layer in enumerate(adapter.layers):
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        if index >= 1:
            allowed[-1, row.where] = False
            allowed[-1, row.where[seen[0]]] = True
        hidden = layer(hidden, attention_mask=allowed[None, None], position_embeddings=rotary)
    torch.testing.assert_close(logits[1][1], adapter.head(hidden[:, -1])[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_yopo_equals_eager_attention_with_the_rules_written_out(tiny):
    reduce = YOPO(keep=0.5, window=3, cut=2, dropped=(4 + 1,))
    heads, layers = tiny.adapter.text_config.num_attention_heads, tiny.adapter.layers
    assert (heads, len(layers)) == (4, 3)  # head 1 of layer 1 is dropped
    requests = [Request("what is it?", PICTURE, reduce=reduce), Request("who?" * 9), Request("what is it?", PICTURE)]
    token = torch.tensor([70, 65, 71])
    _, logits = decoded(tiny, requests, [token])
    dense, alone = tiny.logits(requests[2]), tiny.logits(requests[1])
    torch.testing.assert_close(logits[0][2], dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0][1], alone, atol=1e-5, rtol=1e-5)
    (row,) = rows_of(tiny, [requests[0]])
    for count in (0, 1):
        ids = torch.cat([row.input_ids, token[:count]])
        expected = by_the_rules(tiny.adapter, row, ids, reduce)
        torch.testing.assert_close(logits[count][0], expected, atol=1e-5, rtol=1e-5)
    off = tiny.logits(Request("what is it?", PICTURE, reduce="yopo(keep=1.0)"))
    assert torch.equal(off, dense)


def by_the_rules(adapter, row, ids, method):
    hidden = adapter.embed(ids[None], row.features)["inputs_embeds"][0]
    n, where = len(ids), row.where
    cos, sin = (part[0] for part in adapter.text_model.rotary_emb(hidden[None], torch.arange(n)[None]))
    near = neighbours(row.layout, method.window)
    allowed = torch.ones(n, n, dtype=torch.bool).tril()
    allowed[where[:, None], where] = near
    for index, layer in enumerate(adapter.layers):
        q, k, v = (project(layer, kind, hidden, (cos, sin) if kind != "v" else None) for kind in "qkv")
        out = []
        for head in range(len(q)):
            own = head // (len(q) // len(k))
            weights = (q[head] @ k[own].T * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
            dropped = index * 4 + head in method.dropped
            if dropped or index >= method.cut:
                weights[:, where] = 0
            part = weights @ v[own]
            if dropped:
                part[where] = 0
            out.append(part)
        hidden = hidden + layer.self_attn.o_proj(torch.cat(out, dim=-1))
        normed = layer.post_attention_layernorm(hidden)
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
        inner[where, inner.shape[1] // 2 :] = 0
        hidden = hidden + layer.mlp.down_proj(inner)
    return adapter.head(hidden[-1])


# ---- measures and schedules


def eager_maps(request, new=0):
    """The request's row, an answer of at most `new` tokens, and the attention [1, H, L, L] of each layer over both."""
    eager = foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu", attn="eager")
    ids = eager.respond(request, new).ids if new else []
    answer = [token for token in ids if token not in eager.adapter.placeholders]
    (row,) = rows_of(eager, [request])
    with torch.inference_mode():
        whole = torch.cat([row.input_ids, torch.tensor(answer, dtype=torch.int64)])
        prompt = eager.adapter.embed(whole[None], row.features)
        return row, answer, eager.model.llm(**prompt, output_attentions=True).attentions


def test_dominance_is_what_eager_attention_says(tiny):
    request = Request("what?", PICTURE)
    row, answer, maps = eager_maps(request, 4)
    found = dominance.dominance(tiny, request, 4)
    assert [layer.layer for layer in found] == list(range(len(maps))) == [0, 1, 2]
    for layer, attention in zip(found, maps):
        rows = attention[0, :, -len(answer) :]
        to_visual = float(rows[..., row.where].sum(-1).mean())
        n, total = len(row.where), len(row) + len(answer)
        assert (layer.visual, layer.text) == (n, total - n)
        mdi = ((1 - to_visual) / (total - n)) / (to_visual / n)
        assert layer.mdi == pytest.approx(mdi, rel=1e-4)
        assert layer.aei_text / layer.aei_visual == pytest.approx(mdi, rel=1e-4)
        assert layer.aei_visual == pytest.approx(to_visual / (n / total), rel=1e-4)
    fewer = dominance.dominance(tiny, Request("what?", PICTURE, reduce="fastv(keep=0.25, layer=2)"), 4)
    assert [layer.visual for layer in fewer] == [48, 48, 12]
    layers = [dominance.Dominance(i, 10 * i, 5, float(i), 1.0, 1.0) for i in range(7)]
    means = {name: (part.layer, part.text, part.mdi) for name, part in dominance.stages(layers).items()}
    assert means == {"early": (0, 5, 0.5), "middle": (2, 30, 3.0), "late": (5, 55, 5.5)}


def test_masses_are_what_eager_attention_says(tiny):
    request = Request("what is it?", PICTURE)
    row, _, maps = eager_maps(request)
    found, ratios = dominance.masses(tiny, request), dominance.head_ratios(tiny, request)
    for layer, (attention,) in enumerate(maps):
        to_visual = attention[..., row.where].sum(-1)  # [H, L]
        inside, text = to_visual[:, row.where].mean(), to_visual[:, row.text_after()].mean(dim=1)
        torch.testing.assert_close(found[layer], torch.stack([inside, 1 - inside, text.mean()]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ratios[layer], text / (1 - text), rtol=1e-4, atol=1e-5)


def test_contributions_weigh_both_directions_and_remember_earlier_layers():
    inside, to_text, from_text = [0.5, 0.25, 0.1], [0.2, 0.4, 0.6], [0.3, 0.1, 0.7]
    totals, memory = [], 0.0
    for layer, (own, out, back) in enumerate(zip(inside, to_text, from_text)):
        memory += own if layer == 0 else 0.73 * own
        totals.append(0.4 * own + 0.3 * (0.7 * out + 0.3 * back) + 0.3 * memory)
    expected = [(total - min(totals)) / (max(totals) - min(totals)) for total in totals]
    found = contributions(*map(torch.tensor, (inside, to_text, from_text)))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert contributions(torch.zeros(3), torch.ones(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_stages_of_pyramiddrop_are_truncated_fractions_of_what_entered():
    halving = PyramidDrop(keep=0.125)
    assert [[halving.left(stage, n) for stage in range(3)] for n in (576, 10, 3)] == [
        [288, 144, 72],
        [5, 2, 1],
        [1, 1, 1],
    ]
    assert PyramidDrop(keep=0.729).left(1, 1000) == 810  # though the root is a hair too small
    assert [PyramidDrop(keep=7).left(2, n) for n in (576, 7, 3)] == [7, 7, 3]
    given = PyramidDrop(keep=0.5, ratios=(0.5, 0.5, 0.1))
    assert [given.left(stage, 9) for stage in range(3)] == [4, 4, 1]


def test_stages_follow_the_fall():
    method = AdaToken3D(keep=0.25, layers=(1, 2, 3), fall=(0.5, 0.5, 1.0))
    assert [method.left(stage, 64) for stage in range(3)] == [32, 32, 16]
    assert falls(torch.tensor([1.0, 0.8, 0.7, 0.8, 0.0, 0.2]), [2, 3, 4]) == pytest.approx((0.25, 0.25, 1.0))


def test_calibration_finds_falls_and_heads(tiny):
    requests = [Request("what?", PICTURE), Request("who is there?", [OTHER, PICTURE])]
    method = calibrate(tiny, requests, keep=0.25, layers=(1, 2))
    assert method.fall[-1] == 1.0 and list(method.fall) == sorted(method.fall)
    assert tiny.respond(Request("what?", PICTURE, reduce=method), 2).tokens["kept"] == 12
    assert falls(torch.tensor([1.0, 0.75, 0.5, 0.0]), [1, 2]) == (pytest.approx(1 / 3), 1.0)
    for rising in ([0.0, 0.5, 1.0], [0.5, 0.5, 0.5]):
        assert falls(torch.tensor(rising), [1, 2]) == (0.5, 1.0)
    ratios = torch.stack([dominance.head_ratios(tiny, request) for request in requests])
    assert ratios.shape == (2, 3, 4) and bool((ratios > 0).all())
    votes = head_votes(ratios, float(ratios[:, 2].max()))
    assert bool(votes[:2].all()) and not bool(votes[2].all())


@pytest.mark.parametrize("steepness", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.9])
def test_a_sigmoid_meets_its_budget_and_never_rises(keep, steepness):
    counts = schedule.sigmoid_counts(576, 32, keep, steepness)
    assert counts[0] == 576 and list(counts) == sorted(counts, reverse=True)
    assert abs(sum(counts) / 32 - keep * 576) <= 1


def test_g_search_finds_the_least_of_every_layer():
    needed = [50, 31, 31, 12, 3, 0]

    def quality(counts):
        return float(all(have >= want for have, want in zip(counts, needed)))

    assert schedule.g_search(quality, 6, 50, 1.0) == needed
    tried = []

    def near_nine(method):
        tried.append(abs(method.steepness - 9.0))
        return -tried[-1]

    best = schedule.steepest(near_nine, keep=0.3, tries=14)
    assert abs(best.steepness - 9.0) == min(tried) < 4 and best.keep == 0.3 and len(tried) == 14


def test_a_schedule_keeps_what_all_heads_together_attend_to():
    layout, attention = make(single(1, 4)), torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.0, 0.0, 0.8, 0.0]])
    method = schedule.Schedule(keep=0.75)
    signals = {"mean_text_attention": attention, "entered": torch.tensor(4)}
    assert method.select(signals, layout, layer=1, layers=2).keep.tolist() == [0, 2]
    assert sum(schedule.Schedule(keep=24).counts(48, 3)) == pytest.approx(3 * 24, abs=3)


def test_the_quality_of_a_schedule_overlooks_case_and_blanks():
    answering = SimpleNamespace(answer=lambda asked, new: [SimpleNamespace(text=" Red\n") for _ in asked])
    quality = schedule.quality_on(answering, [Request("what?")] * 2, [["RED ", "x"], ["blue"]])
    assert quality(schedule.Schedule(keep=1.0)) == 0.5


def test_sparsevlm_scales_its_tables_to_other_budgets_and_numbers_of_tokens():
    for keep, total in ((32, 288), (64 / 576, 288), (32, 576), (32 / 576, 576)):
        assert [SparseVLM(keep=keep).target(stage, total) for stage in range(3)] == [33, 15, 9]


@torch.inference_mode()
def test_found_rates_are_what_the_layers_see(tiny):
    request = Request("what?", PICTURE, reduce="schedule(keep=1.0, rates=[0.5, 0.5, 0.25])")
    batch, _ = decoded(tiny, [request], [])
    assert batch.rows[0].per_layer == [48, 24, 12]
    assert list(schedule.Schedule(keep=1.0, rates=(1.0, 0.5, 0.5)).counts(5, 3)) == [5, 3, 3]  # halves are rounded up


def test_the_searches_run_on_a_model(tiny):
    requests = [Request("what?", PICTURE), Request("who is it?", OTHER)]
    accepted = [[answer.text] for answer in tiny.answer(requests, 3)]
    quality = schedule.quality_on(tiny, requests, accepted, 3)
    assert quality(schedule.Schedule(keep=1.0)) == 1.0
    counts = schedule.g_search(lambda counts: quality(schedule.as_schedule(counts)), 3, 48, 0.5)
    assert quality(schedule.as_schedule(counts)) >= 0.5
    assert counts[0] == 48 and counts == sorted(counts, reverse=True)
    assert schedule.as_schedule(counts).counts(48, 3) == [max(1, count) for count in counts]


@pytest.mark.parametrize(
    "recipe",
    [
        "pyramiddrop(keep=0.5, layers=[])",
        "pyramiddrop(keep=0.5, ratios=[0.5, 0.6, 0.1])",
        "sparsevlm(keep=0.5, layers=[1, 2])",
        "visiondrop(keep=0.5, layers=[1, 2])",
        "visiondrop(keep=0.5, layers=[1, 2], schedule=[4, 1])",
        "adatoken3d(keep=0.5, fall=[0.5, 0.2, 1.0])",
        "schedule(keep=0.5, steepness=0.0)",
        "schedule(keep=0.5, rates=[0.5, 0.7])",
        "yopo(keep=2)",
        "yopo(keep=0.5, window=4)",
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(recipe):
    with pytest.raises(RecipeError, match=f": {recipe.partition('(')[0]}: "):
        foveate.Recipe.parse(recipe)


def test_layers_that_a_model_does_not_have_are_refused(tiny):
    for recipe in ("fastv(keep=0.5, layer=3)", "yopo(keep=0.5, cut=9)", "yopo(keep=0.5, dropped=[12])"):
        with pytest.raises(RecipeError, match="this model has 3 layers"):
            foveate.Recipe.parse(recipe).check(tiny)


def test_layers_that_tokens_cannot_leave_are_refused(tiny):
    layers = tiny.adapter.layers
    check_layers(layers, SimpleNamespace(sliding_window=None), "m")
    for config in (
        SimpleNamespace(layer_types=["full_attention", "sliding_attention"]),
        SimpleNamespace(layer_types=None, sliding_window=512),
    ):
        with pytest.raises(UnsupportedError, match="full attention in every layer; this one has sliding_attention"):
            check_layers(layers, config, "m")
    with pytest.raises(UnsupportedError, match="whose layers have no input_layernorm"):
        check_layers(torch.nn.ModuleList([torch.nn.Identity()]), SimpleNamespace(), "m")
