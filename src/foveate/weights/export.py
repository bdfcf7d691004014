"""Quantized layers in the `compressed-tensors` form: what plain transformers, vLLM and SGLang read.

Written by hand, so nothing but safetensors is needed to write it. Symmetric integers of 4 or 8 bits in groups become
`pack-quantized`, int8 layers with inputs per token `int-quantized`, fp8 layers `float-quantized`. Which layers are
which is listed by name in config.json, and recipe.json stays beside it, so that `foveate.load` reads the same folder.

Layout (compressed-tensors 0.20): X.weight_packed int32 [out, in * bits / 32], a little-endian stream of
q + 2**(bits - 1); X.weight_scale [out, groups]; X.weight_shape int64 [2]; or X.weight int8 [out, in] and X.weight_scale
[out, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.disk import plain_errors
from foveate.errors import UnsupportedError
from foveate.weights.linear import Fp8Linear, Int8Linear, QuantizedLinear
from foveate.weights.lowrank import LowRankLinear
from foveate.weights.normal_float import NormalFloatLinear

if TYPE_CHECKING:
    from foveate.vlm import VLM

METHOD = "compressed-tensors"


def compressed_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of `model` as `compressed-tensors` names them, and its `quantization_config` (None: nothing is
    quantized, the tensors are dense).

    Raises UnsupportedError naming the first layer that this form cannot hold, and the way out.
    """
    state = dict(model.state_dict())
    schemes: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (LowRankLinear, NormalFloatLinear)):
            raise UnsupportedError(
                f"{name}: {METHOD} holds no low-rank or NormalFloat parts; save as foveate, and write low-rank ones "
                "for PEFT with foveate.weights.lowrank.save_adapter"
            )
        if isinstance(module, QuantizedLinear):
            schemes.setdefault(_packed(name, module, state), []).append(name)
        elif isinstance(module, Int8Linear):
            state[f"{name}.weight_scale"] = state.pop(f"{name}.scale")
            schemes.setdefault(("int-quantized", 8, 0), []).append(name)
        elif isinstance(module, Fp8Linear):
            state[f"{name}.weight_scale"] = state.pop(f"{name}.scale")
            schemes.setdefault(("float-quantized", 8, module.inputs), []).append(name)
    if not schemes:
        return state, None
    taken = {name for names in schemes.values() for name in names}
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in taken]
    formats = sorted({scheme[0] for scheme in schemes})
    config = {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": left,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": _group(scheme, names) for index, (scheme, names) in enumerate(schemes.items())
        },
    }
    return state, config


def _packed(name: str, layer: QuantizedLinear, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """Put the tensors of one layer of packed integers into `state`; its scheme."""
    if layer.act_bits:
        raise UnsupportedError(f"{name}: {METHOD} has no packed weights with rounded inputs here; save as foveate")
    if not layer.symmetric:
        raise UnsupportedError(
            f"{name}: transformers cannot load asymmetric integers of {METHOD}; give the method symmetric=true"
        )
    if layer.bits not in (4, 8) or layer.in_features * layer.bits % 32:
        raise UnsupportedError(
            f"{name}: {layer.in_features} inputs of {layer.bits} bits do not fill 32-bit words; {METHOD} takes 4 or 8 "
            "bits that do"
        )
    state[f"{name}.weight_packed"] = state.pop(f"{name}.packed").contiguous().view(torch.int32)
    state[f"{name}.weight_scale"] = state.pop(f"{name}.scale")
    state[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
    group = 0 if layer.num_groups == 1 else layer.group
    return "pack-quantized", layer.bits, group


def _group(scheme: tuple[Any, ...], names: list[str]) -> dict[str, Any]:
    kind, bits, group = scheme
    number = "float" if kind == "float-quantized" else "int"
    rounded = kind == "int-quantized" or (number == "float" and group)
    group = 0 if number == "float" else group
    weights = {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    inputs = None
    if rounded:
        inputs = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": names,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": kind,
    }


def save(vlm: VLM, path: str | Path) -> None:
    """Write `vlm` so that plain transformers loads it, and `foveate.load` too; whole or not at all.

    Raises UnsupportedError (a family or a layer that this form cannot hold), CheckpointError (a full disk).
    """
    from foveate.adapters.hf import HfAdapter

    if not isinstance(vlm.adapter, HfAdapter):
        raise UnsupportedError(
            f"plain transformers has no {vlm.adapter.family!r} models, so {METHOD} is of no use; save as foveate"
        )
    tensors, config = compressed_tensors(vlm.model)
    with plain_errors(path, path, "nothing was changed"):
        vlm.adapter.save(Path(path), vlm.extra_files(), tensors=tensors, quantization=config)
