"""What an attention layer is about to see, told to the cache layer that serves it: padding, rotary angles, queries.

transformers hands a cache nothing but keys and values. A cache that must not let padding into its statistics, that
keeps keys from before the rotary embedding, or that evicts (and then needs a mask of its own) has to know more.
`observe` puts one stateless hook before each attention module: it passes the module's arguments to
`cache.layers[i].see`, if there is such a method, and lets it replace the attention mask. All state stays in the
cache, so requests with different caches run through one model at the same time, and `generate()` of transformers is
served as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedError


@dataclass(frozen=True)
class Pass:
    """The arguments of one attention module in one pass.

    hidden: [B, Q, D], what the projections get. mask: None, [B, 1, Q, K] (bool, or additive), or [B, K] (flash).
    rotation: cos and sin, each [B or 1, Q, R] with R rotary channels, or None.
    """

    module: nn.Module
    hidden: Tensor
    mask: Tensor | None
    rotation: tuple[Tensor, Tensor] | None

    def valid(self) -> Tensor | None:
        """[B, Q] bool, False where a new token is padding; None where none is. A single new token never is."""
        batch, new = self.hidden.shape[:2]
        if self.mask is None or new == 1:
            return None
        if not isinstance(self.mask, Tensor):
            raise UnsupportedError(
                f"the cache cannot read padding from a {type(self.mask).__name__}; load the model with attn='sdpa'"
            )
        row = self.mask[..., -new:] if self.mask.dim() == 2 else self.mask[:, 0, -1, -new:]
        found = allowed(row).expand(batch, new)
        return None if bool(found.all()) else found

    def new_mask(self) -> Tensor:
        """[B or 1, 1, Q, Q] bool: which new tokens a new token attends to."""
        new = self.hidden.shape[1]
        causal = torch.ones(1, 1, new, new, dtype=torch.bool, device=self.hidden.device).tril()
        if self.mask is None or new == 1:
            return causal
        if self.mask.dim() == 2:
            return causal & allowed(self.mask[:, None, None, -new:])
        return allowed(self.mask[:, :1, :, -new:])

    def queries(self, last: int) -> Tensor:
        """[B, H, n, d] rotated queries of the last `last` new tokens, by the module's own projection and norm."""
        project = getattr(self.module, "q_proj", None)
        if project is None:
            raise UnsupportedError(
                f"{type(self.module).__name__} has no q_proj, from which attention rows are computed"
            )
        hidden = self.hidden[:, -last:]
        states = _heads(self.module, project(hidden), "q_norm")
        cos, sin = self.rotation
        return rotate(self.module, states, cos[:, -last:], sin[:, -last:])


def allowed(mask: Tensor) -> Tensor:
    """The mask as bool, True where attention is allowed; additive masks hold 0 there."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


def like_mask(mask: Tensor, given: Tensor | None) -> Tensor:
    """A bool mask in the form of `given`: bool, or additive in its dtype."""
    if given is None or not given.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=given.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(given.dtype).min
    )


def observe(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Tell caches what the attention modules of these decoder layers see, from now on; returns those modules.

    Asked again for the same layers, it changes nothing. Raises UnsupportedError for a layer without `self_attn`.
    """
    modules = []
    for layer in layers:
        module = getattr(layer, "self_attn", None)
        if module is None:
            raise UnsupportedError(f"{type(layer).__name__} has no self_attn, which this cache has to listen to")
        if _tell not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_tell, with_kwargs=True)
        modules.append(module)
    return modules


def _tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    layers = getattr(kwargs.get("past_key_values"), "layers", ())
    index = getattr(module, "layer_idx", len(layers))
    see = getattr(layers[index], "see", None) if index < len(layers) else None
    if see is None:
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mask = kwargs.get("attention_mask")
    kwargs["attention_mask"] = see(Pass(module, hidden, mask, kwargs.get("position_embeddings")))
    return args, kwargs


# ---- the rotary embedding of a family


def rotation_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function by which the module's family rotates queries and keys. Raises UnsupportedError if there is none."""
    found = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if found is None:
        raise UnsupportedError(f"{type(module).__name__} has no rotary embedding that could be taken off its keys")
    return found


def rotate(module: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, T, d] states with the rotary embedding of cos and sin [B, T, R]; channels from R on stay as they are."""
    apply, width = rotation_of(module), cos.shape[-1]
    turned = apply(states[:, :1, :, :width], states[..., :width], cos.to(states), sin.to(states))[1]
    return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], dim=-1)


def unrotate(module: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`, in float32. Embeddings that also scale (cos^2 + sin^2 = s^2) are scaled back."""
    width = cos.shape[-1]
    back = rotate(module, states.float(), cos.float(), -sin.float())
    scale = (cos.float() ** 2 + sin.float() ** 2)[:, None]
    return back / scale if width == states.shape[-1] else torch.cat([back[..., :width] / scale, back[..., width:]], -1)


def projected(module: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values [B, H, T, d] of hidden states [B, T, D], made again by the module's projections."""
    keys = rotate(module, _heads(module, module.k_proj(hidden), "k_norm"), *rotation)
    return keys, _heads(module, module.v_proj(hidden), "v_norm")


def _heads(module: nn.Module, states: Tensor, norm: str) -> Tensor:
    """[B, T, H * d] -> [B, H, T, d], through the module's norm of each head where it has one."""
    states = states.unflatten(-1, (-1, module.head_dim))
    states = getattr(module, norm)(states) if getattr(module, norm, None) is not None else states
    return states.transpose(1, 2)
