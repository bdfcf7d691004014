"""Adapters: what Foveate knows of each model family; nothing outside this folder knows a model class by name."""

from __future__ import annotations

from foveate.registry import Registry

ADAPTERS = Registry(
    "model family",
    {
        "foveate_nvila": "foveate.adapters.nvila:NvilaAdapter",
        "llava_llama": "foveate.adapters.nvila:NvilaAdapter",
        "nvila": "foveate.adapters.nvila:NvilaAdapter",
        "nvila_lite": "foveate.adapters.nvila:NvilaAdapter",
        "vila": "foveate.adapters.nvila:NvilaAdapter",
    },
    group="foveate.adapters",
)
"""Adapter classes by the `model_type` of a checkpoint's config.json."""
