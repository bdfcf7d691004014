"""An eager attention for training on CPUs, registered with transformers under the name "foveate_lean".

Next to transformers' own eager form it keeps the softmax in the compute type instead of float32, adds the mask in
place, and never repeats the keys of grouped heads. On CPUs PyTorch's fused kernel is several times slower than either
for backward passes in bfloat16 with small heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "foveate_lean"


def lean_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output [B, L, H, D] of query [B, H, L, D] and key, value [B, KV, S, D]; mask additive [B, 1, L, S]."""
    batch, heads, length, width = query.shape
    kv_heads, size = key.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    # Heads that share keys are stacked along the rows: [B, KV, G*L, D], so keys need no copies.
    rows = (query * scale).reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = rows @ key.transpose(2, 3)
    if attention_mask is not None:
        # In place: backward of a product reads its factors only.
        scores.view(batch, heads, length, size).add_(attention_mask[..., :size].to(scores.dtype))
    weights = scores.softmax(-1)
    if dropout and module.training:
        weights = nn.functional.dropout(weights, dropout)
    out = (weights @ value).view(batch, heads, length, width)
    return out.transpose(1, 2).contiguous(), None


def use_attention(model: nn.Module, name: str) -> None:
    """Switch a transformers model, with its sub-models, to "lean", "eager" or "sdpa" attention."""
    if name == "lean":
        AttentionInterface.register(NAME, lean_attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        name = NAME
    model.set_attn_implementation(name)


def compute_dtype(embeds: Tensor) -> torch.dtype:
    """What a decoder computes in when it gets these embeddings: the autocast type, or their own."""
    device = embeds.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, L, L] bool, True where attention is allowed -> additive [R, 1, L, L] of `dtype`."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
