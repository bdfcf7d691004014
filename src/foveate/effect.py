"""What a recipe does to a model, measured: bytes of the weights, bytes of the cache per token, visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from foveate.adapters.layout import VisualLayout
    from foveate.data.plan import Plan
    from foveate.vlm import VLM


@dataclass(frozen=True)
class Effect:
    """Before and after. weights: bytes of each part; cache: bytes per token of one request; tokens: visual tokens kept
    of the reference request (one 640 x 480 picture, unless a plan was given)."""

    recipe: str
    weights: dict[str, tuple[int, int]]
    cache: tuple[float, float]
    tokens: tuple[int, int]

    @property
    def total(self) -> tuple[int, int]:
        """Bytes of all parts, before and after."""
        return sum(before for before, _ in self.weights.values()), sum(after for _, after in self.weights.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: {"recipe", "weights": {part: {"before", "after"}}, "cache", "tokens"}."""

        def pair(values: tuple[float, float]) -> dict[str, float]:
            return {"before": values[0], "after": values[1]}

        parts = {name: pair(values) for name, values in self.weights.items()}
        return {"recipe": self.recipe, "weights": parts, "cache": pair(self.cache), "tokens": pair(self.tokens)}

    def text(self) -> str:
        """A line for each thing that changed."""
        lines = [f"recipe: {self.recipe or 'none'}"]
        if self.total[0] != self.total[1]:
            parts = ", ".join(f"{name} {_size(a)} -> {_size(b)}" for name, (a, b) in self.weights.items() if a != b)
            lines.append(f"  weights        {_size(self.total[0])} -> {_size(self.total[1])}  ({parts})")
        if self.cache[0] != self.cache[1]:
            lines.append(f"  cache          {self.cache[0]:.0f} -> {self.cache[1]:.0f} bytes per token")
        if self.tokens[0] != self.tokens[1]:
            lines.append(f"  visual tokens  {self.tokens[0]} -> {self.tokens[1]} for the reference picture")
        return "\n".join(lines)


def effect(before: VLM, after: VLM, plan: Plan | None = None) -> Effect:
    """Compare two models of one family; plan: the request whose visual tokens are counted."""
    old, new = before.adapter.parts(), after.adapter.parts()
    weights = {name: (_part_bytes(old, name), _part_bytes(new, name)) for name in old}
    plan = plan or _reference(after)
    layout = after.adapter.layout(plan).features()
    return Effect(
        recipe=after.recipe.text(),
        weights=weights,
        cache=(cache_bytes_per_token(before), cache_bytes_per_token(after)),
        tokens=(_kept(before, layout), _kept(after, layout)),
    )


def _part_bytes(parts: dict[str, nn.Module], name: str) -> int:
    """Bytes of one part, without those of parts that lie inside it."""
    from foveate.weights.base import module_bytes

    inside = {id(module) for module in parts[name].modules()}
    nested = [part for other, part in parts.items() if other != name and id(part) in inside]
    return module_bytes(parts[name]) - sum(map(module_bytes, nested))


def _kept(vlm: VLM, layout: VisualLayout) -> int:
    """Visual tokens of `layout` that are left in the last layer."""
    from foveate.reduce.base import tokens_per_layer

    return tokens_per_layer(vlm.reducers(), layout.sizes(), vlm.adapter.shape)[-1]


def cache_bytes_per_token(vlm: VLM) -> float:
    """Bytes that one token of one request takes in all layers of the cache, measured on a filled cache."""
    from foveate.cache.base import bytes_per_token, head_width

    config = vlm.adapter.text_config
    return bytes_per_token(vlm.new_cache(), config.num_key_value_heads, head_width(config), vlm.dtype)


def _reference(vlm: VLM) -> Plan:
    if "vision_tower" not in vlm.adapter.parts():
        return vlm.plan([{"role": "user", "content": "?"}])
    from PIL import Image

    part = {"type": "image", "image": Image.new("RGB", (640, 480))}
    return vlm.plan([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
