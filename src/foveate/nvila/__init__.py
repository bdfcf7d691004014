"""The NVILA model (arXiv 2412.04468): config, modeling, presets, checkpoints, processor.

Importing this package registers the model with the Auto classes of transformers. The parts:

    configuration   NvilaConfig                         features     the map algebra (tiles, scales, pooling)
    connector       projectors, learned positions       modeling     NvilaForConditionalGeneration
    presets         published sizes and `nano`          initialise   weights before training
    checkpoint      load, save, convert                 layouts, weights   configs and tensors of each layout
    processing      NvilaProcessor
"""

from __future__ import annotations

from foveate.nvila.checkpoint import convert, load, load_config, save
from foveate.nvila.configuration import NvilaConfig
from foveate.nvila.initialise import init_weights_for_training
from foveate.nvila.modeling import NvilaForConditionalGeneration, NvilaOutput, VisualFeatures
from foveate.nvila.presets import PRESETS, build
from foveate.nvila.processing import NvilaProcessor

__all__ = [
    "PRESETS",
    "NvilaConfig",
    "NvilaForConditionalGeneration",
    "NvilaOutput",
    "NvilaProcessor",
    "VisualFeatures",
    "build",
    "convert",
    "init_weights_for_training",
    "load",
    "load_config",
    "register",
    "save",
]


def register() -> None:
    """Make `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` know NVILA; may be called again."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    AutoConfig.register(NvilaConfig.model_type, NvilaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(NvilaConfig, NvilaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(NvilaConfig, NvilaProcessor, exist_ok=True)


register()
