"""Scored questions of the drawn world: balanced, fresh, at chance for a blind guesser, and silent about each other."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from foveate import world
from foveate.errors import InputError, UnknownNameError
from foveate.world.evaluation import _FORMS, evaluation_questions, kinds_of
from foveate.world.write import write_split

CONTENT = {*world.COLOURS, *world.SHAPES}


@pytest.mark.parametrize("skill", world.SKILLS)
def test_answers_are_balanced_and_scenes_fresh(skill: str) -> None:
    n = 61
    pairs = evaluation_questions(skill, n)
    assert len(pairs) == n
    assert len({scene.signature for scene, _ in pairs}) == n
    assert all(q.skill == skill and not q.auxiliary and scene.split == "test" for scene, q in pairs)
    by_form = Counter(q.form for _, q in pairs)
    assert max(by_form.values()) - min(by_form.values()) <= 1 and len(by_form) == len(_FORMS[skill])
    for form in _FORMS[skill]:
        counts = Counter(dict.fromkeys(form.answers, 0))
        counts.update(form.key(q) for _, q in pairs if q.form == form.form)
        assert set(counts) == set(form.answers)
        assert max(counts.values()) - min(counts.values()) <= 1, counts


@pytest.mark.parametrize("skill", world.SKILLS)
def test_a_blind_guesser_is_at_chance(skill: str) -> None:
    """The best constant answer for each question text, learned on one half, scores no more than chance on the other."""
    pairs = evaluation_questions(skill, 300, split="validation", seed=3)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, q in pairs[:150]:
        answers[" / ".join(t for t, _ in q.turns)][q.answer] += 1
    hits = [answers[key].most_common(1)[0][0] == q.answer
            for _, q in pairs[150:] if (key := " / ".join(t for t, _ in q.turns)) in answers]  # fmt: skip
    limit = 0.12 if len(hits) > 60 else 0.25
    assert not hits or sum(hits) / len(hits) < world.chance(skill) + limit
    texts = defaultdict(list)
    for _, q in pairs:
        texts[q.form, q.text].append(q.answer)
    chances = {form.form: form.chance for form in _FORMS[skill]}
    for (form, text), given in texts.items():  # nor is there one text whose answer is nearly always the same
        if len(given) >= 12:
            share = Counter(given).most_common(1)[0][1] / len(given)
            assert share < chances[form] + 0.42, (text, Counter(given))
    mean = sum(q.chance for _, q in pairs) / len(pairs)
    assert mean == pytest.approx(world.chance(skill), rel=0.02)


@pytest.mark.parametrize("skill", world.SKILLS)
def test_no_question_tells_anothers_answer(skill: str) -> None:
    """Words of a scored question (with its given history) never hold the answer of another one about the scene.

    A question that is asked word for word about every scene of its kind tells nothing about any of them.
    """
    for kind in kinds_of(skill):
        drawn = [world.draw(kind, i, split="test") for i in range(30)]
        always = set.intersection(*({q.text for q in scene.questions if not q.auxiliary} for scene in drawn))
        for scene in drawn:
            scored = [q for q in scene.questions if not q.auxiliary]
            assert len({q.turns for q in scored}) == len(scored)
            for q in scored:
                for other in scored:
                    told = set(re.findall(r"\w+", " ".join(t for t, _ in other.turns)))
                    if other is not q:
                        told |= set(re.findall(r"\w+", " ".join(a for _, a in other.turns[:-1])))
                    if other.text not in always:
                        assert q.answer not in told & CONTENT, (q, other)
                    if len(q.answer) > 1 and q.answer.isdigit():
                        assert q.answer not in told


def test_relations_are_asked_one_way_only() -> None:
    """ "Where is a relative to b" would tell "where is b relative to a"."""
    for i in range(60):
        scene = world.draw("scene", i)
        asked = [
            frozenset(w for w in re.findall(r"\w+", q.text) if w in CONTENT)
            for q in scene.questions
            if q.form == "relation"
        ]
        assert len(asked) == len(set(asked))


def test_same_call_same_questions_and_other_seed_other_scenes() -> None:
    a, b = evaluation_questions("count", 40), evaluation_questions("count", 40)
    assert [(s.signature, q) for s, q in a] == [(s.signature, q) for s, q in b]
    c = evaluation_questions("count", 40, seed=1)
    assert len({s.signature for s, _ in a} & {s.signature for s, _ in c}) <= 2
    train = {world.draw("count", i).signature for i in range(200)}
    assert not train & {s.signature for s, _ in a + c}


def test_samples_carry_one_question_and_its_meta() -> None:
    samples = world.evaluation_samples("dialogue", 6, split="validation")
    assert [len(s.branches) for s in samples] == [1] * 6
    assert all(len(s.branches[0]) > 1 for s in samples)
    for s in samples:
        assert s.meta["skill"] == "dialogue" and 0 < s.meta["chance"] < 0.5 and s.meta["split"] == "validation"
        assert s.messages(with_answer=False)[-1]["role"] == "user"
    clip = world.evaluation_samples("motion", 2, frames=8, size=64)[0]
    assert clip.media[0].kind == "video" and clip.media[0].data[0].shape == (64, 64, 3) and len(clip.media[0].data) == 8


def test_difficulty_spans_what_is_asked() -> None:
    def spread(skill: str, n: int = 84) -> set[int]:
        return {q.difficulty for _, q in evaluation_questions(skill, n)}

    assert spread("count") == set(range(7))
    assert spread("text_large") == {2, 3, 4}
    assert spread("text_small") == {1, 2}
    assert min(spread("needle", 100)) <= 9 and max(spread("needle", 100)) >= 31


def test_chance_and_mistakes() -> None:
    assert world.chance("count") == pytest.approx(1 / 7)
    assert world.chance("relation") == 1 / 4
    with pytest.raises(UnknownNameError, match="did you mean 'colour'"):
        world.chance("color")
    with pytest.raises(InputError, match="n=-1"):
        evaluation_questions("colour", -1)
    with pytest.raises(InputError, match="18 to 32"):
        evaluation_questions("event_count", 5, frames=8)


def test_a_split_is_written_and_read_again(tmp_path: Path) -> None:
    from foveate.data.formats import open_dataset

    assert write_split(["scene", "pair"], 2, "validation", tmp_path / "scenes.jsonl", "openai") == 4
    branches = {b for kind in ("scene", "pair") for i in range(2)
                for q in world.draw(kind, i, split="validation").questions for b in [q.turns]}  # fmt: skip
    read = list(open_dataset(tmp_path / "scenes.jsonl"))
    assert {tuple(b) for s in read for b in s.branches} <= branches and len(read) >= 4
    assert write_split("mark", 3, "test", tmp_path / "mark.jsonl") == 3
    assert [s.meta["skill"] for s in open_dataset(tmp_path / "mark.jsonl")] == ["mark"] * 3
    with pytest.raises(InputError, match="not both"):
        write_split(["scene", "mark"], 1, "test", tmp_path / "x.jsonl")
    with pytest.raises(UnknownNameError, match="did you mean 'mark'"):
        write_split(["marks", "bar"], 1, "test", tmp_path / "x.jsonl")
