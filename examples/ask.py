"""Ask the embedded model about a drawn picture and a drawn clip, whole and with half of the visual tokens.

python examples/ask.py
"""

from __future__ import annotations

import argparse

import foveate
from foveate import world


def main(model: str = "nano") -> None:
    vlm = foveate.load(model)

    scene = world.draw("scene", 3, split="test")
    question = next(q for q in scene.questions if not q.auxiliary)
    for reduce in ("none", "uniform(keep=0.5)"):
        answer = vlm.ask(scene.images[0], question.text, reduce=reduce, max_new_tokens=8)
        print(f"{question.text} {answer.text!r} (true: {question.answer}), {answer.tokens['kept']} visual tokens")

    clip = world.draw("clip_motion", 3, split="test", frames=16)
    question = clip.questions[0]
    answer = vlm.ask([clip.images], question.text, max_new_tokens=8)  # a list of pictures is one clip
    print(f"{question.text} {answer.text!r} (true: {question.answer}), {len(clip.images)} frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder or preset (default: nano)")
    main(**vars(parser.parse_args()))
