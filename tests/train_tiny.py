"""What the tests of training share: a tiny model with its tokenizer, and samples of noise with short questions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from foveate.data.sample import ImageSource, Sample
from foveate.nvila import PRESETS, NvilaForConditionalGeneration, init_weights_for_training
from foveate.train.batch import BatchMaker, MicroBatch
from foveate.train.config import Stage, TrainRecipe
from foveate.train.tokenizer import train_tokenizer

TEXTS = [
    "what colour is the ring? red green blue",
    "how many marks are there? 0 1 2",
    "read it: A1 B2",
    "where? left",
]


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 3, vocab_size=300)


def tiny_model(seed: int = 0) -> NvilaForConditionalGeneration:
    """The embedded architecture with one layer of width 32 in each part."""
    config = PRESETS.get("nano").config(tokenizer())
    config.vision_config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    config.vision_config.num_attention_heads = 1
    config.text_config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2})
    config.text_config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.mm_hidden = 64
    torch.manual_seed(seed)
    model = NvilaForConditionalGeneration._from_config(config, attn_implementation="eager")
    init_weights_for_training(model, seed)
    # a head of ordinary size, so that logits differ enough to compare
    torch.nn.init.normal_(model.llm.lm_head.weight, std=0.3)
    return model


def noise_sample(seed: int, questions: int = 2, pictures: int = 1, sides: tuple[int, int] = (96, 80)) -> Sample:
    """Noise pictures with `questions` branches of different lengths."""
    rng = np.random.default_rng(seed)
    media = [ImageSource(rng.integers(0, 256, (*sides, 3), dtype=np.uint8), f"noise {i}") for i in range(pictures)]
    branches = [[(f"read mark {k}?" + " red" * k, f"blue {seed}{k}")] for k in range(questions)]
    return Sample(f"noise-{seed}", media, branches)


def stage(**changes: Any) -> Stage:
    values = {"name": "s", "steps": 4, "batch_size": 2, "mixture": {"world/scene": 1.0}, "max_length": 512}
    return Stage(**{**values, **changes})


def recipe(*stages: Stage, **changes: Any) -> TrainRecipe:
    return TrainRecipe(**{"model": "nano", "stages": stages or (stage(),), **changes})


def batch_of(model: NvilaForConditionalGeneration, samples: list[Sample], **changes: Any) -> MicroBatch:
    """One micro-batch with all branches of `samples`, without a mixture."""
    where = stage(questions_per_sample=0, **changes)
    maker = BatchMaker(where, model.spec, tokenizer(), None, wants_text=True, wants_dense=False)  # type: ignore[arg-type]
    return maker._join([maker.prepare(s, np.random.default_rng(0)) for s in samples])
