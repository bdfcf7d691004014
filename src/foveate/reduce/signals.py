"""Reading signals: which of the alternatives was delivered, and how heads are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.errors import UnsupportedError
from foveate.method import signal_for

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout


def given(signals: dict[str, Tensor], need: str) -> Tensor:
    """The signal that answers the need "a|b", where it is. Raises UnsupportedError when none was delivered."""
    name = signal_for(need, signals)
    if name is None:
        raise UnsupportedError(f"no signal for {need.replace('|', ' or ')}; delivered: {', '.join(signals) or 'none'}")
    return signals[name]


def head_mean(signals: dict[str, Tensor], need: str) -> Tensor:
    """An attention signal [N, H] or [N] as one score [N] for each token, float32 on the CPU."""
    value = given(signals, need).float()
    return (value.mean(dim=-1) if value.dim() > 1 else value).cpu()


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[..., H * d] as [..., H, d]; 0 heads: unknown, taken as one."""
    return states.unflatten(-1, (max(heads, 1), -1))


def per_view(signal: Tensor, layout: VisualLayout) -> Tensor:
    """The rows of a signal of CLS itself, one for each encoded view, that belong to `layout.groups("view")`.

    Views are counted through all pictures and clips; a view without a visual token has a row, and no group.
    """
    first = torch.stack([group[0] for group in layout.groups("view")])
    views = torch.stack([layout.media[first], layout.view[first]])
    counts = torch.zeros(int(layout.media.max()) + 1, dtype=torch.int64).scatter_reduce(
        0, views[0], views[1] + 1, "amax"
    )
    return signal[(counts.cumsum(0) - counts)[views[0]] + views[1]]
