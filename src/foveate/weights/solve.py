"""Second-order pruning and quantization of one weight matrix: the column loops of SparseGPT and GPTQ.

Sources: SparseGPT, arXiv 2301.00774 (IST-DASLab/sparsegpt @ 147d215); GPTQ, arXiv 2210.17323 (IST-DASLab/gptq @
2d65066). Departures: damping grows tenfold until the Hessian can be factored (the code stops with a linear-algebra
error); GPTQ can leave weights that are exactly 0 at 0, so that it may follow pruning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import UnsupportedError
from foveate.weights.grids import Grid, Quantized, gptq_grid

_log = logging.getLogger("foveate")
MAX_DAMP = 1.0
_LEAF = 256
"""Up to this size a triangular matrix is inverted by torch's solver."""


def inverse_factor(hessian: Tensor, damp: float, name: str = "the layer") -> Tensor:
    """The upper Cholesky factor U of the inverse of H + damp * mean(diag H) * I: [I, I] float32.

    Inputs that were always 0 must have got a diagonal of 1 before (`dead_inputs`). Raises UnsupportedError naming the
    layer when H is not finite, or cannot be factored even with a damping of 1.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise UnsupportedError(f"{name}: its Hessian is not finite (NaN or infinite activations); use float32")
    mean = hessian.diagonal().mean()
    share = damp
    while share <= MAX_DAMP:
        # with rows and columns turned round H is L L^T, so that its inverse is U^T U with U = L^-1 turned back: one
        # factorization, and never the inverse itself
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(share * mean)
        lower, bad = torch.linalg.cholesky_ex(damped)
        del damped
        if not bad:
            upper = _inverse_lower(lower).flip(0, 1)
            if bool(torch.isfinite(upper).all()):
                if share > damp:
                    _log.warning("%s: its Hessian is singular with damping %g; %g is used", name, damp, share)
                return upper
        share = max(share, 1e-3) * 10
    raise UnsupportedError(
        f"{name}: its Hessian is singular even with damping {MAX_DAMP:g}; give more calibration samples"
    )


def _inverse_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: torch's own solver does not know that I is triangular."""
    size = len(lower)
    if size <= _LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    made = torch.zeros_like(lower)
    made[:half, :half] = _inverse_lower(lower[:half, :half])
    made[half:, half:] = _inverse_lower(lower[half:, half:])
    made[half:, :half] = -made[half:, half:] @ (lower[half:, :half] @ made[:half, :half])
    return made


def dead_inputs(hessian: Tensor) -> Tensor:
    """[I] bool: inputs that were 0 in all samples. Sets their diagonal to 1, in place."""
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    return dead


def smallest(score: Tensor, drop: int, of: int) -> Tensor:
    """[R, C] bool: the `drop` smallest scores of every aligned `of` columns of each row; ties: the earlier one."""
    blocks = score.unflatten(1, (-1, of))
    order = blocks.sort(dim=-1, stable=True).indices
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :drop], True).flatten(1)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float = 0.5,
    drop: int = 0,
    of: int = 0,
    *,
    damp: float = 0.01,
    block: int = 128,
    bits: int | None = None,
    mask: Tensor | None = None,
    name: str = "the layer",
) -> Tensor:
    """The pruned weight [O, I] float32, remaining weights adjusted to what was dropped before them.

    weight: [O, I]; hessian: [I, I] undamped. sparsity: dropped share of every block of `block` columns, chosen over
    all rows together; or drop/of: so many of every `of` columns of each row. bits: also round what stays to a grid per
    row, fixed from the dense weight. mask: [O, I] bool of what goes, instead of choosing.
    """
    w, h = weight.float().clone(), hessian.float().clone()
    grid = gptq_grid(w, bits) if bits else None
    w[:, dead_inputs(h)] = 0
    factor = inverse_factor(h, damp, name)
    columns = w.shape[1]
    if of and block % of:
        block += of - block % of  # a group of columns never straddles two blocks
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, local = w[:, start:end].clone(), factor[start:end, start:end]
        diagonal = local.diagonal()
        if mask is not None:
            gone = mask[:, start:end].clone()
        elif of:
            gone = torch.zeros_like(part, dtype=torch.bool)
        else:
            score = part.square() / diagonal.square()
            flat = score.flatten().sort().values
            gone = score <= flat[min(int(flat.numel() * sparsity), flat.numel() - 1)]
        errors = torch.zeros_like(part)
        for i in range(end - start):
            if of and mask is None and i % of == 0:
                score = part[:, i : i + of].square() / diagonal[i : i + of].square()
                gone[:, i : i + of] = smallest(score, drop, score.shape[1])
            column = part[:, i]
            kept = torch.where(gone[:, i], 0.0, column)
            if grid is not None:
                kept = grid.round(kept[:, None])[:, 0]
            error = (column - kept) / diagonal[i]
            part[:, i + 1 :] -= error[:, None] * local[i, i + 1 :]
            part[:, i] = kept
            errors[:, i] = error
        w[:, start:end] = part
        w[:, end:] -= errors @ factor[start:end, end:]
    return w


@dataclass(frozen=True)
class Solved:
    """What GPTQ made. weight: [O, I] dequantized. quantized: its integers, groups in the order of the inputs, or None
    when groups follow the order of solving (act_order with dynamic groups). scale, zero: [O, groups] in fit order."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    quantized: Quantized | None


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int = -1,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
    damp: float = 0.01,
    block: int = 128,
    keep_zeros: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "the layer",
) -> Solved:
    """`weight` [O, I] on an integer grid, each column's error spread over the columns that are still to come.

    group: inputs that share a grid, <= 0 for a whole row. act_order: columns by falling diagonal of the Hessian.
    static_groups: all grids from the weight as it came. keep_zeros: weights that are 0 stay 0. dtype: what scales will
    be stored in, so that codes are right for them.
    """
    w, h = weight.float().clone(), hessian.float().clone()
    columns = w.shape[1]
    width = group if group > 0 else columns

    def fit(x: Tensor) -> Grid:
        made = gptq_grid(x, bits, symmetric, mse)
        return made if dtype is None else made.rounded_scale(dtype)

    whole = fit(w) if width == columns else None
    zeros = (w == 0) if keep_zeros else None
    w[:, dead_inputs(h)] = 0
    grids = [whole] if whole is not None else []
    if whole is None and static_groups:
        grids = [fit(w[:, c : c + width]) for c in range(0, columns, width)]
    order = torch.arange(columns, device=w.device)
    if act_order:
        order = h.diagonal().argsort(descending=True)
        w, h = w[:, order], h[order][:, order]
        zeros = None if zeros is None else zeros[:, order]
    factor = inverse_factor(h, damp, name)
    w, zeros = w.T.contiguous(), None if zeros is None else zeros.T.contiguous()  # a column is read and written whole
    codes, out = torch.empty_like(w), torch.empty_like(w)
    dynamic = whole is None and not static_groups
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, local = w[start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            at = start + i
            if dynamic and at % width == 0:
                # the weights outside the working copy, as the code has it: they lack this block's own feedback
                grids.append(fit(w[at : at + width].T))
            index = at // width if dynamic else int(order[at]) // width
            column, top = part[i], grids[index].top
            grid = Grid(grids[index].scale[:, 0], grids[index].zero[:, 0], top)
            code = grid.codes(column)
            if zeros is not None:
                code = torch.where(zeros[at], grid.zero, code)
            codes[at], out[at] = code, grid.values(code)
            errors[i] = (column - out[at]) / local[i, i]
            part[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    back = order.argsort()
    codes, out = codes[back].T.contiguous(), out[back].T.contiguous()
    scale, zero = (torch.cat([g[k] for g in grids], dim=1) for k in (0, 1))
    quantized = None
    if not (act_order and dynamic):
        quantized = Quantized(codes.int(), scale, None if symmetric else zero, bits)
    return Solved(out, scale, zero, quantized)
