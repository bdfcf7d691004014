"""What calibration tells a method about the inputs of one linear layer, accumulated in one pass over the samples."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

KINDS = ("norm", "hessian", "max", "mean")
_BLOCK = 512
"""Rows of a Hessian that are added at a time, from the diagonal on: the other half is the same numbers."""


class Statistics:
    """Sums over the inputs x of one linear layer, float32 on the device of the inputs.

    kinds: what is kept. "norm": [I] sums of x^2; "hessian": [I, I] sums of x x^T (norms come with it); "max": [I]
    largest |x|; "mean": [I] sums of |x|. samples counts sequences, as the papers' averages do; tokens counts rows.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.kinds = frozenset(kinds)
        self.samples = self.tokens = 0
        self._gram: Tensor | None = None  # blocks right of and on the diagonal; 0 elsewhere
        self._squares: Tensor | None = None
        self._max: Tensor | None = None
        self._abs: Tensor | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Take in inputs [..., T, I]; weights [T] scales each token's share of norms, Hessian and mean.

        A [T, I] input is one sample; leading dimensions count as samples.
        """
        x = inputs.detach().float()
        self.samples += x.numel() // (x.shape[-1] * x.shape[-2]) if x.dim() > 2 else 1
        x = x.reshape(-1, x.shape[-1])
        self.tokens += x.shape[0]
        if "max" in self.kinds:
            top = x.abs().amax(dim=0)
            self._max = top if self._max is None else torch.maximum(self._max, top)
        if weights is not None:
            weights = weights.to(x).repeat(x.shape[0] // len(weights))[:, None]
        if "mean" in self.kinds:
            total = (x.abs() if weights is None else x.abs() * weights).sum(dim=0)
            self._abs = total if self._abs is None else self._abs + total
        if weights is not None:
            x = x * weights.sqrt()
        if "hessian" in self.kinds:
            self._add_products(x)
        elif "norm" in self.kinds:
            squares = x.square().sum(dim=0)
            self._squares = squares if self._squares is None else self._squares + squares

    def _add_products(self, x: Tensor) -> None:
        width = x.shape[1]
        if self._gram is None:
            self._gram = torch.zeros(width, width, device=x.device)
        for start in range(0, width, _BLOCK):
            rows = slice(start, start + _BLOCK)
            self._gram[rows, start:].addmm_(x[:, rows].T, x[:, start:])

    def divide(self, scale: Tensor) -> None:
        """From now on tell of inputs x / scale [I] instead of x."""
        s = scale.float()
        self._gram = None if self._gram is None else self._gram / (s[:, None] * s)
        self._squares = None if self._squares is None else self._squares / s.square()
        self._max = None if self._max is None else self._max / s
        self._abs = None if self._abs is None else self._abs / s

    @property
    def norm(self) -> Tensor:
        """[I] squared norm of each input over a sample, averaged over the samples (Wanda's s_j)."""
        squares = self._gram.diagonal() if self._gram is not None else self._need(self._squares, "norm")
        return squares / self.samples

    @property
    def hessian(self) -> Tensor:
        """[I, I] 2/n times the sum of x x^T over all tokens of n samples (SparseGPT, GPTQ), undamped; a copy."""
        made = self._need(self._gram, "hessian") * (2 / self.samples)
        for end in range(_BLOCK, len(made), _BLOCK):
            made[end:, end - _BLOCK : end] = made[end - _BLOCK : end, end:].T
        return made

    @property
    def absmax(self) -> Tensor:
        """[I] largest magnitude of each input."""
        return self._need(self._max, "max")

    @property
    def absmean(self) -> Tensor:
        """[I] mean magnitude of each input over the tokens."""
        return self._need(self._abs, "mean") / self.tokens

    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        kept = (self._gram, self._squares, self._max, self._abs)
        return all(bool(torch.isfinite(t).all()) for t in kept if t is not None)

    def _need(self, value: Tensor | None, kind: str) -> Tensor:
        assert value is not None, f"{kind} was not collected; kinds are {sorted(self.kinds)}"
        return value
