"""Reading signals: which of the alternatives was delivered, and how heads are put together."""

from __future__ import annotations

from torch import Tensor

from foveate.errors import UnsupportedError
from foveate.method import signal_for


def given(signals: dict[str, Tensor], need: str) -> Tensor:
    """The signal that answers the need "a|b", float32 on the CPU. Raises UnsupportedError when none was delivered."""
    name = signal_for(need, signals)
    if name is None:
        raise UnsupportedError(f"no signal for {need.replace('|', ' or ')}; delivered: {', '.join(signals) or 'none'}")
    return signals[name].float().cpu()


def head_mean(signals: dict[str, Tensor], need: str) -> Tensor:
    """An attention signal [N, H] or [N] as one score [N] for each token."""
    value = given(signals, need)
    return value.mean(dim=-1) if value.dim() > 1 else value


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[..., H * d] as [..., H, d]; 0 heads: unknown, taken as one."""
    return states.unflatten(-1, (max(heads, 1), -1))
