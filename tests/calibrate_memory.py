"""Peak memory of calibration at two depths, one JSON object: run in a process of its own by test_weights_memory.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import foveate
import test_text_models
from foveate.bench.memory import watched
from foveate.recipe import Recipe
from foveate.weights.base import module_bytes

WIDTH, INNER, LENGTH = 256, 1024, 512
DEPTHS = (2, 8)


def model(folder: Path, depth: int) -> foveate.VLM:
    """A random decoder language model of so many blocks."""
    test_text_models.SHAPE |= {"num_hidden_layers": depth, "hidden_size": WIDTH, "intermediate_size": INNER}
    test_text_models.SHAPE |= {"max_position_embeddings": LENGTH}
    return foveate.load(test_text_models.make(folder), device="cpu")


def main(recipes: list[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[int, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {depth: model(Path(folder) / str(depth), depth) for depth in DEPTHS}
        for vlm in models.values():  # tensors of a file count when they are first looked at
            assert all(bool(tensor.isfinite().all()) for tensor in vlm.model.parameters())
        for text in recipes:
            recipe = Recipe.parse(text)
            recipe.apply(models[DEPTHS[0]], quiet=True)  # what libraries take once
            for depth in DEPTHS:
                with watched() as memory:
                    small = recipe.apply(models[depth], quiet=True)
                blocks = module_bytes(small.adapter.layers)
                found.setdefault(text, {})[depth] = {"peak": memory["peak"] - memory["before"], "blocks": blocks}
                del small
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
