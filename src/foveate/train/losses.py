"""Losses of a stage, by registered name. Each returns sums and their normalisers, so that a step's mean is exact.

A loss has one or more terms. `totals` says what a term's sum is to be divided by, counted before anything is computed
and summed over all micro-batches of a step; dividing each micro-batch's sum by that total gives the gradient of the
true mean over the step, which a mean of means would not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foveate.errors import RecipeError
from foveate.train.dense import CHAR_SLOTS, CLASSES, IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.train.batch import MicroBatch

NUM_TIME_TOKENS = 100
CHUNK_ELEMENTS = 1 << 27
"""Logits of more elements than this are made, used and made again in backward, piece by piece."""


@dataclass
class StepOutput:
    """What the model made of a micro-batch. hidden: [T, D] at the supervised positions, `head` turns it into logits."""

    features: Tensor | None = None
    """[n_views, side*side, C] of the tower: views of pictures, then frames."""
    hidden: Tensor | None = None
    head: nn.Module | None = None


class Loss:
    """A loss of one or more terms; `terms` are their names and factors."""

    needs_llm: ClassVar[bool] = True
    terms: tuple[tuple[str, float], ...] = (("", 1.0),)

    def __init__(self, tower_width: int, side: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tower_width, self.side, self.tokenizer = tower_width, side, tokenizer

    def make_head(self) -> nn.Module | None:
        """A module to train beside the model, or None."""
        return None

    def totals(self, batch: MicroBatch) -> Tensor:
        """[terms] float64: what each term's sum is divided by."""
        raise NotImplementedError

    def sums(self, output: StepOutput, batch: MicroBatch, head: nn.Module | None) -> Tensor:
        """[terms] float32: the sum of each term over the micro-batch."""
        raise NotImplementedError


class LanguageLoss(Loss):
    """Cross entropy of the answers' tokens, mean over all of them."""

    def totals(self, batch: MicroBatch) -> Tensor:
        return torch.tensor([float(batch.targets.numel())], dtype=torch.float64)

    def sums(self, output: StepOutput, batch: MicroBatch, head: nn.Module | None) -> Tensor:
        total = _over_chunks(output, batch.targets, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
        return total.reshape(1)


class SoftTimeLoss(LanguageLoss):
    """`LanguageLoss`, but a target that is a time token `<t0>` ... may be missed by a little (see `soft_ce_sum`)."""

    def __init__(self, tower_width: int, side: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__(tower_width, side, tokenizer)
        vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
        names = [f"<t{k}>" for k in range(NUM_TIME_TOKENS)]
        if missing := [n for n in names if n not in vocabulary]:
            raise RecipeError(f"loss 'soft_ce' needs time tokens; the tokenizer has no {missing[0]}; use loss 'lm'")
        self.time_tokens = torch.tensor([vocabulary[n] for n in names])

    def sums(self, output: StepOutput, batch: MicroBatch, head: nn.Module | None) -> Tensor:
        return _over_chunks(output, batch.targets, lambda z, y: soft_ce_sum(z, y, self.time_tokens)).reshape(1)


class DenseLoss(Loss):
    """What is in each patch, read from the tower's features by one linear layer: shape, colour, characters, place.

    The place (row and column of the patch in its view) keeps positions readable through the tower. Background is
    nearly everywhere, so it counts little.
    """

    needs_llm = False
    background: ClassVar[tuple[float, ...]] = (0.15, 0.15) + (0.05,) * CHAR_SLOTS
    terms = (
        ("shape", 0.2),
        ("colour", 0.2),
        *((f"char{k + 1}", 0.2) for k in range(CHAR_SLOTS)),
        ("row", 0.08),
        ("column", 0.08),
    )

    def make_head(self) -> nn.Module:
        head = nn.Linear(self.tower_width, sum(CLASSES) + 2 * self.side)
        nn.init.normal_(head.weight, std=0.1 * self.tower_width**-0.5)
        nn.init.zeros_(head.bias)
        return head

    def totals(self, batch: MicroBatch) -> Tensor:
        assert batch.dense is not None
        labels = batch.dense
        sums = []
        for channel, weight in enumerate(self.background):
            empty = (labels[..., channel] == 0).sum()
            filled = (labels[..., channel] > 0).sum()
            sums.append(float(empty) * weight + float(filled))
        patches = float(labels.shape[0] * labels.shape[1])
        return torch.tensor([*sums, patches, patches], dtype=torch.float64)

    def sums(self, output: StepOutput, batch: MicroBatch, head: nn.Module | None) -> Tensor:
        assert head is not None and output.features is not None and batch.dense is not None
        scores = head(output.features).float()  # [n, side*side, classes of all channels and places]
        *channels, rows, columns = scores.split([*CLASSES, self.side, self.side], dim=-1)
        terms = []
        for channel, (logits, weight) in enumerate(zip(channels, self.background)):
            weights = torch.ones(logits.shape[-1], device=logits.device)
            weights[0] = weight
            labels = batch.dense[..., channel].flatten()
            terms.append(F.cross_entropy(logits.flatten(0, 1), labels, weights, ignore_index=IGNORE, reduction="sum"))
        place = torch.arange(self.side * self.side, device=scores.device).expand(scores.shape[0], -1).flatten()
        terms.append(F.cross_entropy(rows.flatten(0, 1), place // self.side, reduction="sum"))
        terms.append(F.cross_entropy(columns.flatten(0, 1), place % self.side, reduction="sum"))
        return torch.stack(terms)


def soft_ce_sum(logits: Tensor, targets: Tensor, soft_tokens: Tensor, std: float = 1.0) -> Tensor:
    """Sum of cross entropies, where a target in `soft_tokens` is a Gaussian over all of them (NVILA's time tokens).

    logits: [T, V]; targets: [T]; soft_tokens: [K] ids in order; the weight of token j for target i is
    exp(-((j - i) / std)**2 / 2), normalised. Other targets are plain cross entropy.
    """
    soft_tokens = soft_tokens.to(targets.device)
    match = targets[:, None] == soft_tokens[None]  # [T, K]
    is_soft = match.any(1)
    total = F.cross_entropy(logits[~is_soft].float(), targets[~is_soft], reduction="sum")
    if not is_soft.any():
        return total
    ids = soft_tokens.to(torch.float32)
    distance = (ids[None] - targets[is_soft][:, None]) / std
    weights = torch.softmax(-0.5 * distance.square(), dim=-1)
    log_p = F.log_softmax(logits[is_soft].float(), dim=-1).index_select(1, soft_tokens)
    return total - (weights * log_p).sum()


def _over_chunks(output: StepOutput, targets: Tensor, term) -> Tensor:
    """Sum of `term(logits, targets)` with the logits made in pieces when they would be large."""
    assert output.hidden is not None and output.head is not None
    head, hidden = output.head, output.hidden
    vocabulary = head.weight.shape[0]
    if targets.numel() == 0:
        return hidden.sum() * 0.0
    if targets.numel() * vocabulary <= CHUNK_ELEMENTS:
        return term(head(hidden).float(), targets)
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    pieces = [
        checkpoint(lambda h, y: term(head(h).float(), y), h, y, use_reentrant=False)
        for h, y in zip(hidden.split(size), targets.split(size))
    ]
    return torch.stack(pieces).sum()
