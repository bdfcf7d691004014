"""Your own pictures and questions: write them as JSON lines, measure a model on them, and optimize it for them.

    python examples/your_own_data.py --out out/own-data

Here the pictures are drawn; yours go into the same form: one line {"image", "question", "answer"} for each question,
the path relative to the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

import foveate
from foveate import world
from foveate.optimize import Budget, optimize
from foveate.optimize.run import Effort
from foveate.tasks import evaluate, find_tasks


def write_questions(folder: Path, count: int) -> Path:
    """`count` pictures and a file questions.jsonl about them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (scene, question) in enumerate(world.evaluation_questions("colour", count, seed=5)):
        Image.fromarray(scene.images[0]).save(folder / f"{i:03d}.png")
        lines.append({"image": f"{i:03d}.png", "question": question.text, "answer": question.answer})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def main(model: str = "nano", out: str = "out/own-data", count: int = 40) -> None:
    questions = write_questions(Path(out) / "data", count)
    vlm = foveate.load(model)

    tasks, folder = find_tasks(data=questions)  # a file of questions becomes the task "data"
    row = evaluate(vlm, tasks, data_dir=folder, progress=False)["tasks"]["data"]
    print(f"accuracy {row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}] on {row['n']} questions")

    budget = Budget.parse(tokens="0.5x", loss="5pt")
    effort = Effort(timed=0)  # no timing, which takes longer than the questions of a small file
    model_folder = Path(out) / "model"
    report = optimize(vlm, budget, data=questions, out=model_folder, methods=["uniform"], effort=effort, quiet=True)
    print(report["verdict"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder or preset (default: nano)")
    parser.add_argument("--out", default="out/own-data", help="folder for the data, the model and the report")
    parser.add_argument("--count", type=int, default=40, help="pictures to draw")
    main(**vars(parser.parse_args()))
