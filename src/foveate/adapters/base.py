"""`Adapter`: the few things that differ between families of visual language models, behind one interface.

An adapter owns every private or moving detail of its family and of transformers. It holds a model and no state of a
request: what a request needs is passed in and handed back, so requests with different methods share one adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from foveate.adapters.layout import VisualLayout
from foveate.adapters.shape import Shape
from foveate.errors import UnsupportedError

if TYPE_CHECKING:
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.data.spec import PreprocessSpec

COMMON_SIGNALS = ("request_key", "features", "text_embeddings")
"""Signals that the runtime makes: a checksum of the request's prompt and pixels, the visual features themselves, and
the embeddings [T, D] of the prompt's text tokens."""


@dataclass
class Encoded:
    """What the encoder makes of one request.

    features: [N, D] on the model's device, all pictures and clips in prompt order, separators left out.
    signals: name -> [N, ...] float32, aligned with `features`; signals of CLS itself have a row for each encoded view
    (see `Adapter.signals`). deep: for each of the first decoder layers what is added at the visual tokens to its
    output, [N, D] as the features (most families: none). layout: of the features, when some left inside the encoder.
    """

    features: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)
    deep: list[Tensor] = field(default_factory=list)
    layout: VisualLayout | None = None


class Adapter(ABC):
    """One family. `model` is its transformers model, `spec` its preprocessing.

    family: name in `Method.adapters`. sites: where reducers may act (foveate.adapters.shape.SITES). no_encoder: why
    "encoder" is not among them.
    """

    family: ClassVar[str]
    sites: ClassVar[tuple[str, ...]] = ("post_projector", "llm", "compute", "cache")
    has_cls: ClassVar[bool] = False
    no_encoder: ClassVar[str] = ""

    def __init__(self, model: nn.Module, tokenizer: Any, spec: PreprocessSpec) -> None:
        self.model, self.tokenizer, self.spec = model, tokenizer, spec

    # ---- the model

    @classmethod
    @abstractmethod
    def describe(cls, path: Path) -> tuple[Any, PreprocessSpec]:
        """Config and preprocessing of the checkpoint in the folder `path`, without its weights."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str | torch.dtype,
        device: torch.device,
        attn: str | None,
        prepare: Callable[[dict[str, nn.Module]], None] | None = None,
    ) -> Adapter:
        """The adapter around the checkpoint in the folder `path`; dtype "auto": as stored.

        prepare: called with the parts of the still empty model, before its tensors are read.
        """

    @abstractmethod
    def save(self, path: Path, extra: dict[str, dict[str, Any]]) -> None:
        """Write model, tokenizer, preprocessing spec and the JSON files `extra` (name -> content) into `path`.

        Whole or not at all: an error leaves an older checkpoint at `path` as it was. Raises CheckpointError.
        """

    @abstractmethod
    def with_model(self, model: nn.Module) -> Adapter:
        """The same family around another model of the same shape."""

    def with_spec(self, spec: PreprocessSpec) -> Adapter:
        """The same model with another preprocessing."""
        return type(self)(self.model, self.tokenizer, spec)

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The model's parts under their common names: "vision_tower", "mm_projector", "llm".

        One may lie inside another (Qwen's connector in its tower): it is then no part of the outer one.
        """

    @property
    @abstractmethod
    def signals(self) -> tuple[str, ...]:
        """Signals that `encode` can hand to reducers, COMMON_SIGNALS among them."""

    @property
    def text_config(self) -> Any:
        """The language model's config of transformers."""
        return self.model.config.get_text_config()

    def offers(self, name: str) -> bool:
        """Whether `encode` can hand out this signal; "name@l" names encoder block l."""
        return name.partition("@")[0] in self.signals

    def reason(self, need: str) -> str:
        """Why none of the signals of `need` ("a|b") is on offer, to follow the words "does not offer"."""
        cls = any(name.startswith("cls_") for name in need.split("|")) and not self.has_cls
        return ": its encoder has no CLS token" if cls else ""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks of the encoder that are used; the last of them feeds the connector."""

    @property
    def num_heads(self) -> int:
        """Attention heads of the encoder's blocks, 0 where they are of no use."""
        return 0

    @property
    def shape(self) -> Shape:
        """What decides where a reduction acts."""
        return Shape(
            self.num_blocks,
            len(self.layers),
            self.has_cls,
            self.sites,
            self.signals,
            self.num_heads,
            self.text_config.num_attention_heads,
            self.no_encoder,
        )

    @property
    def text_model(self) -> nn.Module:
        """The decoder of the language model, with `layers`, `norm` and `rotary_emb`."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the language model."""
        return self.text_model.layers

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 of the states that leave the last decoder layer, [..., D] -> [..., V]."""
        return self.model.get_output_embeddings()(self.text_model.norm(hidden)).float()

    @property
    @abstractmethod
    def placeholders(self) -> tuple[int, ...]:
        """Token ids that stand for visual features in `Plan.input_ids`."""

    @property
    def takes_clips(self) -> bool:
        """Whether clips may be asked about, beside pictures."""
        return not self.spec.family or bool(self.spec.video_token)

    @property
    def max_context(self) -> int:
        """Tokens, visual and text, that the language model takes."""
        return int(self.text_config.max_position_embeddings)

    # ---- one request

    def plan(self, messages: Sequence[dict[str, Any]], **options: Any) -> Plan:
        """What a chat will become. Options: those of `foveate.data.plan.plan`."""
        from foveate.data.plan import plan

        return plan(messages, self.spec, self.tokenizer, **options)

    def stop_ids(self) -> list[int]:
        """Token ids that end an answer."""
        from foveate.data.chat import stop_token_ids

        return stop_token_ids(self.tokenizer, self.spec)

    @abstractmethod
    def layout(self, plan: Plan) -> VisualLayout:
        """The visual tokens of a planned request, separators included."""

    @abstractmethod
    def encode(
        self,
        inputs: Sequence[Inputs],
        plans: Sequence[Plan],
        signals: Collection[str] = (),
        *,
        stop: str = "post_projector",
    ) -> list[Encoded]:
        """Features and signals of several requests in one pass through tower and connector.

        stop: "post_encoder" leaves the connector out: the features are then what `connect` takes.
        """

    def connect(self, features: Tensor) -> Tensor:
        """[K, C] -> [K, D], the connector alone. Only where it works token by token (site "post_encoder")."""
        raise UnsupportedError(f"the connector of {self.family!r} models joins neighbouring patches")

    def positions(self, plan: Plan) -> Tensor:
        """Position ids of the whole prompt: [L] int64 (a family with M-RoPE: [3, L])."""
        return torch.arange(len(plan.input_ids))

    def embed(
        self, input_ids: Tensor, features: Tensor, *, deep: Sequence[Tensor] = (), newlines: Tensor | None = None
    ) -> dict[str, Any]:
        """Arguments of `forward` for a padded batch: ids [B, L] with `features` [sum of K, D] in row-major order.

        deep: as `Encoded.deep`, of all rows. newlines: [B, L] bool, separators whose ids are placeholders.
        """
        embeds = self.model.get_input_embeddings()(input_ids)
        if features.shape[0]:
            slots = torch.isin(input_ids, torch.tensor(self.placeholders, device=input_ids.device))
            where = slots.flatten().nonzero().squeeze(1)
            embeds = embeds.flatten(0, 1).index_copy(0, where, features.to(embeds)).view_as(embeds)
        return {"inputs_embeds": embeds}

    @abstractmethod
    def forward(self, *, past_key_values: Cache, position_ids: Tensor, **inputs: Any) -> Tensor:
        """One pass of the language model: logits [B, V] of the last position, float32.

        inputs: what `embed` returned, or input_ids [B, 1] while decoding; attention_mask [B, cached + new] or None.
        """

    def new_cache(self) -> Cache:
        """The dense cache of one batch of requests."""
        return DynamicCache(config=self.model.config)
