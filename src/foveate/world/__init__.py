"""The drawn world: seeded pictures and clips with questions, answers and ground truth, as many as wanted.

It is the training data of the embedded model and the test bed of every compression method. `draw(kind, index)` makes a
scene with many questions, for training; `evaluation_samples(skill, n)` makes fresh scenes with one scored question each
and balanced answers. numpy and Pillow only.

    from foveate import world
    scene = world.draw("scene", 7)
    scene.images[0]            # uint8 [128, 128, 3]
    scene.questions[0].turns   # (("What colour is the circle?", "red"),)
"""

from __future__ import annotations

from foveate.world.evaluation import chance, evaluation_questions, evaluation_samples, kinds_of
from foveate.world.kinds import CLIP_KINDS, KINDS, LESSONS, draw
from foveate.world.scene import SPLITS, Box, Question, Scene
from foveate.world.vocabulary import CLIP_SKILLS, COLOURS, SHAPES, SKILLS

__all__ = [
    "CLIP_KINDS",
    "CLIP_SKILLS",
    "COLOURS",
    "KINDS",
    "LESSONS",
    "SHAPES",
    "SKILLS",
    "SPLITS",
    "Box",
    "Question",
    "Scene",
    "chance",
    "draw",
    "evaluation_questions",
    "evaluation_samples",
    "kinds_of",
]
