"""`optimize` on the tiny random model: costs, cached answers, output folder, user's data, the command."""

from __future__ import annotations

import json
import random
import re
import zipfile
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.cli import main as cli
from foveate.data.sample import ImageSource, Sample
from foveate.errors import InputError
from foveate.optimize import Budget, evolution, optimize
from foveate.optimize import answers as answers_module
from foveate.optimize import times as times_module
from foveate.optimize import workbench as workbench_module
from foveate.optimize.run import Effort
from foveate.optimize.samples import halve_by_picture, interleave, splits
from foveate.optimize.space import build_space, ranges
from foveate.optimize.workbench import ModelWorkbench
from foveate.registry import METHODS
from foveate.tasks.base import TASKS, FileTask, Task
from foveate.vlm import Request

FEW = ("uniform", "rtn")
TINY = Effort(recipes=5, upgrades=0, explore=2, shortlist=3, rungs=((4, 2), (8, 1)), prove=8, timed=1)
SKILLS = ("colour", "compare")
FIXED_TIME = {"ms": 1.0, "dense_ms": 1.0, "ratio": 1.0, "low": 1.0, "high": 1.0, "pairs": 2}


@pytest.fixture(scope="module")
def tasks():
    """Two skills, answers of two tokens: a random model never ends by itself."""
    return [replace(TASKS.get(f"world/{skill}"), max_new_tokens=2) for skill in SKILLS]


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(times_module, "PAIRS", 2)
    monkeypatch.setattr(times_module, "UNIT_SECONDS", 0.0)
    monkeypatch.setattr(workbench_module, "PICTURES", 2)


@pytest.fixture
def all_right(monkeypatch):
    """Random weights know nothing, and a model that is right on no sample proves nothing."""
    monkeypatch.setattr(answers_module, "judge", lambda *question: 1.0)


@pytest.fixture
def bench(vlm, tasks):
    first, second = splits(tasks, choose=4, prove=2)
    return ModelWorkbench(vlm, first, second, data="world", quiet=True)


# ---- questions


def test_choice_and_proof_share_no_scene(tasks):
    first, second = splits(tasks, choose=6, prove=6, seed=3)
    assert len(first) == len(second) == 12 and set(first.skills[:2]) == set(SKILLS)
    drawn = [
        {media["image"].name for q in split.questions for media in q.item.messages[0]["content"] if "image" in media}
        for split in (first, second)
    ]
    assert drawn[0] and not drawn[0] & drawn[1]


def test_own_data_are_halved_by_picture():
    picture = [f"{i // 3}.png" for i in range(30)]
    samples = [Sample(str(i), [ImageSource(picture[i])], [[("q", "a")]]) for i in range(30)]
    samples.append(Sample("both", [ImageSource("0.png"), ImageSource("1.png")], [[("q", "a")]]))
    first, second = halve_by_picture(samples, seed=1)
    names = [{m.data for s in half for m in s.media} for half in (first, second)]
    assert not names[0] & names[1] and len(first) + len(second) == 31 and min(len(first), len(second)) >= 12
    assert [s.id for s in halve_by_picture(samples, seed=1)[0]] == [s.id for s in first]
    assert [s.id for s in halve_by_picture(samples, seed=2)[0]] != [s.id for s in first]
    assert halve_by_picture(samples[:1]) == (samples[:1], [])


def test_every_prefix_holds_all_skills(bench):
    questions = [replace(bench.choose.questions[0], skill=s) for s in ["a"] * 9 + ["b"] * 3]
    order = [q.skill for q in interleave([questions])]
    assert order[:4].count("b") == 1 and order.count("b") == 3


# ---- space and costs


def test_a_method_may_declare_its_own_range(vlm):
    class Mine(METHODS.get("uniform")):
        space: ClassVar = {"keep": (0.5, 1)}

    assert ranges(Mine) == {"keep": (0.5, 1)} and ranges(METHODS.get("int8")) == {}
    space = build_space(vlm, [Mine, METHODS.get("int8")])
    assert space.recipes(100, random.Random(0)) == [
        "int8",
        "uniform(keep=0.5)",
        "uniform(keep=0.5) + int8",
        "uniform(keep=1)",
        "uniform(keep=1) + int8",
    ]


def test_predicted_tokens_and_bytes_are_those_of_the_model(bench, vlm):
    pruned = bench.cost("magnitude(sparsity=0.5)").nonzeros - bench.cost("").nonzeros
    small = foveate.Recipe.parse("magnitude(sparsity=0.5)").apply(vlm, quiet=True)
    left = [sum(int((p != 0).sum()) for p in model.parameters()) for model in (small.model, vlm.model)]
    assert pruned == pytest.approx(left[0] - left[1], rel=0.01) and pruned < 0
    recipe = "fastervlm(keep=0.35) + rtn(bits=8) + int8"
    cost, dense = bench.cost(recipe), bench.cost("")
    small = foveate.Recipe.parse(recipe).apply(vlm, quiet=True)
    answers = small.answer([Request(messages=q.item.messages) for q in bench.choose.questions], max_new_tokens=1)
    assert cost.tokens == pytest.approx(np.mean([a.tokens["kept"] for a in answers]))
    assert dense.tokens == pytest.approx(np.mean([a.tokens["visual"] for a in answers]))
    stored = {id(t): t.nbytes for t in [*small.model.parameters(), *small.model.buffers()]}
    assert cost.parts["weights"] == pytest.approx(sum(stored.values()), rel=0.01)
    assert cost.flops < dense.flops and cost.bytes < dense.bytes and cost.parts["selection"] > 0


def test_cached_answers_are_those_of_the_model(bench, vlm):
    """Nothing may hang on the cache of features: not the method, the weights, the batch or the order."""
    requests = [Request(messages=q.item.messages) for q in bench.choose.questions]
    for recipe in ("", "random(keep=0.3) + int8", "fastervlm(keep=0.5) + rtn(bits=4)", "uniform(keep=0.5)"):
        small = foveate.Recipe.parse(recipe).apply(vlm, quiet=True) if recipe else vlm
        expected = [answer.ids for answer in small.answer(requests, max_new_tokens=2)]
        assert bench.answer_ids(recipe, "choose", range(len(expected))) == expected


def test_only_recipes_with_the_same_tower_share_features(bench, vlm):
    plan = bench.vlm.plan(bench.choose.questions[0].item.messages)

    def features(recipe):
        bench.answer_ids(recipe, "choose", [0])
        (found,) = bench.encoded(recipe, "choose", [0])
        return found.features

    dense, changed = features(""), features("rtn(bits=2, parts=[vision_tower])")
    small = foveate.Recipe.parse("rtn(bits=2, parts=[vision_tower])").apply(vlm, quiet=True)
    with torch.inference_mode():
        (expected,) = small.adapter.encode([small.prepare(plan)], [plan])
    assert torch.allclose(changed, expected.features, atol=1e-5) and not torch.allclose(changed, dense, atol=1e-2)
    assert features("rtn(bits=4, parts=[llm])") is dense


# ---- the main job


def test_optimize_writes_a_model_and_a_report(vlm, tasks, tmp_path, capfd, all_right):
    out = tmp_path / "small"
    report = optimize(
        vlm,
        Budget.parse(bytes="0.8x", loss="100pt"),
        tasks=tasks,
        effort=replace(TINY, upgrades=1),
        out=out,
        command="foveate optimize x",
    )
    assert report["met"] and report["quality"]["held_back"] and report["quality"]["n"] == 8
    assert set(report) >= {"recipe", "met", "quality", "cost", "front", "binding", "nearest", "trials", "conditions"}
    assert set(report["quality"]) >= {"mean_delta", "low", "high", "skills"} and set(
        report["quality"]["skills"]
    ) == set(SKILLS)
    assert report["cost"]["bytes"] <= 0.8 * report["dense"]["cost"]["bytes"] and report["cost"]["ttft_ms"] > 0
    assert json.loads((out / "report.json").read_text()) == report
    assert not [path for path in tmp_path.iterdir() if path != out]
    loaded = foveate.load(out)
    assert loaded.recipe.text() == report["recipe"]
    assert loaded.ask(Image.new("RGB", (64, 64)), "What colour?", max_new_tokens=2).ids is not None
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?\s*(https?:)?//", page) and "<script" not in page
    for part in (
        "<svg",
        "data:image/png;base64,",
        'id="front"',
        'id="proof"',
        'id="skills"',
        'id="rejected"',
        report["recipe"],
    ):
        assert part in page, part
    assert page.count('<figure><img alt="') == 2 and page.count("tokens)</figcaption>") == 2
    tried = page[page.index('id="rejected"') : page.index('id="pruned"')]
    rejected = [row for row in report["trials"] if row["status"] == "rejected"]
    assert rejected and all(row["reason"] and escape(row["reason"]) in tried for row in rejected)
    for axis in ("FLOPs", "bytes"):
        assert f'aria-label="Difference of accuracy to dense against {axis}"' in page
    for word in ("torch", "transformers", "foveate optimize x", "seed", "machine", "cores", "date"):
        assert word in page[page.index('id="conditions"') :], word
    with pytest.raises(InputError, match="already holds the recipe"):
        optimize(loaded, effort=TINY, tasks=tasks)


def test_unreachable_budget_changes_nothing_and_says_what_binds(vlm, tasks, tmp_path):
    out = tmp_path / "none"
    report = optimize(vlm, Budget.parse(flops="0.01x"), tasks=tasks, effort=TINY, out=out, methods=FEW)
    assert not report["met"] and report["recipe"] is None and report["binding"] == ["flops"]
    assert report["nearest"][0]["flops"] > 0.01 * report["dense"]["cost"]["flops"]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "study.db"]
    optimize(
        vlm, Budget.parse(flops="0.02x"), tasks=tasks, effort=TINY, out=out, methods=["rtn"]
    )  # an earlier result is replaced
    assert json.loads((out / "report.json").read_text())["budget"]["flops"] == "0.02x"


def test_ctrl_c_keeps_the_best_so_far(vlm, tasks, tmp_path, monkeypatch):
    real, calls = ModelWorkbench.scores, []

    def scores(self, recipe, split, n):
        calls.append(recipe)
        if split == "prove":
            raise KeyboardInterrupt
        return real(self, recipe, split, n)

    monkeypatch.setattr(ModelWorkbench, "scores", scores)
    out = tmp_path / "part"
    report = optimize(vlm, Budget.parse(bytes="0.8x", loss="100pt"), tasks=tasks, effort=TINY, out=out, methods=["rtn"])
    assert report["interrupted"] and not report["met"] and "not proven" in report["verdict"]
    assert foveate.load(out).recipe.text() == report["recipe"]


def test_a_search_that_died_goes_on_and_ends_the_same(vlm, tasks, tmp_path, monkeypatch):
    """What was answered before is not asked again, and the result is that of a search that nothing disturbed."""
    real, asked = ModelWorkbench.answers, []

    def counting(self, recipe, split, indices):
        asked.append((recipe, split, tuple(indices)))
        if len(asked) == stop:
            raise RuntimeError("killed")
        return real(self, recipe, split, indices)

    monkeypatch.setattr(ModelWorkbench, "answers", counting)
    monkeypatch.setattr(ModelWorkbench, "time", lambda self, recipe: FIXED_TIME)
    options = {"tasks": tasks, "effort": TINY, "methods": FEW}
    budget, stop = Budget.parse(bytes="0.8x", loss="100pt"), 0
    whole = optimize(vlm, budget, out=tmp_path / "whole", **options)
    calls, stop = len(asked), 6
    asked.clear()
    with pytest.raises(RuntimeError, match="killed"):
        optimize(vlm, budget, out=tmp_path / "part", **options)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["study.db"]
    asked.clear()
    stop, lines = 0, []
    again = optimize(vlm, budget, out=tmp_path / "part", say=lines.append, **options)
    assert any("going on from the log" in line for line in lines) and len(asked) == calls - 5
    assert again["recipe"] == whole["recipe"] and again["trials"] == whole["trials"]
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "part" / "study.db").rename(other / "study.db")
    with pytest.raises(InputError, match=r"log of another search: its (seed|questions)"):
        optimize(vlm, budget, out=other, seed=5, **options)


@pytest.mark.parametrize("strategy", ["halving", "milp", "p_sigmoid", "g_search", "genetic"])
def test_strategies_run_on_a_model(vlm, tasks, strategy):
    if strategy == "milp":
        pytest.importorskip("scipy")
    effort = replace(TINY, recipes=3, timed=0)
    more = {"nonzeros": "0.95x"} if strategy == "milp" else {}
    budget = Budget.parse(bytes="0.9x", tokens="0.9x", loss="100pt", **more)
    report = optimize(vlm, budget, tasks=tasks, effort=effort, strategy=strategy, methods=[*FEW, "fastv"])
    recipes = [row["recipe"] for row in report["trials"] if row["n"]]
    assert recipes and report["recipe"] in recipes
    if strategy == "milp":
        for part in ("mixed(bits=[", "rates=[1.0", "layered(shares=["):
            assert any(part in recipe for recipe in recipes), part
    if strategy == "p_sigmoid":
        assert all(recipe.startswith("schedule(") for recipe in recipes)


def test_unknown_strategies_are_named(vlm, tasks):
    from foveate.cli.optimize import NAMES
    from foveate.errors import UnknownNameError
    from foveate.optimize.strategies import STRATEGIES

    assert sorted(NAMES) == STRATEGIES.names()
    with pytest.raises(UnknownNameError, match="did you mean 'genetic'"):
        optimize(vlm, tasks=tasks, effort=TINY, strategy="genetik")


def test_text_only_questions_can_be_optimized_for(vlm, tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: Task = FileTask("data", path=path, max_new_tokens=2)
    report = optimize(vlm, Budget.parse(bytes="0.9x", loss="100pt"), tasks=[task], effort=TINY, methods=["rtn", "int8"])
    assert report["recipe"] and report["cost"]["tokens"] == 0 and not report["met"]
    assert "right on no sample" in report["verdict"]  # a random model knows no sums


def test_other_folders_are_not_overwritten(vlm, tasks, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        optimize(vlm, tasks=tasks, effort=TINY, out=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_a_failing_write_leaves_nothing(vlm, tasks, tmp_path, monkeypatch, all_right):
    def full(self, recipe, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelWorkbench, "save", full)
    with pytest.raises(InputError, match="No space left"):
        optimize(
            vlm, Budget.parse(bytes="0.8x", loss="100pt"), tasks=tasks, effort=TINY, out=tmp_path / "out", methods=FEW
        )
    # the log alone stays, so that the same command goes on where the disk was full
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["study.db"]


def test_named_sets_are_chosen_and_proved_on_splits_of_their_own(tmp_path):
    for name, parts in (("easy-vqa", ("train", "test")), ("nlvr", ("dev", "test"))):
        folder = tmp_path / name
        folder.mkdir()
        for part in parts:
            rows = [
                {
                    "image": f"{part}{i}.png",
                    "question": "What?",
                    "answer": "red",
                    "sentence": "One box.",
                    "label": "true",
                }
                | {"identifier": f"{i}-0"}
                for i in range(40)
            ]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            for archive in (f"{part}_images.zip", "images.zip"):
                with zipfile.ZipFile(folder / archive, "a") as file:
                    for row in rows:
                        file.writestr(row["image"], b"x")
        first, second = splits([TASKS.get(name)], choose=5, prove=7, data_dir=tmp_path)
        assert 0 < len(first) <= 5 and len(second) == 7 and set(second.tasks) == {name}
        pictures = [str(q.item.messages) + q.item.id for q in first.questions]
        assert all(parts[0] in text for text in pictures) and not any("test" in text for text in pictures)


def write_questions(folder: Path, n: int) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "question": "What?", "answer": "red"})
    rows.append({"id": "bad", "image": "missing.png", "question": "What?", "answer": "red"})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_users_own_questions(vlm, tmp_path):
    path = write_questions(tmp_path, 8)
    task: Task = FileTask("data", path=path, max_new_tokens=2)
    report = optimize(
        vlm, Budget.parse(bytes="0.8x", loss="100pt"), tasks=[task], data=path, effort=TINY, limit=4, methods=FEW
    )
    assert report["quality"]["n"] == 4 and report["conditions"]["skipped questions"].startswith("1")
    single = optimize(
        vlm,
        Budget.parse(bytes="0.8x", loss="100pt"),
        tasks=[replace(task, path=write_questions(tmp_path, 1))],
        effort=TINY,
        methods=["rtn"],
    )
    assert not single["met"] and "no held-back sample" in single["verdict"]


def test_the_command(nano_folder, tmp_path, monkeypatch, capsys, all_right):
    monkeypatch.chdir(tmp_path)
    path = write_questions(tmp_path, 2)
    common = ["optimize", str(nano_folder), "--data", str(path), "--method", "rtn", "--limit", "1", "--device", "cpu"]
    more = ["--strategy", "genetic", "-o", "out", "--json", "--quiet"]
    bred, real = [], evolution.best_by_rank
    monkeypatch.setattr(evolution, "POPULATION", 1)
    monkeypatch.setattr(evolution, "best_by_rank", lambda rows, count: bred.append(count) or real(rows, count))
    code = cli([*common, "--max-bytes", "0.9x", "--max-loss", "100pt", *more])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert code == 0 and report["met"] and report["recipe"].startswith("rtn") and captured.err == ""
    assert report["conditions"]["strategy"].startswith("genetic:") and bred
    assert cli([*common, "--max-bytes", "1B", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "No recipe meets the budget" in shown and "Nearest" in shown and "bytes" in shown
    assert (tmp_path / f"{nano_folder.name}-optimized" / "report.html").is_file()
    for wrong, said in (
        (["--max-flops", "half"], "--max-flops half"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--task", "world/color"], "world/colour"),
    ):
        assert cli(["optimize", str(nano_folder), *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
