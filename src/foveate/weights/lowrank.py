"""Low-rank parts beside a compressed layer: the layer, how the parts are found, and PEFT's files.

Sources: EoRA (arXiv 2410.21271) and LQ-LoRA (arXiv 2311.12023), from their descriptions; see `eora` and `lq_lora`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.disk import plain_errors
from foveate.errors import UnsupportedError
from foveate.files import save_tensors

if TYPE_CHECKING:
    from foveate.vlm import VLM


class LowRankLinear(nn.Module):
    """y = base(x) + B (A x). base: any linear layer; lora_A [rank, in], lora_B [out, rank]."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = (nn.Parameter(x.contiguous(), requires_grad=False) for x in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + low

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.lora_A.shape[0]} beside"


def empty_low_rank(base: nn.Module, rank: int, dtype: torch.dtype) -> LowRankLinear:
    """Such a layer without values."""
    device = next(tensor.device for tensor in [*base.parameters(), *base.buffers()])
    a = torch.empty(rank, base.in_features, dtype=dtype, device=device)
    return LowRankLinear(base, a, torch.empty(base.out_features, rank, dtype=dtype, device=device))


def weight_of(layer: nn.Module) -> Tensor:
    """[out, in] float32: the weight that a dense or compressed layer stands for."""
    weight, scale = layer.weight.detach().float(), getattr(layer, "scale", None)
    return weight * scale if scale is not None and layer.weight.element_size() == 1 else weight


def running_covariance(samples: Tensor) -> Tensor:
    """[I, I] of inputs [N, T, I]: sum of x^T x / N, each sample's share shrinking by N / (N + 1) with every later one.

    What EoRA's code computes; the paper means the plain mean.
    """
    count = len(samples)
    out = samples.new_zeros(samples.shape[-1], samples.shape[-1])
    for sample in samples:
        out = out * (count / (count + 1)) + sample.T @ sample / count
    return out


def eigenspace_low_rank(error: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [O, r], A [r, I]) float32 with B A nearest to `error` [O, I] as the inputs with this covariance [I, I] see it.

    The error is turned into the eigenspace of the covariance, scaled by the roots of the eigenvalues, cut by SVD, and
    turned back. Eigenvalues that are not positive count as the smallest positive one.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    positive = values[values > values.amax() * 1e-14]
    floor = positive.amin() if len(positive) else torch.ones((), dtype=torch.float64, device=values.device)
    root = torch.where(values > values.amax() * 1e-14, values, floor).sqrt()
    forward, back = (vectors * root).float(), (vectors / root).T.float()
    b, a = svd_low_rank(error.float() @ forward, rank)
    return b, a @ back


def svd_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [O, r], A [r, I]), the best product of that rank, the singular values shared evenly."""
    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def save_adapter(vlm: VLM, path: str | Path) -> None:
    """Write the low-rank parts of `vlm` as a LoRA adapter in PEFT's form: adapter_model.safetensors,
    adapter_config.json.

    lora_alpha is the rank, so PEFT scales by 1. The base that it belongs to is `without_adapter`, not the dense model:
    its weights are compressed, and may be in another scale. Raises UnsupportedError when there are no parts, or parts
    of several ranks; CheckpointError when the files cannot be written.
    """
    found = {name: m for name, m in vlm.model.named_modules() if isinstance(m, LowRankLinear)}
    ranks = {m.lora_A.shape[0] for m in found.values()}
    if len(ranks) != 1:
        has = f"ranks {', '.join(map(str, sorted(ranks)))}" if ranks else "no low-rank parts"
        raise UnsupportedError(f"this model has {has}; an adapter needs one rank: apply eora or lq_lora with one")
    (rank,) = ranks
    tensors = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach().contiguous().clone()
        for name, layer in found.items()
        for part in ("lora_A", "lora_B")
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": vlm.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(found),
    }
    folder = Path(path)
    text = folder / ".adapter_config.json.part"
    with plain_errors(path, folder, "nothing was changed"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_tensors(folder / "adapter_model.safetensors", tensors)
            text.replace(folder / "adapter_config.json")
        finally:
            text.unlink(missing_ok=True)


def without_adapter(vlm: VLM) -> VLM:
    """`vlm` without the parts that eora put beside its layers: the base of what `save_adapter` writes. Tensors are
    shared. Raises UnsupportedError when there are none (the parts of lq_lora are no addition: they stay)."""
    from foveate.vlm import VLM

    rest = tuple(method for method in vlm.recipe if getattr(method, "exclusive", "") != "adapter")
    if len(rest) == len(vlm.recipe):
        raise UnsupportedError(f"the recipe of this model, {vlm.recipe.text() or 'none'}, has no eora to take off")
    shared = [*vlm.model.parameters(), *vlm.model.buffers()]
    model = copy.deepcopy(vlm.model, {id(tensor): tensor for tensor in shared})
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        model.set_submodule(name, layer.base)
    made = VLM(vlm.adapter.with_model(model), vlm.name, type(vlm.recipe)(rest))
    made.calibration = vlm.calibration
    return made
