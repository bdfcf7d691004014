"""Layers that run fast where the machine has a kernel for them; they compute what the layers they stand for compute.

    foveate.weights.kernels.accelerate_(vlm)   # {"int4": 28, "sparse": 0}: how many layers now have one

| layers | where | kernel |
| --- | --- | --- |
| 4 bits, groups of 32, 64, 128 or 256, bfloat16 | CPU and CUDA | int4 matmul of torch, for few rows (decoding) |
| dense with 2:4 zeros, float16 or bfloat16 | CUDA | semi-structured sparse matmul of torch |
| int8 with inputs per token | CPU and CUDA | `Int8Linear` always takes it, nothing is to be done |

The kernel's form of the weights is kept beside the stored one, so memory grows by half a byte a weight; what is saved
does not change. Few rows are those for which the kernel was faster than dequantizing; more rows go the usual way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveate.weights.linear import QuantizedLinear
from foveate.weights.packing import unpack

if TYPE_CHECKING:
    from foveate.vlm import VLM

GROUPS = (32, 64, 128, 256)
FEW_ROWS = 16
"""Rows up to which the int4 kernel is taken."""


def accelerate_(vlm: VLM) -> dict[str, int]:
    """Give every layer that can have one its kernel, in place; how many of each kind got one."""
    found = {"int4": 0, "sparse": 0}
    for module in vlm.model.modules():
        if isinstance(module, QuantizedLinear) and fits_int4(module, vlm.dtype):
            module.kernel = int4_kernel(module)
            found["int4"] += 1
        elif type(module) is nn.Linear and fits_sparse(module):
            weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            found["sparse"] += 1
    return found


def fits_int4(layer: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Whether torch's int4 matmul takes this layer in a model of this dtype."""
    shape = layer.in_features % 32 == 0 and layer.out_features % (16 if layer.packed.device.type == "cpu" else 8) == 0
    form = layer.bits == 4 and layer.group in GROUPS and not layer.act_bits
    return form and shape and dtype == torch.bfloat16 and layer.packed.device.type in ("cpu", "cuda")


def fits_sparse(layer: nn.Linear) -> bool:
    """Whether at least two of every four neighbours are 0, on a device and in a dtype with a kernel for that."""
    weight = layer.weight.detach()
    if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    rows, columns = weight.shape
    if rows % 32 or columns % 64 or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return int((weight == 0).unflatten(1, (-1, 4)).sum(dim=-1).min()) >= 2


class Int4Kernel:
    """The int4 matmul of torch for one layer: `kernel(x)` is x W^T [.., out] for few rows in bfloat16, None for others.

    w = (code - 8) * scale + shift, with one pair for each group, is what torch computes.
    """

    def __init__(self, packed: Tensor, pairs: Tensor, group: int) -> None:
        self.packed, self.pairs, self.group = packed, pairs, group

    def __call__(self, x: Tensor) -> Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] > FEW_ROWS or x.dtype != torch.bfloat16 or x.device != self.packed.device:
            return None
        if x.device.type == "cpu":
            out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        else:
            out = torch._weight_int4pack_mm(rows, self.packed, self.group, self.pairs)
        return out.view(*x.shape[:-1], out.shape[-1])


def int4_kernel(layer: QuantizedLinear) -> Int4Kernel:
    """The kernel form of a layer of 4 bits."""
    codes = unpack(layer.packed, 4, layer.in_features).to(torch.int32)
    scale = layer.scale.float()
    zero = 8.0 if layer.zero is None else unpack(layer.zero, 4, layer.num_groups).float()
    pairs = torch.stack([scale, (8 - zero) * scale], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    if codes.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    else:
        octets = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(octets, 8)
    return Int4Kernel(packed, pairs, layer.group)
