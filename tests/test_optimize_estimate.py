"""The hint of times that a search prunes by: right in direction, silent where it knows nothing, never the last word."""

from __future__ import annotations

import pytest

import foveate
from foveate.bench import cost as costs
from foveate.optimize.budget import Budget, Cost
from foveate.optimize.estimate import Estimator
from foveate.optimize.search import Trial, improbable


@pytest.fixture(scope="module")
def estimator(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # the data sheet, not this machine's own
    vlm = foveate.load("nano", random_weights=True, device="cpu")
    shape = costs.ModelShape.from_config(vlm.model.config, vlm.spec)
    plan = vlm.plan(_messages())
    found = Estimator(shape, costs.Request.from_plan(plan, shape, new=8), vlm)
    patch.undo()
    return found


def _messages():
    from PIL import Image

    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (128, 128))}, {"type": "text", "text": "?"}],
        }
    ]


def test_dense_is_one(estimator):
    assert estimator.ratios("") == {"ttft": 1.0, "tpot": 1.0, "throughput": 1.0}


def test_fewer_tokens_are_predicted_to_answer_sooner(estimator):
    half, tenth = (estimator.ratios(f"uniform(keep={keep})")["ttft"] for keep in (0.5, 0.1))
    assert tenth < half < 1.0


def test_fewer_bits_are_predicted_to_read_less_for_each_token(estimator):
    assert estimator.ratios("rtn(bits=4)")["tpot"] < estimator.ratios("rtn(bits=8)")["tpot"] < 1.0


def test_what_does_not_fit_the_timed_shape_has_no_estimate(estimator):
    assert estimator.ratios("fastv(keep=0.5, layer=40)") == {}


def test_limits_that_are_missed_by_half_make_a_recipe_improbable():
    budget, dense = Budget.parse(ttft="0.6x"), Cost(1, 1, 1)
    assert budget.unlikely(Cost(1, 1, 1, hints={"ttft": 0.9}), dense) == {"ttft": 0.9}
    assert budget.unlikely(Cost(1, 1, 1, hints={"ttft": 0.79}), dense) == {}  # more than half of the saving is in sight
    assert budget.unlikely(Cost(1, 1, 1), dense) == {}


def test_absolute_limits_count_once_dense_was_timed():
    budget, small = Budget.parse(ttft="60ms"), Cost(1, 1, 1, hints={"ttft": 0.9})
    assert budget.unlikely(small, Cost(1, 1, 1)) == {}
    assert budget.unlikely(small, Cost(1, 1, 1, ttft_ms=100.0)) == {"ttft": 0.9}
    assert budget.unlikely(small, Cost(1, 1, 1, ttft_ms=50.0)) == {}  # dense itself is within
    more = Budget.parse(throughput="20req/s")
    fast, slow = (Cost(1, 1, 1, hints={"throughput": by}) for by in (1.6, 1.2))
    assert more.unlikely(slow, Cost(1, 1, 1, throughput=10.0)) == {"throughput": pytest.approx(1 / 1.2)}
    assert more.unlikely(fast, Cost(1, 1, 1, throughput=10.0)) == {}
    trial = Trial("slow", slow)
    assert improbable(trial, more, Cost(1, 1, 1, throughput=10.0)) and "throughput 1.20x of dense" in trial.reason
