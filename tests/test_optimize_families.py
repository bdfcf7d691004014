"""The main command on a saved folder of a tiny random model of every family, and a search that is killed or that meets
a full disk, as processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sqlite3
import time
from dataclasses import replace

import pytest

import foveate
from families import FAMILIES, picture, tiny
from foveate.cli import main as cli
from foveate.optimize import answers as answers_module
from foveate.optimize import main as main_module
from foveate.optimize import times as times_module
from foveate.optimize import workbench as workbench_module
from foveate.tasks.scores import judge

METHODS = ["--method", "uniform", "--method", "rtn"]


@pytest.fixture
def questions(tmp_path):
    """Six questions about three pictures of noise."""
    rows = []
    for index in range(6):
        name = f"{index // 2}.png"
        picture(index // 2, 40, 32).save(tmp_path / name)
        rows.append({"id": str(index), "image": name, "question": "What?", "answer": "no such answer"})
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hasty(monkeypatch):
    """Few recipes, short answers and short times."""
    monkeypatch.setattr(times_module, "PAIRS", 2)
    monkeypatch.setattr(times_module, "UNIT_SECONDS", 0.0)
    monkeypatch.setattr(workbench_module, "PICTURES", 1)
    monkeypatch.setattr(answers_module, "judge", lambda *question: 1.0)  # random weights know nothing
    monkeypatch.setattr(times_module, "TIMED_TOKENS", 2)
    effort = main_module.Effort(recipes=3, upgrades=0, explore=2, shortlist=2, rungs=((2, 1),), prove=2, timed=1)
    monkeypatch.setattr(main_module, "Effort", lambda: effort)
    real = main_module.find_tasks

    def find(*args):
        tasks, folder = real(*args)
        return [replace(task, max_new_tokens=2) for task in tasks], folder

    monkeypatch.setattr(main_module, "find_tasks", find)


def events(path):
    """Scores in a log, 0 while there is none."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return db.execute("select count(*) from scores").fetchone()[0]
    except sqlite3.Error:
        return 0


def start(command, before=lambda: None):
    """A process that runs the command; `before` runs in it first. It is forked, which saves the imports."""

    def body():
        before()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(cli(command))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


@pytest.fixture
def command(questions, tmp_path, hasty):
    """A search of a tiny model; -o is to be added."""
    tiny("llava").save(tmp_path / "model")
    limits = ["--max-bytes", "0.9x", "--max-loss", "100pt", "--device", "cpu", "--quiet", "--json"]
    return ["optimize", str(tmp_path / "model"), "--data", str(questions), *METHODS, *limits]


def results(out):
    report = json.loads((out / "report.json").read_text())
    keys = ("recipe", "mean_delta", "n", "flops", "bytes", "status", "reason")
    return report["recipe"], report["quality"], [{key: row[key] for key in keys} for row in report["trials"]]


def test_kill_9_in_the_middle_and_resume_give_the_same(command, tmp_path, capsys, monkeypatch):
    assert cli([*command, "-o", str(tmp_path / "whole")]) == 0
    out, real = tmp_path / "part", workbench_module.ModelWorkbench.answers

    def slow(self, *args):
        time.sleep(0.2)
        return real(self, *args)

    process = start(
        [*command, "-o", str(out)], lambda: monkeypatch.setattr(workbench_module.ModelWorkbench, "answers", slow)
    )
    deadline = time.monotonic() + 60
    while events(out / "study.db") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = events(out / "study.db")
    assert before >= 4 and not (out / "report.json").exists()
    assert cli([*command, "-o", str(out)]) == 0
    assert results(out) == results(tmp_path / "whole") and events(out / "study.db") > before


def test_ctrl_c_ends_the_command_with_the_best_so_far_and_the_same_command_goes_on(command, tmp_path, monkeypatch):
    out, real = tmp_path / "out", workbench_module.ModelWorkbench.answers

    def slow(self, *args):
        time.sleep(0.3)
        return real(self, *args)

    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell leaves it
        monkeypatch.setattr(workbench_module.ModelWorkbench, "answers", slow)

    process = start([*command, "-o", str(out)], before)
    deadline = time.monotonic() + 120
    while events(out / "study.db") < 4 and time.monotonic() < deadline:  # dense and a first recipe
        time.sleep(0.01)
    time.sleep(0.15)  # what was logged is weighed, and the next answers are still to come
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] and not report["met"] and "interrupted before the proof" in report["verdict"]
    assert foveate.load(out, device="cpu").recipe.text() == report["recipe"]
    assert cli([*command, "-o", str(out)]) == 0
    assert not json.loads((out / "report.json").read_text())["interrupted"]


@pytest.mark.parametrize("most", [6_000, 100_000], ids=["log", "model"])
def test_a_full_disk_leaves_the_log_alone_and_the_search_goes_on(command, tmp_path, capfd, most):
    """Files that cannot grow stand for a disk without room: writing the log, or later the model, fails."""
    out = tmp_path / "out"

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    process = start([*command, "-o", str(out)], full)
    process.join(120)
    assert process.exitcode == 2
    assert {path.name.split("-")[0] for path in out.iterdir()} <= {"study.db"}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    assert cli([*command, "-o", str(out)]) == 0 and (out / "report.html").is_file()


@pytest.mark.parametrize("family", ["nvila", *FAMILIES])
def test_the_command_on_every_family(family, questions, tmp_path, hasty, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    tiny(family).save(model)
    command = ["optimize", str(model), "--data", str(questions), "--device", "cpu", *METHODS, "--json", "--quiet"]
    code = cli([*command, "--max-bytes", "0.9x", "--max-loss", "100pt", "-o", str(out)])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["met"] and report["cost"]["bytes"] <= 0.9 * report["dense"]["cost"]["bytes"]
    assert {row["recipe"].split("(")[0] for row in report["trials"]} >= {"rtn"}
    assert "uniform" not in report["refused"] and (out / "report.html").is_file()
    assert foveate.load(out, device="cpu").recipe.text() == report["recipe"]


def test_answers_that_are_all_wrong_are_no_success(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers_module, "judge", judge)
    assert cli([*command, "-o", str(tmp_path / "out")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["met"] and report["verdict"].startswith(
        "Nothing is proven: the dense model is right on no sample"
    )
    assert report["recipe"] and report["out"] is None and not (tmp_path / "out" / "config.json").exists()
    assert 'class="verdict no"' in (tmp_path / "out" / "report.html").read_text()
