"""The hint of times that a search prunes by: right in direction, silent where it knows nothing, never the last word."""

from __future__ import annotations

import pytest

import foveate
from foveate.bench import cost as costs
from foveate.optimize.budget import Budget, Cost
from foveate.optimize.estimate import Estimator


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
    assert estimator.ratios("") == {"ttft": 1.0, "tpot": 1.0}


def test_fewer_tokens_are_predicted_to_answer_sooner(estimator):
    half, tenth = (estimator.ratios(f"uniform(keep={keep})")["ttft"] for keep in (0.5, 0.1))
    assert tenth < half < 1.0


def test_fewer_bits_are_predicted_to_read_less_for_each_token(estimator):
    assert estimator.ratios("rtn(bits=4)")["tpot"] < estimator.ratios("rtn(bits=8)")["tpot"] < 1.0


def test_what_does_not_fit_the_timed_shape_has_no_estimate(estimator):
    assert estimator.ratios("fastv(keep=0.5, layer=40)") == {}


def test_only_relative_limits_that_are_missed_by_half_make_a_recipe_improbable():
    budget = Budget.parse(ttft="0.6x")
    assert budget.unlikely(Cost(1, 1, 1, hints={"ttft": 0.9})) == {"ttft": 0.9}
    assert budget.unlikely(Cost(1, 1, 1, hints={"ttft": 0.79})) == {}  # more than half of the saving is in sight
    assert budget.unlikely(Cost(1, 1, 1)) == {}
    assert Budget.parse(ttft="40ms").unlikely(Cost(1, 1, 1, hints={"ttft": 0.9})) == {}
