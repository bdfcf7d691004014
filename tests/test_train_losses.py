"""Losses: exact means, the time-token loss of NVILA, and labels of patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate.data.sample import Box
from foveate.data.tiling import View
from foveate.errors import RecipeError
from foveate.train import losses as losses_module
from foveate.train.config import LOSSES
from foveate.train.dense import IGNORE, rasterise
from foveate.train.losses import StepOutput, soft_ce_sum
from foveate.train.step import accumulate_gradients, make_losses
from foveate.world.vocabulary import COLOURS, SHAPES
from goldens_io import goldens_dir, read_npz
from train_tiny import batch_of, noise_sample, tiny_model, tokenizer

SOFT_CE = goldens_dir("nvila") / "units" / "soft_ce.npz"


@pytest.mark.skipif(not SOFT_CE.is_file(), reason="no golden soft_ce.npz")
def test_golden_nvila_soft_ce() -> None:
    gold = read_npz(SOFT_CE)
    cases = sorted({key.rpartition(".")[0] for key in gold})
    assert cases
    for case in cases:
        logits = torch.from_numpy(gold[f"{case}.logits"])[:, :-1].flatten(0, 1)
        labels = torch.from_numpy(gold[f"{case}.labels"])[:, 1:].flatten()
        active = labels != -100
        soft_tokens = torch.from_numpy(gold[f"{case}.soft_tokens"])
        total = soft_ce_sum(logits[active], labels[active], soft_tokens, float(case.removeprefix("std")))
        assert float(total / active.sum()) == pytest.approx(float(gold[f"{case}.loss"]), abs=1e-5)


def gradients(model, weights: dict[str, float], batches) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.zero_grad()
    heads = torch.nn.ModuleDict()
    torch.manual_seed(0)
    values = accumulate_gradients(model, make_losses(weights, model, tokenizer(), heads), batches, "float32")
    grads = {n: p.grad.clone() for n, p in [*model.named_parameters(), *heads.named_parameters()] if p.grad is not None}
    return values, grads


def test_accumulated_loss_is_the_mean_over_all_tokens_of_the_step() -> None:
    model = tiny_model()
    few, many = noise_sample(1, 1), noise_sample(2, 6)
    whole, whole_grads = gradients(model, {"lm": 1.0}, [batch_of(model, [few, many])])
    split, split_grads = gradients(model, {"lm": 1.0}, [batch_of(model, [few]), batch_of(model, [many])])
    assert split["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert whole_grads.keys() == split_grads.keys()
    for name, grad in whole_grads.items():
        torch.testing.assert_close(split_grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    means = [gradients(model, {"lm": 1.0}, [batch_of(model, [s])])[0]["loss"] for s in (few, many)]
    assert abs(sum(means) / 2 - whole["loss"]) > 1e-3, "the samples must tell a mean of means from the true mean"


def test_large_logits_are_made_in_pieces_with_the_same_gradient(monkeypatch) -> None:
    model = tiny_model()
    batch = batch_of(model, [noise_sample(1, 4)])
    whole, grads = gradients(model, {"lm": 1.0}, [batch])
    monkeypatch.setattr(losses_module, "CHUNK_ELEMENTS", 3 * len(tokenizer()))
    pieces, pieces_grads = gradients(model, {"lm": 1.0}, [batch])
    assert pieces["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    torch.testing.assert_close(pieces_grads["llm.lm_head.weight"], grads["llm.lm_head.weight"])


def test_dense_loss_is_weighted_cross_entropy_per_channel() -> None:
    torch.manual_seed(0)
    loss = LOSSES.get("dense")(8, 2, None)
    head = loss.make_head()
    labels = torch.tensor([[[0, 1, 0, 0, 0], [2, 0, IGNORE, 0, 0], [0, 0, 3, 1, 0], [1, 1, 0, 0, 0]]])
    batch = type("B", (), {"dense": labels})()
    features = torch.randn(1, 4, 8)
    means = loss.sums(StepOutput(features), batch, head) / loss.totals(batch)
    logits = head(features)[0]
    weight = torch.tensor([0.15] + [1.0] * len(SHAPES))
    assert means[0].item() == pytest.approx(F.cross_entropy(logits[:, :7], labels[0, :, 0], weight).item(), rel=1e-5)
    weight = torch.tensor([0.05] + [1.0] * 10)
    expected = F.cross_entropy(logits[:, 14:25], labels[0, :, 2], weight, ignore_index=IGNORE)
    assert means[2].item() == pytest.approx(expected.item(), rel=1e-5)
    rows = F.cross_entropy(logits[:, -4:-2], torch.tensor([0, 0, 1, 1]))
    assert means[5].item() == pytest.approx(rows.item(), rel=1e-5)


def test_time_tokens_are_asked_for_by_name() -> None:
    with pytest.raises(RecipeError, match="<t0>"):
        LOSSES.get("soft_ce")(8, 2, tokenizer())


def test_rasterise_puts_each_object_where_its_view_shows_it() -> None:
    ring = Box(0, 0, 32, 16, shape="ring", colour="blue")
    views = [View((0, 0, 128, 128)), View((0, 0, 64, 64)), View((64, 64, 128, 128))]
    labels = rasterise([ring], views, side=8, tile_size=64)
    shape, colour = SHAPES.index("ring") + 1, COLOURS.index("blue") + 1
    assert labels[0, :1, :2, 0].tolist() == [[shape, shape]] and (labels[0, ..., 0] > 0).sum() == 2
    assert (labels[1, :2, :4, 1] == colour).all() and (labels[1, ..., 1] > 0).sum() == 8
    assert not labels[2].any()


def test_rasterise_lists_characters_in_reading_order_and_ignores_unreadable_ones() -> None:
    word = [Box(4 + 6 * k, 8, 9 + 6 * k, 18, chars=c) for k, c in enumerate("70")]
    near, far = rasterise(word, [View((0, 0, 64, 64)), View((0, 0, 256, 256))], side=4, tile_size=64)
    assert near[0, 0, 2:].tolist() == [8, 1, 0]
    assert (far[0, 0, 2:] == IGNORE).all() and not far[1:, :, 2:].any()
    assert np.array_equal(near[..., :2], np.zeros((4, 4, 2)))
