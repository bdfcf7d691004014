"""What a task is: named, versioned questions with accepted answers, and the scorer that judges them.

Built in: `world/<skill>` (drawn on demand, endless), the named sets of `foveate.data.datasets`, and `data`: a user's
own file in any format of `foveate.data.formats`. Others add tasks by the entry-point group `foveate.tasks`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, InputError, UnknownNameError
from foveate.registry import Registry
from foveate.tasks.scores import SCORERS, check_row
from foveate.world import SKILLS

if TYPE_CHECKING:
    from foveate.data.sample import Sample

TASKS = Registry("task", group="foveate.tasks")
"""Tasks by name. Values are `Task` objects (or lazy "module:attribute" strings of them)."""

ALIASES = {"world": tuple(f"world/{skill}" for skill in SKILLS)}
"""Short names for several tasks."""


@dataclass(frozen=True)
class Item:
    """One question: messages up to and with the question, the accepted answers, and the chance of guessing it.

    scorer: a name of `SCORERS`. choices: {letter: text} of a multiple-choice question.
    """

    id: str
    messages: list[dict[str, Any]]
    answers: tuple[str, ...]
    chance: float | None = None
    scorer: str = "exact"
    choices: dict[str, str] | None = None


@dataclass(frozen=True)
class Task:
    """Named questions. A subclass gives `samples`; everything else has a default.

    version: raised whenever a change makes numbers not comparable. scorer: a name of `SCORERS`, for the questions that
    name none of their own. only_scorer: judges every question, whatever it names.
    """

    name: str
    version: int = 1
    scorer: str = "exact"
    max_new_tokens: int = 16
    only_scorer: str | None = None
    skipped: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Bad samples of the last `items` call, id to reason."""

    def samples(self, limit: int | None, seed: int, data_dir: Path | None) -> list[Sample]:
        """At most `limit` samples, the same ones for the same seed. Raises InputError when the data are not there."""
        raise NotImplementedError

    def items(self, limit: int | None = None, seed: int = 0, data_dir: Path | None = None) -> list[Item]:
        """At most `limit` questions; each branch of a sample (an independent dialogue) is one question."""
        found: list[Item] = []
        for sample in self.samples(limit, seed, data_dir):
            try:
                found += self.items_of(sample)
            except FoveateError as error:  # a scorer or options that there are not
                self.skipped[sample.id] = str(error)
        return found[:limit]

    def items_of(self, sample: Sample) -> list[Item]:
        """The questions of one sample. Raises UnknownNameError (its scorer) and InputError (its options)."""
        scorer = self.only_scorer or sample.meta.get("scorer") or self.scorer
        choices = check_row(scorer, sample.meta.get("choices", sample.meta.get("options")))
        found = []
        for index, branch in enumerate(sample.branches):
            accepted = sample.meta.get("answers") or (branch[-1][1],)
            found.append(
                Item(
                    id=sample.id if len(sample.branches) == 1 else f"{sample.id}#{index}",
                    messages=sample.messages(branch=index, with_answer=False),
                    answers=tuple(str(answer) for answer in accepted),
                    chance=sample.meta.get("chance"),
                    scorer=scorer,
                    choices=choices,
                )
            )
        return found


@dataclass(frozen=True)
class WorldTask(Task):
    """One skill of the drawn world: fresh scenes of the test split, answers balanced."""

    skill: str = ""
    size: int = 200
    """Questions when no limit is given (the world has no end of its own)."""

    def samples(self, limit: int | None, seed: int, data_dir: Path | None) -> list[Sample]:
        from foveate.world import evaluation_samples

        return evaluation_samples(self.skill, self.size if limit is None else limit, split="test", seed=seed)


@dataclass(frozen=True)
class NamedTask(Task):
    """A public set read from a local folder by `foveate.data.datasets`."""

    dataset: str = ""
    split: str = "test"
    folder: str = ""
    """Its folder in the data folder; the name of the set when empty."""

    def samples(self, limit: int | None, seed: int, data_dir: Path | None) -> list[Sample]:
        from foveate.data.datasets import load_named

        return load_named(self.dataset, data_dir, self.split, limit=limit, seed=seed)


@dataclass(frozen=True)
class FileTask(Task):
    """A user's own questions: a file or folder in any format that `foveate.data.formats` reads."""

    path: Path = Path()

    def samples(self, limit: int | None, seed: int, data_dir: Path | None) -> list[Sample]:
        from foveate.data.formats import SkipReport, open_dataset

        report = SkipReport()
        found = list(open_dataset(self.path, report=report))
        self.skipped.clear()
        self.skipped.update(report.reasons())
        if not found:
            raise InputError(
                f"{self.path} holds no usable question: {report if report.count else 'it is empty'}; "
                "the formats are in docs/preprocessing.md"
            )
        if limit is not None and limit < len(found):
            found = random.Random(seed).sample(found, limit)
        return found


for _skill in SKILLS:
    TASKS.register(f"world/{_skill}", WorldTask(f"world/{_skill}", skill=_skill))
TASKS.register("easy-vqa", NamedTask("easy-vqa", dataset="easy-vqa"))
TASKS.register("nlvr", NamedTask("nlvr", dataset="nlvr"))
TASKS.register(
    "flickr8k-match", NamedTask("flickr8k-match", dataset="flickr8k-match", split="dev", folder="flickr8k-224")
)


def find_tasks(
    names: Sequence[str] = (), data: str | Path | None = None, scorer: str | None = None
) -> tuple[list[Task], Path | None]:
    """The tasks of `names` and the data folder for them. scorer: a name of `SCORERS` that judges all their questions.

    data: a folder of the named sets, or a file (or dataset folder) of the user's own, which becomes the task "data".
    Without names: the drawn world; the sets that the folder holds; or "data" for a file, or a folder that holds none.
    Raises UnknownNameError, InputError.
    """
    if scorer is not None:
        SCORERS.get(scorer)
    path = None if data is None else Path(data)
    if path is not None and not path.exists():
        raise InputError(
            f"--data {path} does not exist; give a folder of data sets, or a file of questions and answers"
        )
    own = path if path is not None and path.is_file() else None
    tasks: list[Task] = []
    for name in names or _default(path):
        if name == "data":
            if path is None:
                raise InputError("task 'data' needs a file of questions: add --data questions.jsonl")
            tasks.append(FileTask("data", path=path))
        else:
            for full in ALIASES.get(name, (name,)):
                if full not in TASKS:
                    raise UnknownNameError(unknown_task(name))
                tasks.append(TASKS.get(full))
    unique = {task.name: replace(task, only_scorer=scorer) if scorer else task for task in tasks}
    return list(unique.values()), None if own else path


def _default(path: Path | None) -> list[str]:
    if path is None:
        return ["world"]
    sets = [TASKS.get(name) for name in TASKS.names() if isinstance(TASKS.get(name), NamedTask)]
    return [task.name for task in sets if (path / (task.folder or task.dataset)).is_dir()] or ["data"]


def unknown_task(name: str) -> str:
    """One line: the nearest names, and how the tasks are named."""
    import difflib

    names = [*ALIASES, *TASKS.names(), "data"]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = near or [n for n in names if n.endswith(f"/{name}")]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    others = ", ".join(n for n in names if not n.startswith("world/"))
    return f"unknown task {name!r}: {hint}known: {others}, world/<skill> with skill one of {', '.join(SKILLS)}"


def chance_level(items: Sequence[Item]) -> float:
    """Accuracy of guessing: the mean chance of the questions, or the majority where a question does not say it."""
    if items and all(item.chance is not None for item in items):
        return sum(item.chance or 0.0 for item in items) / len(items)
    return majority(items)


def majority(items: Sequence[Item]) -> float:
    """Accuracy of always giving the most frequent answer."""
    if not items:
        return 0.0
    ((_, most),) = Counter(item.answers[0] for item in items).most_common(1)
    return most / len(items)
