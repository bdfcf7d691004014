"""A scene is the same in every process: nothing in it may hang on the order of a set."""

from __future__ import annotations

import os
import subprocess
import sys

DRAW = """
from foveate import world
for kind in world.KINDS:
    for index in range(25 if kind in ("boxes", "inventory") else 4):
        scene = world.draw(kind, index, seed=3)
        print(scene.signature, scene.questions)
"""


def test_scenes_do_not_depend_on_the_seed_of_hashes():
    drawn = [
        subprocess.run(
            [sys.executable, "-c", DRAW], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0].splitlines()) > 100
