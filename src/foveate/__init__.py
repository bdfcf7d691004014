"""Foveate: visual language models that are cheap at every stage of their life.

Importing the package is silent and cheap: torch and transformers are imported by the first call that needs them. Every
registered method is here by its name: `foveate.fastv(keep=0.25)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.recipe import Recipe
    from foveate.registry import METHODS
    from foveate.vlm import VLM, load

__version__ = "0.1.0"

_LAZY = {"load": "foveate.vlm", "VLM": "foveate.vlm", "Recipe": "foveate.recipe", "methods": "foveate.recipe"}
__all__ = ["METHODS", "VLM", "Recipe", "__version__", "load", "methods"]


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        return import_module("foveate.registry").METHODS
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    methods = import_module("foveate.registry").METHODS
    if not name.startswith("_") and name in methods:
        return methods.get(name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
