"""Linear layers with cheaper weights: `QuantizedLinear` (packed integers in groups), `Int8Linear` (int8 matmul) and
`Fp8Linear` (8-bit floats)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import RecipeError
from foveate.weights.grids import absmax_round, absmax_scale
from foveate.weights.packing import pack, packed_width, unpack


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W = (codes - zero) * scale, one scale (and zero point) per `group` inputs of each output.

    Buffers: packed [out, bytes] uint8; scale [out, groups] float16; zero [out, bytes of groups] uint8, packed like the
    codes (absent when symmetric: zero is then 2**(bits - 1)). The weight is made anew in each call, in the dtype of the
    input: the layer is small, not fast, unless it has a `kernel` (`foveate.weights.kernels`). act_bits: the input is
    rounded to so many bits first, symmetrically per token.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        symmetric: bool,
        bias: bool,
        device: object = None,
        act_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.act_bits = in_features, out_features, act_bits
        self.kernel: Callable[[Tensor], Tensor | None] | None = None
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.num_groups = in_features // group
        width = packed_width(in_features, bits)
        zeros = None if symmetric else torch.empty(out_features, packed_width(self.num_groups, bits), dtype=torch.uint8)
        self.register_buffer("packed", torch.empty(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(out_features, self.num_groups, dtype=torch.float16, device=device))
        self.register_buffer("zero", zeros if zeros is None else zeros.to(device=device))
        empty = torch.empty(out_features, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        act_bits: int | None = None,
    ) -> QuantizedLinear:
        """A layer from integers: codes [out, in] in 0 .. 2**bits - 1; scale, zero [out, groups]. Shares the bias."""
        group = linear.in_features // scale.shape[1]
        shape = linear.in_features, linear.out_features
        made = cls(*shape, bits, group, zero is None, False, device="meta", act_bits=act_bits)
        made.packed, made.scale = pack(codes, bits), scale.to(torch.float16)
        made.zero = None if zero is None else pack(zero, bits)
        made.bias = linear.bias
        return made

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], float32."""
        return self.dequantize(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`."""
        codes = unpack(self.packed, self.bits, self.in_features)
        if self.zero is None:
            middle: int | Tensor = 2 ** (self.bits - 1)
        else:
            middle = unpack(self.zero, self.bits, self.num_groups)[..., None].to(dtype)
        grouped = codes.reshape(self.out_features, self.num_groups, self.group).to(dtype)
        return ((grouped - middle) * self.scale[..., None].to(dtype)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_bits:
            x = absmax_round(x, self.act_bits)
        y = None if self.kernel is None else self.kernel(x)
        if y is not None:
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        inputs = f", inputs in {self.act_bits} bits" if self.act_bits else ""
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, group {self.group}, {kind}{inputs}"


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and inputs that are rounded to int8 as they come, one scale per token.

    Buffers: weight [out, in] int8; scale [out, 1] float32. Where torch has an int8 matmul for the shapes and the device
    the product is taken in integers (exact, and faster on hardware made for it); elsewhere in the dtype of the input.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, device: object = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=torch.float32, device=device))
        empty = torch.empty(out_features, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, weight: Tensor | None = None) -> Int8Linear:
        """From a linear layer, or with another weight [out, in] for it: symmetric, one scale per output."""
        weight = (linear.weight.detach() if weight is None else weight).float()
        made = cls(linear.in_features, linear.out_features, False, device="meta")
        made.scale = absmax_scale(weight)
        made.weight = (weight / made.scale).round().clamp(-127, 127).to(torch.int8)
        made.bias = linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        # the rule of compressed-tensors, so that an exported model computes the same (SmoothQuant divides by 127)
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127.5
        codes = (rows / scale).round().clamp(-128, 127)
        if self.in_integers(rows):
            product = torch._int_mm(codes.to(torch.int8), self.weight.t())
            y = (product.float() * scale.float() * self.scale.t()).to(x.dtype)
            y = y if self.bias is None else y + self.bias
        else:
            weight = (self.weight.float() * self.scale).to(x.dtype)
            y = F.linear(codes * scale, weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def in_integers(self, rows: Tensor) -> bool:
        """Whether the product of `rows` [T, in] is taken in integers: what `torch._int_mm` accepts."""
        if rows.device.type == "cpu":
            return True
        fits = rows.shape[0] > 16 and self.in_features % 8 == 0 and self.out_features % 8 == 0
        return rows.device.type == "cuda" and fits

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8, inputs in int8"


FP8 = torch.float8_e4m3fn
FP8_TOP = torch.finfo(FP8).max


class Fp8Linear(nn.Module):
    """y = x W^T + b with weights in e4m3, one scale per output; inputs: rounded to e4m3 too, one scale per token.

    Buffers: weight [out, in] float8_e4m3fn; scale [out, 1] float32. The product is taken in the dtype of the input: the
    layer is small, not fast.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, inputs: bool, device: object = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.inputs = in_features, out_features, inputs
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=FP8, device=device))
        self.register_buffer("scale", torch.empty(out_features, 1, dtype=torch.float32, device=device))
        empty = torch.empty(out_features, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, inputs: bool) -> Fp8Linear:
        """From a linear layer, whose bias it shares; the largest weight of each output is the largest of the format."""
        weight = linear.weight.detach().float()
        made = cls(linear.in_features, linear.out_features, False, inputs, device="meta")
        made.scale = (weight.abs().amax(dim=1, keepdim=True) / FP8_TOP).clamp(min=torch.finfo(torch.float32).tiny)
        made.weight = (weight / made.scale).clamp(-FP8_TOP, FP8_TOP).to(FP8)
        made.bias = linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs:
            scale = (x.abs().amax(dim=-1, keepdim=True) / FP8_TOP).clamp(min=torch.finfo(x.dtype).eps)
            x = (x / scale).clamp(-FP8_TOP, FP8_TOP).to(FP8).to(x.dtype) * scale
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, fp8{', inputs in fp8' if self.inputs else ''}"


def check_group(method: str, name: str, linear: nn.Linear, group: int) -> None:
    """Raise RecipeError, with the group that fits, unless `group` (0: a whole row) divides the layer's inputs."""
    if group and linear.in_features % group:
        fits = max(g for g in range(1, group + 1) if linear.in_features % g == 0)
        raise RecipeError(
            f"{method}: layer {name} has {linear.in_features} inputs, which group={group} does not divide; "
            f"use group={fits}, or group=0 for one scale per output"
        )


def empty_quantized(
    linear: nn.Linear, bits: int, group: int, symmetric: bool, act_bits: int | None = None
) -> QuantizedLinear:
    """A `QuantizedLinear` of the layer's shape without values."""
    shape = linear.in_features, linear.out_features
    has_bias, device = linear.bias is not None, linear.weight.device
    return QuantizedLinear(*shape, bits, group or linear.in_features, symmetric, has_bias, device, act_bits)
