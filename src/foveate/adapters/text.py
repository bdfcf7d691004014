"""Language models without eyes: plain decoders of transformers, for weights, caches and perplexity.

A chat goes through the tokenizer's own template; without one its texts are joined and continued.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from foveate.adapters.base import Encoded
from foveate.adapters.hf import HfAdapter
from foveate.adapters.layout import VisualLayout
from foveate.adapters.sizes import Sizes
from foveate.data.plan import Plan, Span
from foveate.data.spec import PreprocessSpec
from foveate.errors import BudgetError, CheckpointError, InputError

if TYPE_CHECKING:
    from foveate.data.execute import Inputs


class TextAdapter(HfAdapter):
    """A causal language model of transformers with one part, "llm"."""

    renames = ()
    embedding = "model.embed_tokens.weight"
    sites = ("cache",)

    @classmethod
    def canonical(cls, key: str) -> str:
        return key

    @classmethod
    def read_spec(cls, path: Path) -> PreprocessSpec:
        return PreprocessSpec(mode="resize")  # never used: there is nothing to prepare

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        return Sizes(layers=0, width=0, mlp=0, heads=0, patch_inputs=0, connector=())

    @classmethod
    def check_tokens(cls, tokenizer: Any, spec: PreprocessSpec, config: Any, path: Path) -> None:
        if len(tokenizer) > config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens, the embedding {config.vocab_size} rows in {path}"
            )

    def write_spec(self, folder: Path) -> None:
        return None  # there is no picture to prepare

    @classmethod
    def parts_of(cls, model: Any) -> dict[str, nn.Module]:
        return {"llm": model.model}

    @property
    def signals(self) -> tuple[str, ...]:
        return ()

    @property
    def num_blocks(self) -> int:
        return 0

    @property
    def placeholders(self) -> tuple[int, ...]:
        return ()

    # ---- one request

    def plan(self, messages: Sequence[dict[str, Any]], **options: Any) -> Plan:
        turns = [(message.get("role"), _text(message.get("content"))) for message in messages]
        if not turns:
            raise InputError("there are no messages; give at least one user message")
        answered = turns[-1][0] == "assistant"
        ids = self._ids(turns, not answered)
        labels = None
        if answered:
            before = self._ids(turns[:-1], True)
            shared = next((i for i, (a, b) in enumerate(zip(before, ids)) if a != b), min(len(before), len(ids)))
            labels = np.array([-100] * shared + ids[shared:], np.int64)
        limit = options.get("max_context")
        if limit and len(ids) > limit:
            raise BudgetError(f"the prompt has {len(ids)} tokens, the limit is {limit}; shorten it")
        return Plan(np.array(ids, np.int64), labels, (), (Span("text", 0, len(ids)),), self.spec)

    def _ids(self, turns: Sequence[tuple[Any, str]], generate: bool) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": role, "content": text} for role, text in turns]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(self.tokenizer(" ".join(text for _, text in turns)).input_ids)

    def stop_ids(self) -> list[int]:
        config = self.model.generation_config
        known = [] if config is None or config.eos_token_id is None else config.eos_token_id
        found = [self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
        return [index for index in dict.fromkeys(found) if index is not None]

    def layout(self, plan: Plan) -> VisualLayout:
        return VisualLayout.join([])

    def encode(
        self,
        inputs: Sequence[Inputs],
        plans: Sequence[Plan],
        signals: Collection[str] = (),
        *,
        stop: str = "post_projector",
    ) -> list[Encoded]:
        nothing = self.model.get_input_embeddings().weight.new_zeros(0, self.text_config.hidden_size)
        return [Encoded(nothing) for _ in plans]

    def embed(
        self, input_ids: Tensor, features: Tensor, *, deep: Sequence[Tensor] = (), newlines: Tensor | None = None
    ) -> dict[str, Any]:
        return {"inputs_embeds": self.model.get_input_embeddings()(input_ids)}


def _text(content: Any) -> str:
    """The text of a message. Raises InputError for pictures and clips."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InputError("this language model sees no pictures or clips; ask it with text alone")
    return " ".join(str(part["text"]) for part in parts)


class LlamaAdapter(TextAdapter):
    """LlamaForCausalLM."""

    family = "llama"
    architecture = "LlamaForCausalLM"


class MistralAdapter(TextAdapter):
    """MistralForCausalLM."""

    family = "mistral"
    architecture = "MistralForCausalLM"


class Qwen2Adapter(TextAdapter):
    """Qwen2ForCausalLM."""

    family = "qwen2"
    architecture = "Qwen2ForCausalLM"


class Qwen3Adapter(TextAdapter):
    """Qwen3ForCausalLM."""

    family = "qwen3"
    architecture = "Qwen3ForCausalLM"


class Phi3Adapter(TextAdapter):
    """Phi3ForCausalLM."""

    family = "phi3"
    architecture = "Phi3ForCausalLM"


class Olmo2Adapter(TextAdapter):
    """Olmo2ForCausalLM."""

    family = "olmo2"
    architecture = "Olmo2ForCausalLM"
