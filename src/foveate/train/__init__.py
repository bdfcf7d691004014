"""Training: stages as data, exact token-mean losses, packing without cross-talk, and resume that repeats bit for bit.

    from foveate.train import Trainer, load_recipe
    Trainer(load_recipe("nano")).run()

Names are loaded when first used, so importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Stage": "config",
    "TrainRecipe": "config",
    "load_recipe": "config",
    "parse_recipe": "config",
    "shipped_recipes": "config",
    "LOSSES": "config",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "build_tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
