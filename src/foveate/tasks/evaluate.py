"""Evaluate a model on tasks: accuracy with its interval and chance for each, and one record a question on request."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import BudgetError, InputError
from foveate.progress import progress as show_progress
from foveate.tasks.base import Item, Task, chance_level, find_tasks, majority
from foveate.tasks.scores import judge
from foveate.tasks.stats import wilson
from foveate.tasks.yesno import pope_metrics

if TYPE_CHECKING:
    from foveate.vlm import VLM

_log = logging.getLogger("foveate")
MAX_REASONS = 100


@dataclass(frozen=True)
class Record:
    """What happened to one question. Records of two models on the same seed pair up by (task, id)."""

    task: str
    id: str
    answer: str
    prediction: str
    correct: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def evaluate(
    vlm: VLM,
    tasks: Sequence[str | Task] = ("world",),
    *,
    seed: int = 0,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    recipe: Any = None,
    reduce: Any = None,
    batch_size: int = 32,
    num_frames: int | None = None,
    records: list[Record] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of `vlm` on `tasks`: the dictionary of `foveate eval --json`.

    tasks: names, aliases or Task objects. limit: questions per task. recipe: a Recipe or its text, applied to the model
    first; reduce: a token reduction for the requests alone. records: a list that receives one Record a question.
    Returns {"model", "recipe", "tasks": {name: {"n", "correct", "accuracy", "low", "high", "chance", "majority",
    "scorer", "version", "skipped"}}, "mean", "seconds"}; low and high are the 95 % Wilson interval, mean is over tasks.
    A task with skipped samples also has "reasons": the first hundred by name.
    Raises UnknownNameError, InputError (no data, or no usable question), RecipeError.
    """
    start = time.monotonic()
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch size {batch_size} and limit {limit}: both must be at least 1")
    chosen, folder = _tasks(tasks, data_dir)
    if recipe:
        from foveate.recipe import Recipe

        vlm = (Recipe.parse(recipe) if isinstance(recipe, str) else recipe).apply(vlm)
    results: dict[str, Any] = {}
    without_clips: list[str] = []
    for task in chosen:
        items = task.items(limit, seed, folder)
        if len(chosen) > 1 and not vlm.adapter.takes_clips and items and all(map(_shows_clips, items)):
            without_clips.append(task.name)
            continue
        found, skipped = _run_task(vlm, task, items, reduce, batch_size, num_frames, progress)
        if not found:
            reason = next(iter({**task.skipped, **skipped}.values()), "it has no questions")
            raise InputError(f"task {task.name!r} gave no usable question: {reason}")
        if records is not None:
            records.extend(found)
        results[task.name] = _summary(task, items, found, {**task.skipped, **skipped})
    if without_clips:
        text = f"{vlm.adapter.family} takes no clips, so these tasks are left out: {', '.join(without_clips)}"
        if not results:
            raise InputError(f"{text}; there is no other task")
        _log.warning(text)
    return {
        "model": vlm.name,
        "recipe": recipe_text(vlm, reduce),
        "tasks": results,
        "mean": sum(row["accuracy"] for row in results.values()) / len(results),
        "seconds": round(time.monotonic() - start, 3),
    }


def _shows_clips(item: Item) -> bool:
    """Whether a question is about a clip."""
    contents = [message["content"] for message in item.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and str(part.get("type")).startswith("video") for part in parts)


def recipe_text(vlm: VLM, reduce: Any = None) -> str | None:
    """What acts as one line, or None: the model's recipe, its reductions replaced by those of the requests."""
    kept = [method for method in vlm.recipe or () if reduce is None or method.socket != "reduce"]
    parts = [part.text() if hasattr(part, "text") else str(part) for part in (*kept, reduce) if part is not None]
    return " + ".join(part for part in parts if part and part != "none") or None


def _tasks(tasks: Sequence[str | Task], data_dir: str | Path | None) -> tuple[list[Task], Path | None]:
    chosen: list[Task] = []
    folder = None if data_dir is None else Path(data_dir)
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if isinstance(task, Task):
            chosen.append(task)
        else:
            found, folder = find_tasks([task], data_dir)
            chosen.extend(found)
    if not chosen:
        raise InputError("no task to evaluate; give at least one, for example 'world'")
    return list({task.name: task for task in chosen}.values()), folder


def _run_task(
    vlm: VLM, task: Task, items: list[Item], reduce: Any, batch_size: int, num_frames: int | None, show: bool
) -> tuple[list[Record], dict[str, str]]:
    """Records of the usable questions, and {id: reason} of the others."""
    found: list[Record] = []
    skipped: dict[str, str] = {}
    right = 0.0
    with show_progress(f"eval {task.name}", len(items), quiet=not show) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            for item, text in _answers(vlm, batch, task.max_new_tokens, reduce, num_frames):
                if isinstance(text, InputError | BudgetError):
                    skipped[item.id] = str(text)
                    continue
                score = judge(item.scorer, text, item.answers, item.choices)
                right += score
                found.append(Record(task.name, item.id, item.answers[0], text, score))
            bar.advance(len(batch), accuracy=f"{right / max(1, len(found)):.3f}")
    return found, skipped


def _answers(
    vlm: VLM, items: list[Item], max_new_tokens: int, reduce: Any, num_frames: int | None
) -> list[tuple[Item, str | InputError | BudgetError]]:
    """The answer of each item. When one input of a batch is bad, the batch is asked again one by one to find it."""
    from foveate.vlm import Request

    requests = [Request(messages=item.messages, reduce=reduce, num_frames=num_frames) for item in items]
    try:
        return [
            (item, answer.text)
            for item, answer in zip(items, vlm.answer(requests, max_new_tokens=max_new_tokens), strict=True)
        ]
    except (InputError, BudgetError) as error:
        if len(items) == 1:
            return [(items[0], error)]
    return [pair for item in items for pair in _answers(vlm, [item], max_new_tokens, reduce, num_frames)]


def _summary(task: Task, items: list[Item], found: list[Record], skipped: dict[str, str]) -> dict[str, Any]:
    right = sum(record.correct for record in found)
    low, high = wilson(right, len(found))
    ids = {record.id for record in found}
    used = [item for item in items if item.id in ids]
    yes_no = all(item.scorer == "pope" for item in used)  # its benchmark reports F1 and the share of yes too
    scorers = sorted({item.scorer for item in used})
    return {
        "n": len(found),
        "correct": int(right) if float(right).is_integer() else round(right, 6),
        "accuracy": right / len(found),
        "low": low,
        "high": high,
        "chance": chance_level(used),
        "majority": majority(used),
        "scorer": ", ".join(scorers),
        "version": task.version,
        "skipped": len(skipped),
        **({"reasons": dict(list(skipped.items())[:MAX_REASONS])} if skipped else {}),
        **({"detail": pope_metrics([r.prediction for r in found], [r.answer for r in found])} if yes_no else {}),
    }


def load_records(path: str | Path) -> list[Record]:
    """Records written by `foveate eval --records`. Raises InputError naming the bad line."""
    import json

    found: list[Record] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read records {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} line {number} is not a record of foveate eval: {error}") from error
    return found
