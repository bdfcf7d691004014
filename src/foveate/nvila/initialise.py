"""Weights before any training: models without memory, fast random fill for large ones, and nano's initial values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.errors import UnsupportedError
from foveate.nvila.configuration import NvilaConfig
from foveate.nvila.modeling import NvilaForConditionalGeneration

_RESIDUAL_OUTPUTS = ("out_proj", "fc2", "o_proj", "down_proj")


def empty_model(config: NvilaConfig, attn: str | None = None) -> NvilaForConditionalGeneration:
    """An NVILA model whose parameters hold no memory ("meta"); see `empty`."""
    return empty(NvilaForConditionalGeneration, config, attn)


def empty(architecture: type[PreTrainedModel], config: Any, attn: str | None = None) -> Any:
    """A model whose parameters hold no memory ("meta") and whose buffers are real, ready for assigned weights.

    architecture: a class of transformers. attn: attention backend of transformers ("sdpa", "eager", ...); None keeps
    the default, SDPA. Raises UnsupportedError for a backend that there is not, or that is not installed.
    """
    try:
        with torch.device("meta"):
            model = architecture._from_config(config, attn_implementation=attn)
    except (ImportError, ValueError) as error:
        if attn is None:
            raise
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"attention backend {attn!r} cannot be used; take sdpa or eager ({reason})") from None
    for module in model.modules():  # buffers that no checkpoint stores: on meta they were never computed
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if names == ["position_ids"]:
            module.position_ids = torch.arange(module.num_positions).expand(1, -1)
        elif names:
            fresh = type(module)(config=module.config)  # rotary embeddings
            for name in names:
                setattr(module, name, getattr(fresh, name))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without values: {left}"
    return model.eval()


def random_model(
    config: NvilaConfig,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    attn: str | None = None,
) -> NvilaForConditionalGeneration:
    """An NVILA model of random weights; see `randomise`."""
    return randomise(empty_model(config, attn), dtype, device, seed)


@torch.no_grad()
def randomise(model: Any, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Any:
    """The empty `model` with random weights (normal, std 0.02; norms 1, biases 0), allocated once in `dtype`."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    generator = torch.Generator(device=device).manual_seed(seed)
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = torch.empty_like(parameter, dtype=dtype)
            if name == "bias":
                parameter.zero_()
            elif is_norm:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    model.tie_weights()
    model.config.dtype = dtype
    return model


@torch.no_grad()
def init_weights_for_training(model: NvilaForConditionalGeneration, seed: int = 0) -> None:
    """Initial values from which a small model trains fast, in place.

    Linear and patch weights: truncated normal of std 1/sqrt(fan_in), the outputs of residual branches divided by
    sqrt(2 * layers); text embeddings std 1, the head a tenth of a Linear, biases 0; the tower's positions std 0.3, the
    tables of visual positions 0.4. Visual tokens then start as large as text embeddings (with the output norm).
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    layers = {"vision_tower": model.config.num_vision_layers, "llm": model.config.text_config.num_hidden_layers}
    for name, module in model.named_modules():
        part, leaf = name.partition(".")[0], name.rpartition(".")[2]
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            if leaf in _RESIDUAL_OUTPUTS:
                std /= math.sqrt(2 * layers[part])
            elif leaf == "lm_head":
                std *= 0.1
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.3 if part == "vision_tower" else 1.0, generator=generator)
    if model.mm_projector.position is not None:
        for table in model.mm_projector.position.parameters():
            table.normal_(0.0, 0.4, generator=generator)
    model.tie_weights()
