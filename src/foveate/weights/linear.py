"""`QuantizedLinear`: a linear layer whose weights are stored as packed integers with a scale per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.weights.packing import pack, packed_width, unpack


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W = (codes - zero) * scale, one scale (and zero point) per `group` inputs of each output.

    Buffers: packed [out, bytes] uint8; scale [out, groups] float16; zero [out, bytes of groups] uint8, packed like the
    codes (absent when symmetric: zero is then 2**(bits - 1)). The weight is made anew in each call, in the dtype of the
    input: the layer is small, not fast.
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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
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
    def of(cls, linear: nn.Linear, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> QuantizedLinear:
        """A layer from integers: codes [out, in] in 0 .. 2**bits - 1; scale, zero [out, groups]. Shares the bias."""
        group = linear.in_features // scale.shape[1]
        made = cls(linear.in_features, linear.out_features, bits, group, zero is None, False, device="meta")
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
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, group {self.group}, {kind}"
