"""The questions a recipe is chosen on, and the other questions it is proved on. No picture is in both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import FoveateError, InputError
from foveate.tasks.base import FileTask, Item, NamedTask, Task, WorldTask

if TYPE_CHECKING:
    from foveate.data.sample import Sample

CHOOSE_SPLIT = {"easy-vqa": "train", "nlvr": "dev-val"}
"""Named sets with a split to choose on beside the task's own, which is then the proof. Other sets are halved."""


@dataclass(frozen=True)
class Question:
    """One item with what is needed to ask and judge it.

    task: accuracies are averaged over tasks. skill: the row of the table it counts in, finer than the task where the
    data name skills of their own.
    """

    item: Item
    task: str
    skill: str
    scorer: str
    max_new_tokens: int


@dataclass
class Split:
    """Questions in an order in which every prefix holds each skill about equally often."""

    questions: list[Question] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def tasks(self) -> list[str]:
        """The task of each question."""
        return [question.task for question in self.questions]

    @property
    def skills(self) -> list[str]:
        """The skill of each question."""
        return [question.skill for question in self.questions]

    def drop(self, bad: dict[int, str]) -> Split:
        """Without the questions at the indices of `bad`, whose reasons are kept."""
        kept = [q for i, q in enumerate(self.questions) if i not in bad]
        named = {self.questions[i].item.id: reason for i, reason in bad.items()}
        return Split(kept, {**self.skipped, **named})


def splits(
    tasks: Sequence[Task], *, choose: int, prove: int, seed: int = 0, data_dir: Path | None = None
) -> tuple[Split, Split]:
    """(to choose on, to prove on), at most `choose` and `prove` questions of each task.

    The drawn world is chosen on its validation split and proved on its test split; a named set with two splits
    likewise; a user's own data are cut in two halves by picture (by id where the picture has no name). Raises
    InputError if there is nothing to choose on.
    """
    chosen: list[list[Question]] = []
    proved: list[list[Question]] = []
    skipped: dict[str, str] = {}
    for task in tasks:
        first, second = _halves(task, choose, prove, seed, data_dir)
        skipped.update(task.skipped)
        chosen.append(_questions(task, first, skipped)[:choose])
        proved.append(_questions(task, second, skipped)[:prove])
    if not any(chosen):
        reason = next(iter(skipped.values()), "give --data a file of questions and answers")
        raise InputError(f"there is no usable question to choose a recipe on: {reason}")
    return Split(interleave(chosen), skipped), Split(interleave(proved))


def _halves(task: Task, choose: int, prove: int, seed: int, data_dir: Path | None) -> tuple[list[Sample], list[Sample]]:
    if isinstance(task, WorldTask):
        from foveate.world import evaluation_samples

        draw: Callable[..., list[Sample]] = evaluation_samples
        return draw(task.skill, choose, split="validation", seed=seed), draw(
            task.skill, prove, split="test", seed=seed + 1
        )
    if isinstance(task, NamedTask) and task.dataset in CHOOSE_SPLIT:
        from foveate.data.datasets import load_named

        other = CHOOSE_SPLIT[task.dataset]
        first = load_named(task.dataset, data_dir, other, limit=choose, seed=seed, group=False)
        return first, task.samples(prove, seed, data_dir)
    limit = None if isinstance(task, FileTask) else choose + prove
    return halve_by_picture(task.samples(limit, seed, data_dir), seed)


def halve_by_picture(samples: Sequence[Sample], seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Two halves in a stable pseudo-random order; samples that share a picture, or an identifier, stay together.

    With a single picture the second half is empty.
    """
    groups: dict[str, list[Sample]] = {}
    for key, sample in zip(_components(samples), samples, strict=True):
        groups.setdefault(key, []).append(sample)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    first: list[Sample] = []
    second: list[Sample] = []
    for key in order:
        (first if len(first) <= len(second) else second).extend(groups[key])
    return first, second


def _components(samples: Sequence[Sample]) -> list[str]:
    """For each sample a key; two samples that share any picture (also through a third) have the same one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    named = [_names(sample) for sample in samples]
    for names in named:
        for name in names[1:]:
            first, other = sorted((root(names[0]), root(name)))
            parent[other] = first
    return [root(names[0]) for names in named]


def _names(sample: Sample) -> list[str]:
    """What identifies the pictures of a sample: the set's own identifier, file names, else the sample's id."""
    if sample.meta.get("identifier") is not None:
        return [f"identifier {sample.meta['identifier']}"]
    files = [f"file {media.data}" for media in sample.media if isinstance(media.data, str | Path)]
    return files or [f"id {sample.id}"]


def _questions(task: Task, samples: Sequence[Sample], skipped: dict[str, str]) -> list[Question]:
    """The questions of samples; the reasons of those that cannot be judged go into `skipped`."""
    found = []
    for sample in samples:
        skill = str(sample.meta.get("skill") or task.name.removeprefix("world/"))
        try:
            items = task.items_of(sample)
        except FoveateError as error:
            skipped[sample.id] = str(error)
            continue
        found += [Question(item, task.name, skill, item.scorer, task.max_new_tokens) for item in items]
    return found


def interleave(rows: Sequence[Sequence[Question]]) -> list[Question]:
    """Questions of all skills in turn, each in its own order."""
    by_skill: dict[tuple[str, str], list[Question]] = {}
    for question in (q for row in rows for q in row):
        by_skill.setdefault((question.task, question.skill), []).append(question)
    # The place of a question is its share of its skill, so that a small skill is spread over the whole order.
    placed = [
        ((i + 0.5) / len(questions), place, question)
        for place, questions in enumerate(by_skill.values())
        for i, question in enumerate(questions)
    ]
    return [question for _, _, question in sorted(placed, key=lambda entry: entry[:2])]
