"""Packing: every sample and every branch sees what it would see alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from foveate.data.execute import execute
from foveate.data.plan import plan
from foveate.data.sample import VideoSource
from foveate.train.batch import MicroBatch
from foveate.train.packing import Tokens, first_fit, pack
from foveate.train.step import run_model
from train_tiny import batch_of, noise_sample, tiny_model, tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


@torch.no_grad()
def supervised(model, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits at the supervised positions, targets) of a micro-batch."""
    output = run_model(model, batch, train_tower=False)
    return output.head(output.hidden), batch.targets


@torch.no_grad()
def alone(model, sample, branch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one branch of one sample through the model's own forward, unpacked."""
    made = plan(sample.messages(branch), model.spec, tokenizer())
    logits = model(**execute(made).model_kwargs()).logits[0]
    labels = torch.from_numpy(made.labels)
    where = (labels[1:] >= 0).nonzero().squeeze(1)
    return logits[where], labels[1:][where]


def matched(packed, wanted):
    """Pairs of packed and lone logits of one answer, found by its unique target ids."""
    logits, targets = packed
    for lone_logits, lone_targets in wanted:
        n = len(lone_targets)
        at = [i for i in range(len(targets) - n + 1) if torch.equal(targets[i : i + n], lone_targets)]
        assert len(at) == 1
        yield logits[at[0] : at[0] + n], lone_logits


@pytest.mark.parametrize("max_length", [512, 140])
def test_packed_branches_have_the_logits_of_each_alone(model, max_length) -> None:
    samples = [noise_sample(1, 3), noise_sample(2, 1, sides=(64, 200)), noise_sample(3, 2, pictures=2)]
    clip = noise_sample(4, 2)
    frames = np.random.default_rng(9).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    samples.append(dataclasses.replace(clip, media=[VideoSource(frames, "clip")]))
    batch = batch_of(model, samples, max_length=max_length)
    assert len(batch.input_ids) == (1 if max_length == 512 else 3)
    wanted = [alone(model, s, b) for s in samples for b in range(len(s.branches))]
    assert sum(len(t) for _, t in wanted) == len(batch.targets)
    for packed, lone in matched(supervised(model, batch), wanted):
        torch.testing.assert_close(packed, lone, atol=2e-5, rtol=0)


def test_nothing_leaks_between_samples_or_branches(model) -> None:
    first, second = noise_sample(1, 2), noise_sample(2, 2)
    logits, targets = supervised(model, batch_of(model, [first, second]))
    other = dataclasses.replace(second, media=noise_sample(7).media)
    changed, _ = supervised(model, batch_of(model, [first, other]))
    middle = len(targets) // 2
    assert torch.equal(logits[:middle], changed[:middle])
    assert not torch.allclose(logits[middle:], changed[middle:], atol=1e-3)
    longer = dataclasses.replace(first, branches=[first.branches[0], [("read mark 1? red", "red 99")]])
    changed, _ = supervised(model, batch_of(model, [longer, second]))
    n = len(alone(model, first, 0)[1])
    assert torch.equal(logits[:n], changed[:n])


def test_a_whole_dialogue_without_a_shared_prefix_is_one_branch(model) -> None:
    turns = [
        {"role": "system", "content": "read"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "see "}, {"type": "image", "image": noise_sample(5).media[0]}],
        },
        {"role": "assistant", "content": "blue 77"},
    ]
    sample = dataclasses.replace(noise_sample(5, 1), turns=turns)
    packed = supervised(model, batch_of(model, [sample, noise_sample(6, 1)]))
    for got, lone in matched(packed, [alone(model, sample, 0)]):
        torch.testing.assert_close(got, lone, atol=2e-5, rtol=0)


def test_first_fit_fills_rows_and_keeps_every_sample() -> None:
    rows = first_fit([3, 9, 5, 5, 1], 10)
    assert rows == [[1, 4], [2, 3], [0]]


def test_first_token_of_a_branch_is_predicted_from_the_prefix() -> None:
    one = Tokens(np.array([7, 8]), [(np.array([1, 2]), np.array([1, 2])), (np.array([3]), np.array([3]))])
    packed = pack([one], 100, pad_id=0)
    assert packed.target_index.tolist() == [1, 2, 1]
    assert packed.targets.tolist() == [1, 2, 3]
    assert packed.position_ids[0, :5].tolist() == [0, 1, 2, 3, 2]
    assert packed.input_ids.shape == (1, 16)


def test_padding_attends_to_itself_only() -> None:
    packed = pack([Tokens(np.array([7]), [(np.array([1]), np.array([1]))])], 100, pad_id=0)
    assert packed.allowed[0, 2:].sum(axis=1).tolist() == [1] * 14 and packed.allowed[0].diagonal().all()
