"""Training a family of transformers: its adapter prepares, encodes and embeds as it does for answers.

Packing holds for them as for NVILA, M-RoPE positions included, because masks and positions are given for each token.
Language models with a sliding window take no mask of ours; they get one sample a row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.adapters.decoder import attention_kinds
from foveate.adapters.layout import NEWLINE
from foveate.data.plan import Plan, Span
from foveate.errors import RecipeError
from foveate.train.attention import additive_mask, compute_dtype

if TYPE_CHECKING:
    from foveate.adapters.hf import HfAdapter
    from foveate.data.spec import PreprocessSpec
    from foveate.train.batch import MicroBatch
    from foveate.train.config import Stage
    from foveate.train.packing import Tokens


class Family(nn.Module):
    """A model of transformers in training, its parameters under the names of PARTS.

    adapter: around the model. packs: whether samples may share a row.
    """

    def __init__(self, adapter: HfAdapter) -> None:
        super().__init__()
        self.adapter = adapter
        parts, model = adapter.parts(), adapter.model
        # first the connector: Qwen's lies in the tower, and a shared parameter counts where it is met first
        self.mm_projector = nn.ModuleDict({"connector": parts["mm_projector"]})
        self.vision_tower = parts["vision_tower"]
        self.llm = nn.ModuleDict({"model": parts["llm"], "lm_head": model.get_output_embeddings()})
        mine = {id(parameter) for parameter in self.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in mine:  # LLaVA's newline vector
                self.mm_projector.register_parameter(name.replace(".", "_"), parameter)
        self.packs = attention_kinds(adapter.text_config) == {"full_attention"}

    @property
    def spec(self) -> PreprocessSpec:
        return self.adapter.spec

    @property
    def device(self) -> torch.device:
        return self.adapter.model.device

    def check_stage(self, stage: Stage) -> None:
        """Raise RecipeError for what only NVILA can do."""
        if stage.low_resolution:
            raise RecipeError(
                f"stage {stage.name!r}: low_resolution is {stage.low_resolution}, which is for NVILA's tiles; "
                f"remove it for {self.adapter.family} (preprocess makes all its pictures smaller)"
            )

    def check_loss(self, name: str, kind: Any) -> None:
        """Raise RecipeError for a loss that reads the tower's patches."""
        if not kind.needs_llm:
            raise RecipeError(
                f"loss {name!r} reads the patches of an NVILA tower; train {self.adapter.family} with 'lm' or 'soft_ce'"
            )

    def run(self, batch: MicroBatch) -> tuple[Tensor, nn.Module]:
        """States [R, L, D] that leave the decoder, and the head that makes logits of them."""
        encoded = self.adapter.encode(batch.inputs, batch.plans)
        features = torch.cat([item.features for item in encoded])
        deep = [torch.cat(level) for level in zip(*(item.deep for item in encoded if item.deep))]
        prompt = self.adapter.embed(batch.input_ids, features, deep=deep, newlines=batch.newlines)
        mask = batch.allowed
        if self.packs:
            mask = additive_mask(mask, compute_dtype(prompt["inputs_embeds"]))
        out = self.adapter.text_model(**prompt, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
        return out.last_hidden_state, self.llm["lm_head"]


def core(model: nn.Module) -> Any:
    """The model of transformers inside of what is trained."""
    return model.adapter.model if isinstance(model, Family) else model


def place(adapter: HfAdapter, prefix: Plan, tokens: Tokens) -> Plan:
    """Fill in where `tokens` stand, and return the plan of the prefix with its first branch."""
    ids = tokens.branches[0][0]
    size = len(prefix.input_ids)
    rest = (Span("text", size, len(ids)),) if size else ()
    plan = dataclasses.replace(
        prefix, input_ids=np.concatenate([prefix.input_ids, ids]), labels=None, spans=(*prefix.spans, *rest)
    )
    positions = adapter.positions(plan)
    if positions.dim() > 1:
        tokens.positions = positions.numpy()
    if plan.media:
        where = adapter.layout(plan)
        tokens.newlines = where.position[where.kind == NEWLINE].numpy()
    return plan


def load_family(folder: Path) -> Family | None:
    """The checkpoint in `folder`, float32 on the CPU; None for NVILA's. Raises RecipeError if it cannot be trained."""
    from foveate.adapters.nvila import NvilaAdapter
    from foveate.adapters.text import TextAdapter
    from foveate.recipe import Recipe
    from foveate.vlm import family_of

    kind = family_of(folder)
    if issubclass(kind, NvilaAdapter):
        return None
    if issubclass(kind, TextAdapter):
        raise RecipeError(f"{folder} is a language model without eyes ({kind.family}); give a model that sees pictures")
    recipe = Recipe.restore(folder, kind.family)
    if recipe.of("weights"):
        raise RecipeError(f"{folder} was compressed by {recipe.text()}; give the folder of the uncompressed checkpoint")
    return Family(kind.load(folder, dtype=torch.float32, device=torch.device("cpu"), attn="eager"))
