"""Times of finalists: on another shape, within a bounded time, without calibrating random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import foveate.optimize.result
from foveate.errors import InputError, RecipeError, UnknownNameError
from foveate.optimize import Budget, optimize
from foveate.optimize import answers as answers_module
from foveate.optimize import times as times_module
from foveate.optimize.run import Effort
from foveate.optimize.times import Times, affordable, answer_times
from foveate.tasks.base import TASKS
from foveate.weights.linear import QuantizedLinear

TEXT = [{"role": "user", "content": "Why?"}]


def asked(words: int) -> list[dict]:
    return [{"role": "user", "content": "why " * words}]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(times_module, "PAIRS", 2)
    monkeypatch.setattr(times_module, "UNIT_SECONDS", 0.0)
    monkeypatch.setattr(times_module, "TIMED_TOKENS", 2)


def test_pairs_follow_from_the_time_of_an_answer(monkeypatch):
    monkeypatch.setattr(times_module, "PAIRS", 20)
    assert affordable(0.01, 0.02, 40) == (20, True)
    assert affordable(1.0, 2.0, 40) == (5, True)
    assert affordable(2.0, 3.0, 40) == (8, False)  # dense against itself would leave too few pairs
    assert affordable(30.0, 60.0, 40) == affordable(30.0, 60.0, -9) == (2, False)


def test_a_slow_shape_is_asked_few_answers(vlm, monkeypatch):
    times = Times(vlm, [TEXT])
    answers = []
    monkeypatch.setattr(times_module, "SECONDS", 0.0)  # any answer is too slow
    monkeypatch.setattr(
        times_module, "answer_times", lambda vlm, _: lambda i: answers.append(i) or {"ttft": 1.0, "decode": 1.0}
    )
    planned = []
    row = times.compare("rtn(bits=8)", planned.append, lambda: None)
    # one answer of each to begin with, two pairs, and two more pairs at most where the machine is busy
    assert planned == [2] and row["pairs"] >= 2 and len(answers) <= 2 + 8 and row["aa_low"] is None


def test_the_middling_request_comes_first(vlm):
    times = Times(vlm, [asked(1), asked(40), asked(10), asked(12), asked(300)])
    assert times.sample[0] == asked(12) and times.sample[-1] == asked(300)


def test_a_shape_without_a_question_is_one_clear_line(vlm):
    times = Times(vlm, [[{"role": "user", "content": [{"type": "image", "image": "no such file.png"}]}]], "nano")
    with pytest.raises(InputError, match=r"--time-on nano: it can be asked none of the questions: .*no such file"):
        _ = times.sample
    with pytest.raises(UnknownNameError, match="did you mean 'nano'"):
        Times(vlm, [TEXT], "nanno")


def test_random_weights_are_not_calibrated(vlm, monkeypatch):
    from foveate.weights import calibrate

    monkeypatch.setattr(calibrate, "compress_", lambda *a, **k: pytest.fail("calibrated"))
    times = Times(vlm, [TEXT], "nano")
    small = times.model("uniform(keep=0.5) + gptq(bits=4)")
    layers = [module for module in small.model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and small.recipe.of("reduce") and times.dense.dtype == torch.bfloat16
    assert answer_times(small, [TEXT])(0)["ttft"] > 0
    assert all(torch.isfinite(module.weight).all() for module in layers)
    assert not any(isinstance(module, QuantizedLinear) for module in times.dense.model.modules())


def test_finalists_are_timed_on_the_named_shape(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "judge", lambda *question: 1.0)
    task = replace(TASKS.get("world/colour"), max_new_tokens=2)
    effort = Effort(recipes=3, upgrades=0, explore=2, shortlist=2, rungs=((2, 2),), prove=2)
    options = {"tasks": [task], "effort": effort, "methods": ["rtn"], "out": tmp_path / "out"}
    report = optimize(vlm, Budget.parse(ttft="50x", loss="100pt"), time_on="nano", **options)
    assert report["met"] and len(report["timing"]) == 2
    assert {row["on"] for row in report["timing"]} == {"nano with random weights in bfloat16"}
    assert "Timed on nano with random weights" in (tmp_path / "out" / "report.html").read_text()
    shown = foveate.optimize.result.text(report)
    assert f"time of {report['recipe']} on nano with random weights in bfloat16: to first token " in shown


def test_absolute_limits_start_from_the_time_of_dense(vlm):
    found = Times(vlm, [TEXT]).base(["ttft", "tpot", "throughput"])
    assert set(found) == {"ttft_ms", "tpot_ms", "throughput"} and min(found.values()) > 0
    assert set(Times(vlm, [TEXT]).base(["tpot"])) == {"tpot_ms"}


def test_a_recipe_of_other_layers_cannot_be_timed(vlm):
    with pytest.raises(RecipeError, match="bits has 1 numbers, this model has 4"):
        Times(vlm, [TEXT], "nano").compare("mixed(bits=[4])", lambda n: None, lambda: None)
