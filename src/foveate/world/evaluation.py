"""Scored questions: fresh scenes of a split, one question each, the answers of every skill balanced."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.errors import InputError
from foveate.registry import Registry
from foveate.world.kinds import draw
from foveate.world.scene import Question, Scene, check_split, stable_random
from foveate.world.vocabulary import CLIP_SKILLS, COLOURS, DIGITS, DIRECTIONS, RELATIONS, SHAPES, SKILLS, WHICH

if TYPE_CHECKING:
    from foveate.data.sample import Sample


@dataclass(frozen=True)
class Form:
    """One template of a skill that is scored: where it is drawn and between which answers it is balanced.

    by: "answer", or "length" for free strings, whose characters are uniform and whose lengths are balanced.
    """

    kind: str
    form: str
    answers: tuple[str, ...]
    chance: float
    by: str = "answer"

    def key(self, question: Question) -> str:
        return question.answer if self.by == "answer" else str(len(question.answer))


def _even(kind: str, form: str, answers: tuple[str, ...]) -> Form:
    return Form(kind, form, answers, 1 / len(answers))


_NUMBERS = tuple(DIGITS)
_FORMS: dict[str, tuple[Form, ...]] = {
    "colour": (_even("scene", "colour", COLOURS),),
    "shape": (_even("scene", "shape", SHAPES),),
    "count": (_even("count", "count", _NUMBERS[:7]),),
    "relation": (_even("scene", "relation", RELATIONS),),
    "text_large": (Form("tags", "label", ("2", "3", "4"), 1 / 300, "length"),),
    "text_small": (Form("tags", "label", ("1", "2"), 1 / 20, "length"),),
    "mark": (_even("scene", "mark", _NUMBERS),),
    "bar": (_even("bars", "value", _NUMBERS[1:]), _even("bars", "extreme", COLOURS)),
    "line": (
        _even("lines", "value", _NUMBERS[1:]),
        _even("lines", "peak", _NUMBERS[1:7]),
        _even("lines", "trend", ("rise", "fall")),
    ),
    "table": (_even("table", "cell", _NUMBERS),),
    "compare": (_even("pair", "which", WHICH), _even("pair", "colour", COLOURS)),
    "dialogue": (
        _even("dialogue", "colour", COLOURS),
        _even("dialogue", "shape", SHAPES),
        _even("dialogue", "digit", _NUMBERS),
        _even("dialogue", "it", RELATIONS),
    ),
    "motion": (_even("clip_motion", "way", tuple(DIRECTIONS)),),
    "order": (
        _even("clip_order", "first", COLOURS),
        _even("clip_order", "last", COLOURS),
        # The colour that the question names is not the answer: one of five.
        Form("clip_order", "after", COLOURS, 1 / 5),
    ),
    "event_count": (_even("clip_flash", "flashes", _NUMBERS[:6]),),
    "needle": (_even("clip_needle", "digit", _NUMBERS),),
}
_SKILLS = Registry("skill", dict.fromkeys(SKILLS, ""))


def check_skill(skill: str) -> str:
    """`skill`, or UnknownNameError with the nearest names."""
    if skill not in SKILLS:
        _SKILLS.get(skill)
    return skill


def chance(skill: str) -> float:
    """What a blind guesser scores on the scored questions of a skill: the mean over its templates, in equal parts."""
    forms = _FORMS[check_skill(skill)]
    return sum(form.chance for form in forms) / len(forms)


def kinds_of(skill: str) -> tuple[str, ...]:
    """The kinds of scenes that the scored questions of a skill are drawn from."""
    return tuple(dict.fromkeys(form.kind for form in _FORMS[check_skill(skill)]))


def evaluation_questions(
    skill: str,
    n: int,
    *,
    split: str = "test",
    seed: int = 0,
    size: int | None = None,
    frames: int | None = None,
) -> list[tuple[Scene, Question]]:
    """n pairs of a fresh scene and its one scored question, in a random order; pixels are not drawn yet.

    Templates have equal parts, and within a template the counts of the answers differ by at most one. No scene comes
    twice. frames: fix the length of clips, at least 18 for event_count, whose five flashes need that many.
    Raises UnknownNameError for a skill, InputError for a split, a negative n, or clips that are too short.
    """
    forms = _FORMS[check_skill(skill)]
    check_split(split)
    if n < 0:
        raise InputError(f"n={n}: the number of questions cannot be negative")
    if skill == "event_count" and frames is not None and frames < 18:
        raise InputError(f"frames={frames}: five flashes need 18 frames; use 18 to 32 for skill 'event_count'")
    if skill not in CLIP_SKILLS:
        frames = None
    rng = stable_random("evaluation", skill, split, seed, n)
    quotas = {
        form.form: dict(zip(form.answers, _parts(part, len(form.answers), rng)))
        for form, part in zip(forms, _parts(n, len(forms), rng))
    }
    found: list[tuple[Scene, Question]] = []
    seen: set[str] = set()
    for kind in kinds_of(skill):
        # One stream of scenes for all templates of a kind: each scene gives the question that is most wanted.
        wanted = {form.form: (form, quotas[form.form]) for form in forms if form.kind == kind}
        left = sum(sum(quota.values()) for _, quota in wanted.values())
        index = 0
        while left:
            scene = draw(kind, index, split=split, seed=f"{skill}-{seed}", size=size, frames=frames)
            index += 1
            assert index < 1000 * (n + 10), f"{skill}: no scene gives one of the answers {quotas}"
            best, most = [], 1
            for q in scene.questions:
                if q.auxiliary or q.skill != skill or q.form not in wanted:
                    continue
                form, quota = wanted[q.form]
                need = quota.get(form.key(q), 0)
                if need >= most:
                    best, most = [*(best if need == most else ()), q], need
            if not best or scene.signature in seen:
                continue
            question = rng.choice(best)
            form, quota = wanted[question.form]
            quota[form.key(question)] -= 1
            left -= 1
            seen.add(scene.signature)
            found.append((scene, question))
    rng.shuffle(found)
    return found


def evaluation_samples(
    skill: str,
    n: int,
    *,
    split: str = "test",
    seed: int = 0,
    size: int | None = None,
    frames: int | None = None,
) -> list[Sample]:
    """n data samples of one scored question each; see `evaluation_questions`.

    meta: skill, form, chance, difficulty, kind, split, signature.
    """
    out = []
    pairs = evaluation_questions(skill, n, split=split, seed=seed, size=size, frames=frames)
    for i, (scene, question) in enumerate(pairs):
        sample = scored_sample(scene, question)
        sample.id = f"{skill}-{split}-{seed}-{i}"
        out.append(sample)
    return out


def scored_sample(scene: Scene, question: Question) -> Sample:
    """A data sample of a scene with one of its questions, and what is known about that question as meta."""
    return scene.sample(
        [question], skill=question.skill, form=question.form, chance=question.chance, difficulty=question.difficulty
    )


def _parts(n: int, k: int, rng: random.Random) -> list[int]:
    """n in k parts that differ by at most one; which parts are larger is random."""
    parts = [n // k + (i < n % k) for i in range(k)]
    rng.shuffle(parts)
    return parts
