"""`ModelShape`: the numbers of a model that costs depend on, read off its config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from foveate.adapters.sizes import Sizes
    from foveate.data.spec import PreprocessSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class ModelShape:
    """Every number of a model that a cost depends on. Made by `from_config`; nothing is loaded."""

    patches: int
    """Patches of one view."""
    patch_inputs: int
    """Values of one patch: channels x patch x patch."""
    vision_layers: int
    """Layers that run: those after the selected hidden state are not computed."""
    vision_width: int
    vision_mlp: int
    connector: tuple[tuple[int, int], ...]
    """(inputs, outputs) of the connector's linear layers."""
    view_tokens: int
    """Tokens of one view after the connector."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int
    tied: bool = False
    sizes: Sizes | None = None
    """What else a family of transformers says of its tower and connector; None: NVILA."""
    sites: tuple[str, ...] = ()
    """Where the family lets reducers act; empty: anywhere."""

    @classmethod
    def from_config(cls, config: Any, spec: PreprocessSpec) -> ModelShape:
        """From a config of any family and its preprocessing."""
        from foveate.adapters import ADAPTERS

        text, kind = config.get_text_config(), ADAPTERS.get(config.model_type)
        heads = text.num_attention_heads
        if hasattr(config, "num_vision_layers"):
            vision, sizes = config.vision_config, None
            tower: dict[str, Any] = {
                "patch_inputs": getattr(vision, "num_channels", 3) * spec.patch_size**2,
                "vision_layers": config.num_vision_layers,
                "vision_width": vision.hidden_size,
                "vision_mlp": vision.intermediate_size,
                "connector": connector_linears(config.projector_type, config.mm_hidden, text.hidden_size),
            }
        else:
            sizes = kind.sizes(config)
            tower = {
                "patch_inputs": sizes.patch_inputs,
                "vision_layers": sizes.layers,
                "vision_width": sizes.width,
                "vision_mlp": sizes.mlp,
                "connector": sizes.connector,
            }
        return cls(
            **tower,
            sizes=sizes,
            sites=kind.sites,
            patches=spec.side**2,
            view_tokens=spec.token_side**2,
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=text.intermediate_size,
            vocab=text.vocab_size,
            tied=bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def tower_params(self) -> int:
        """Matrix weights of the tower's layers that run."""
        return self.patch_inputs * self.vision_width + self.vision_layers * self.tower_layer_params

    @property
    def tower_layer_params(self) -> int:
        """Matrix weights of one layer of the tower."""
        return 4 * self.vision_width**2 + self.mlp_matrices * self.vision_width * self.vision_mlp

    @property
    def mlp_matrices(self) -> int:
        """Matrices of an MLP of the tower: 3 where it is gated."""
        return self.sizes.mlp_matrices if self.sizes else 2

    @property
    def connector_params(self) -> int:
        """Matrix weights of the connector."""
        return sum(inputs * outputs for inputs, outputs in self.connector)

    @property
    def layer_params(self) -> int:
        """Matrix weights of one layer of the language model."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return 2 * self.width * queries + 2 * self.width * keys + 3 * self.width * self.mlp

    @property
    def head_params(self) -> int:
        """Matrix weights of the output head."""
        return self.width * self.vocab

    def linears(self) -> dict[str, list[tuple[int, int, int]]]:
        """(inputs, outputs, how many) of the linear layers of each part; the output head is not among them."""
        v, m, d = self.vision_width, self.vision_mlp, self.width
        queries, keys, n = self.heads * self.head_size, self.kv_heads * self.head_size, self.layers
        k = self.vision_layers
        return {
            "vision_tower": [(v, v, 4 * k), (v, m, (self.mlp_matrices - 1) * k), (m, v, k)],
            "mm_projector": [(inputs, outputs, 1) for inputs, outputs in self.connector],
            "llm": [(d, queries, n), (d, keys, 2 * n), (queries, d, n), (d, self.mlp, 2 * n), (self.mlp, d, n)],
        }


def connector_linears(kind: str, channels: int, width: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of the linear layers of a connector of the NVILA family. Raises UnknownNameError."""
    c, d = channels, width
    chains = {
        "identity": (),
        "linear": (c, d),
        "mlp_downsample": (4 * c, d, d),
        "mlp_downsample_2x2_fix": (4 * c, d, d),
        "mlp_downsample_3x3_fix": (9 * c, 3 * c, d, d),
        "mlp_downsample_3x3_s2": (9 * c, 3 * c, c, c // 3, d, d),
        "mlp_downsample_3x3_s2_new": (9 * c, 4 * c, 2 * c, c, c // 3, d, d),
    }
    if match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        chain: tuple[int, ...] = (c, *[d] * int(match[1]))
    elif kind in chains:
        chain = chains[kind]
    else:
        raise UnknownNameError(f"unknown connector {kind!r}: known: {', '.join(chains)}, mlp<k>x_gelu")
    return tuple(pairwise(chain))


def bytes_of(dtype: Any) -> int:
    """Bytes of one value of a dtype given by name or as torch.dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise InputError(f"dtype {name!r} is not one of {', '.join(BYTES)}")
    return BYTES[name]
