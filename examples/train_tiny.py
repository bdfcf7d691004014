"""Thirty steps of training: the tower on labels of every patch, then everything on questions, and the loss it leaves.

    python examples/train_tiny.py --out runs/tiny

The run leaves metrics.jsonl, checkpoints and a model folder. Thirty steps teach nothing; `foveate train nano` is the
whole recipe. Kill it and start it again with --resume: it goes on exactly where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import foveate
from foveate.train import Trainer
from foveate.train.config import parse_recipe

RECIPE = """
name: tiny
model: nano
save_every: 10
log_every: 5
threads: 1
stages:
  - name: tower
    steps: 10
    batch_size: 4
    train: [vision_tower, heads]
    losses: {dense: 1.0}
    mixture: {world/scene: 1}
  - name: all
    steps: 20
    batch_size: 4
    optimizer: muon
    lr: 0.02
    adamw_lr: 0.003
    losses: {lm: 1.0, dense: 0.5}
    questions_per_sample: 4
    max_length: 256
    mixture: {world/scene: 2, world/tags: 1}
"""


def main(out: str = "runs/tiny", resume: bool = False, scale: float = 1.0) -> None:
    recipe = dataclasses.replace(parse_recipe(RECIPE).scaled(scale), output=out)
    result = Trainer(recipe, quiet=True).run(resume)
    print(f"{result.step} steps in {result.seconds:.1f} s, loss {result.loss:.2f}")
    print(foveate.load(Path(result.model or out)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/tiny", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the steps")
    main(**vars(parser.parse_args()))
