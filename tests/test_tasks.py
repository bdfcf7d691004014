"""Tasks and evaluation with scripted models, so that every number of the result is known."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from foveate.data.sample import Sample
from foveate.errors import BudgetError, InputError, UnknownNameError
from foveate.recipe import Recipe
from foveate.tasks import TASKS, Record, Task, evaluate, find_tasks, mcnemar, paired_bootstrap
from foveate.tasks.evaluate import load_records
from foveate.world import SKILLS


class Scripted:
    """A model that answers with `reply(question)`; an exception it returns is raised for the whole batch."""

    name, recipe = "scripted", None

    def __init__(self, reply):
        self.reply, self.batches = reply, []

    def answer(self, requests, max_new_tokens):
        self.batches.append(len(requests))
        replies = [self.reply(request.messages[-1]["content"]) for request in requests]
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return [SimpleNamespace(text=reply) for reply in replies]


@dataclass(frozen=True)
class Sums(Task):
    """Questions n = 0, 1, ... with the answer n mod 3; the first two have several questions about one sample."""

    count: int = 10

    def samples(self, limit, seed, data_dir):
        turns = [(f"{n} mod 3?", str(n % 3)) for n in range(self.count)]
        joined = Sample("both", [], [[turns[0]], [turns[1]]])
        return [joined, *(Sample(f"s{n}", [], [[turn]]) for n, turn in enumerate(turns[2:], 2))][:limit]


def right(question: str) -> str:
    return f" {int(question.split()[0]) % 3}."


SUMS = Sums("sums", version=4)


def test_results_are_counted():
    records: list[Record] = []
    result = evaluate(Scripted(lambda q: right(q) if q[0] != "5" else "no"), [SUMS], records=records, progress=False)
    assert set(result) == {"model", "recipe", "tasks", "mean", "seconds"}
    row = result["tasks"]["sums"]
    assert (row["n"], row["correct"], row["accuracy"], row["version"], row["skipped"]) == (10, 9, 0.9, 4, 0)
    assert row["chance"] == row["majority"] == 0.4 and row["low"] < 0.9 < row["high"] and result["mean"] == 0.9
    assert [r.id for r in records][:3] == ["both#0", "both#1", "s2"]
    assert [r.correct for r in records] == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1] and records[5].prediction == "no"


def test_limit_counts_questions_and_batches_are_full():
    model = Scripted(right)
    assert evaluate(model, [SUMS], limit=5, batch_size=2, progress=False)["tasks"]["sums"]["n"] == 5
    assert model.batches == [2, 2, 1]
    for bad in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match="at least 1"):
            evaluate(model, [SUMS], **bad)


@pytest.mark.parametrize("error", [InputError("s3.png: cut off"), BudgetError("9000 tokens, the limit is 100")])
def test_one_bad_sample_is_skipped_and_the_rest_of_its_batch_counts(error):
    model = Scripted(lambda q: error if q[0] == "3" else right(q))
    records: list[Record] = []
    row = evaluate(model, [SUMS], batch_size=5, records=records, progress=False)["tasks"]["sums"]
    assert (row["n"], row["correct"], row["skipped"]) == (9, 9, 1) and "s3" not in {r.id for r in records}
    assert model.batches == [5, 1, 1, 1, 1, 1, 5]


def test_a_task_of_bad_samples_only_is_an_error_with_the_reason():
    with pytest.raises(InputError, match=r"sums.*no usable question: s: cut off"):
        evaluate(Scripted(lambda q: InputError("s: cut off")), [SUMS], progress=False)
    with pytest.raises(InputError, match="no task"):
        evaluate(Scripted(right), [])


def test_a_bug_of_the_model_is_not_a_bad_sample():
    with pytest.raises(ZeroDivisionError):
        evaluate(Scripted(lambda q: ZeroDivisionError()), [SUMS], progress=False)


def test_records_of_two_models_pair_up(tmp_path):
    good, bad = [], []
    evaluate(Scripted(right), [SUMS], records=good, progress=False)
    evaluate(Scripted(lambda q: "0"), [SUMS], records=bad, progress=False)
    a, b = [r.correct for r in good], [r.correct for r in bad]
    assert [(r.task, r.id) for r in good] == [(r.task, r.id) for r in bad]
    assert paired_bootstrap(a, b).value == pytest.approx(0.6) and mcnemar(a, b) == pytest.approx(2 / 2**6)
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in good))
    assert load_records(path) == good
    path.write_text('{"task": "x"}\n')
    with pytest.raises(InputError, match="line 1"):
        load_records(path)


def test_every_skill_is_a_task_with_fresh_seeded_questions():
    for skill in SKILLS:
        task = TASKS.get(f"world/{skill}")
        first, again, other = (task.items(4, seed) for seed in (1, 1, 2))
        assert len(first) == 4 and all(item.answers[0] and 0 <= item.chance < 0.6 for item in first)
        assert [(i.id, i.answers) for i in first] == [(i.id, i.answers) for i in again]
        assert [i.id for i in first] != [i.id for i in other]
        assert all(item.messages[-1]["role"] == "user" for item in first)


def test_names_and_aliases(tmp_path):
    tasks, folder = find_tasks(["world", "world/count"], tmp_path)
    assert [t.name for t in tasks] == [f"world/{skill}" for skill in SKILLS] and folder == tmp_path
    assert find_tasks()[0] == tasks
    with pytest.raises(UnknownNameError, match="did you mean 'easy-vqa'"):
        find_tasks(["easyvqa"])
    with pytest.raises(InputError, match="does not exist"):
        find_tasks([], tmp_path / "gone")
    (tmp_path / "easy-vqa").mkdir()
    assert [t.name for t in find_tasks([], tmp_path)[0]] == ["easy-vqa"]
    (tmp_path / "q.jsonl").write_text("")
    assert [t.name for t in find_tasks([], tmp_path / "q.jsonl")[0]] == ["data"]


def test_a_named_set_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "easy-vqa"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "0.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(folder / "0.png", "0.png")
    rows = [
        {"image": "0.png", "question": q, "answer": a} for q, a in (("Is it red?", "no"), ("What shape?", "circle"))
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = TASKS.get("easy-vqa").items(None, 0, tmp_path)
    assert [item.answers for item in items] == [("no",), ("circle",)]
    assert [item.chance for item in items] == [1 / 2, 1 / 3]
    with pytest.raises(InputError, match="nlvr"):
        TASKS.get("nlvr").items(None, 0, tmp_path)


def test_own_questions_may_have_several_answers_and_a_seeded_limit(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "question": f"{n} mod 3?", "answer": [str(n % 3), "any"]} for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    (task,), _ = find_tasks([], tmp_path / "q.jsonl")
    items = task.items()
    assert len(items) == 20 and items[1].answers == ("1", "any") and len(task.skipped) == 1
    some = [item.id for item in task.items(5, seed=1)]
    assert some == [item.id for item in task.items(5, seed=1)] != [item.id for item in task.items(5, seed=2)]


def test_the_same_answer_alone_and_in_a_batch(vlm):
    one, many = [], []
    evaluate(vlm, ["world/colour", "world/compare"], limit=4, batch_size=1, records=one, progress=False)
    evaluate(vlm, ["world/colour", "world/compare"], limit=4, batch_size=8, records=many, progress=False)
    assert one == many and any(record.prediction for record in one)


def test_a_recipe_is_applied_and_named(vlm):
    result = evaluate(vlm, "world/shape", limit=2, recipe="uniform(keep=0.5) + int8", progress=False)
    assert result["recipe"] == "uniform(keep=0.5) + int8" and not vlm.recipe
    half = Recipe.parse("uniform(keep=0.5) + int8").apply(vlm, quiet=True)
    result = evaluate(half, "world/shape", limit=2, reduce="fastv(keep=0.5, layer=1)", progress=False)
    assert result["recipe"] == "int8 + fastv(keep=0.5, layer=1)"
    assert evaluate(half, "world/shape", limit=2, reduce=Recipe(), progress=False)["recipe"] == "int8"


def multiple_choice_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_each_row_is_judged_by_its_own_scorer(tmp_path):
    rows = [
        {"question": "1 total?", "answer": "100", "scorer": "relaxed"},
        {"question": "2 name?", "answer": "kitten", "scorer": "anls"},
        {"question": "3 which?", "answer": "blue car", "choices": ["red apple", "blue car"], "scorer": "mcq"},
        {"question": "4 plain?", "answer": "104"},
        {"question": "5 there?", "answer": "no", "scorer": "pope"},
        {"question": "6 bad?", "answer": "x", "scorer": "exakt"},
        {"question": "7 bad?", "answer": "x", "scorer": "mcq", "choices": "A"},
    ]
    answers = {"1": "104", "2": "kitten!", "3": "The answer is B.", "4": "104.0", "5": "No, there is none."}
    tasks, folder = find_tasks([], multiple_choice_file(tmp_path, rows))
    records: list[Record] = []
    model = Scripted(lambda question: answers[question[0]])
    row = evaluate(model, tasks, data_dir=folder, records=records, progress=False)["tasks"]["data"]
    assert [round(r.correct, 3) for r in records] == [1.0, round(1 - 1 / 7, 3), 1.0, 0.0, 1.0]
    assert row["n"] == 5 and row["skipped"] == 2 and row["scorer"] == "anls, exact, mcq, pope, relaxed"
    reasons = list(tasks[0].skipped.values())
    assert "did you mean 'exact'" in reasons[0] and "choices is 'A'" in reasons[1]


def test_scorer_option_overrides_rows(tmp_path):
    path = multiple_choice_file(tmp_path, [{"question": "1 total?", "answer": "100", "scorer": "exact"}])
    tasks, folder = find_tasks([], path, "relaxed")
    model = Scripted(lambda question: "104")
    assert evaluate(model, tasks, data_dir=folder, progress=False)["mean"] == 1.0
    with pytest.raises(UnknownNameError, match="unknown scorer 'relaxd': did you mean 'relaxed'"):
        find_tasks([], path, "relaxd")
    path = multiple_choice_file(tmp_path, [{"question": "q?", "answer": "yes"}, {"question": "r?", "answer": "no"}])
    tasks, folder = find_tasks([], path, "pope")
    row = evaluate(Scripted(lambda question: "Yes."), tasks, data_dir=folder, progress=False)["tasks"]["data"]
    assert row["detail"]["yes_ratio"] == 1.0 and row["detail"]["f1"] == pytest.approx(2 / 3)


def test_every_scorer_takes_any_text():
    from foveate.tasks.scores import SCORERS, judge

    for name in SCORERS:
        for text in ("", "   ", "yes", "A", "3.5 %", "\ud7ff", "a" * 300):
            assert 0 <= judge(name, text, ["yes", "A", "3.5%"]) <= 1, name
    assert judge("mcq-mmmu", "perhaps", ["B"], {"A": "one", "B": "two"}) == 0.5  # the value of a random draw
    assert judge("mcq", "two", ["B"], {"A": "one", "B": "two"}) == judge(
        "mcq-mmbench", "two", ["two"], {"A": "1", "B": "two"}
    )
