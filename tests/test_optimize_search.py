"""The search on known truth: a synthetic workbench whose recipes have set costs and set true losses."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from foveate.errors import BudgetError, UnsupportedError
from foveate.optimize import strategies as strategies_module
from foveate.optimize.budget import Budget, Cost, Limit, amount, parse_loss, points
from foveate.optimize.result import text, to_report
from foveate.optimize.run import Effort, search, skill_table
from foveate.optimize.samples import Question, Split
from foveate.optimize.search import Trial, binding, choose, front, halve, nearest, paired_interval, prune
from foveate.optimize.space import Space
from foveate.tasks.base import Item

DENSE = Cost(1000.0, 1000.0, 100.0)
SKILLS = ("colour", "text_small")


class Synthetic:
    """Every recipe: relative cost and the chance that it loses a question that dense answers.

    Dense answers nine of ten. `interrupt_at`: raise Ctrl-C at that many calls of `scores`.
    """

    name, data = "synthetic", "made up"

    def __init__(self, table: dict[str, tuple[float, float, float]], n: int = 2000, interrupt_at: int | None = None):
        self.table, self.asked, self.interrupt_at = table, [], interrupt_at
        question = [Question(Item(str(i), [], ("a",)), SKILLS[i % 2], SKILLS[i % 2], "exact", 4) for i in range(n)]
        self.choose, self.prove = Split(question), Split(question[:])
        self.saved = None

    def cost(self, recipe):
        flops, size, _ = self.table.get(recipe, (1.0, 1.0, 0.0))
        return Cost(1000 * flops, 1000 * size, 100 * flops)

    def space(self):
        return Space([["", *self.table]], sockets=("reduce",)), {}

    def measure(self, recipe, axis):
        return {"value": 8.0 if axis == "memory" else 30.0, "dense": 10.0}

    def scores(self, recipe, split, n):
        self.asked.append((recipe, split, n))
        if self.interrupt_at is not None and len(self.asked) >= self.interrupt_at:
            raise KeyboardInterrupt
        whole = np.random.default_rng(7 if split == "choose" else 8)
        dense = (whole.random(5000) < 0.9)[:n]
        drawn = np.random.default_rng(zlib.crc32(f"{recipe} {split}".encode())).random(5000)[:n]
        return (dense & (drawn >= self.table.get(recipe, (1, 1, 0.0))[2])).astype(float)

    def stage(self, title, questions):
        pass

    def expect(self, recipes):
        pass

    def recall(self, key, value=None):
        return value

    def upgrades(self, recipe, most):
        return []

    def time(self, recipe):
        return {"ms": 10 * self.table[recipe][0], "dense_ms": 10.0, "ratio": self.table[recipe][0]} | {
            "low": 0.4,
            "high": 0.6,
            "pairs": 10,
        }

    def naive(self, recipe):
        return {"random tokens": "random(keep=0.5)"}

    def pictures(self, recipe):
        return []

    def save(self, recipe, folder):
        self.saved = recipe


TABLE = {
    "good": (0.45, 0.45, 0.0),
    "cheaper": (0.3, 0.3, 0.12),
    "poor": (0.45, 0.4, 0.3),
    "too much": (0.8, 0.4, 0.0),
    "random(keep=0.5)": (0.45, 0.45, 0.25),
}
QUICK = Effort(explore=100, shortlist=3, rungs=((200, 3), (600, 2)), prove=1000, timed=1)


def quiet(line):
    pass


# ---- budgets


def test_limits_are_relative_or_have_units():
    assert Limit.parse("flops", "0.5x") == Limit("flops", 0.5, True)
    assert Limit.parse("flops", "2.5 GFLOPs").value == 2.5e9
    assert Limit.parse("bytes", "8GiB").value == 8 * 2**30
    assert Limit.parse("bytes", "3.5MB").value == 3.5e6
    assert Limit.parse("ttft", "0.4s").value == 400
    assert Limit.parse("tokens", "128").value == 128
    assert Limit.parse("ttft", "0.5x").bound(DENSE) is None
    assert Limit.parse("bytes", "0.5x").bound(DENSE) == 500


@pytest.mark.parametrize(
    ("axis", "text"), [("flops", "half"), ("bytes", "-1x"), ("ttft", "400"), ("tokens", "0"), ("flops", "1e999x")]
)
def test_bad_limits_say_what_to_write(axis, text):
    with pytest.raises(BudgetError, match=f"--max-{axis} {text}.*write 0.5x"):
        Limit.parse(axis, text)


def test_loss_is_in_points():
    assert parse_loss("1pt") == parse_loss("1 %") == parse_loss(1) == 0.01
    with pytest.raises(BudgetError, match="--max-loss lots"):
        parse_loss("lots")
    assert points(-0.0004, True) == "+0.0 pt" and points(-0.012, True) == "-1.2 pt"
    assert amount("bytes", 5.6e6) == "5.6 MB" and amount("ttft", None) == "–"


def test_default_budget_is_half_the_cost():
    budget = Budget.parse()
    assert budget.to_dict() == {"flops": "0.5x", "bytes": "0.5x", "max_loss": 0.01}
    assert Budget.parse(bytes="100").broken(DENSE, DENSE) == ["bytes"]
    assert budget.relative_cost(Cost(250, 1000, 1), DENSE) == pytest.approx(0.5)


# ---- pure parts


def test_front_is_what_nothing_beats():
    costs = [[1, 1], [2, 1], [1, 2], [3, 3], [1, 1]]
    assert front(costs, [0.5, 0.7, 0.4, 0.7, 0.5]) == [0, 1]
    assert front([[1], [2]], [1.0, 1.0]) == [0]


def test_interval_covers_the_true_difference_about_95_times_of_100():
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        dense = (rng.random(300) < 0.8).astype(float)
        other = np.where(rng.random(300) < 0.1, 0.0, dense)
        delta = paired_interval(dense, other, seed=seed, resamples=300)
        covered += delta.low <= -0.08 <= delta.high
    assert 0.9 <= covered / 150 <= 0.99


def test_interval_never_claims_certainty():
    same = paired_interval(np.ones(50), np.ones(50))
    assert same.mean == 0 and same.low == pytest.approx(-0.0713, abs=1e-3) and same.high == -same.low
    worse = paired_interval(np.ones(50), np.zeros(50))
    assert worse.low == -1 and worse.high > -1
    assert paired_interval(np.zeros(0), np.zeros(0)).low == -1


def test_interval_weighs_tasks_equally():
    dense, other = np.ones(110), np.r_[np.ones(100), np.zeros(10)]
    groups = ["common"] * 100 + ["rare"] * 10
    assert paired_interval(dense, other, groups).mean == pytest.approx(-0.5)
    assert paired_interval(dense, other).mean == pytest.approx(-10 / 110)


def test_pruning_keeps_the_largest_that_fit_and_gives_reasons():
    trials = [
        Trial(f"uniform(keep={k})", Cost(1000 * k, 1000, 100 * k), "uniform", k) for k in (0.9, 0.5, 0.45, 0.2, 0.1)
    ]
    kept = prune(trials, Budget((Limit("flops", 0.5, True),)), DENSE)
    assert [t.keep for t in kept] == [0.5, 0.2]
    assert trials[0].status == "pruned" and "flops 1.80 times" in trials[0].reason
    assert trials[2].status == "pruned" and "keeps more tokens" in trials[2].reason


def test_pruning_leaves_the_nearest_when_nothing_fits():
    trials = [Trial(f"m{i}", Cost(600 + i, 900, 1), f"m{i}", keep=0.05) for i in range(9)]
    mild = Trial("mild", Cost(990, 900, 1), "mild")
    kept = prune([*trials, mild], Budget((Limit("flops", 0.5, True),)), DENSE, nearest=4)
    assert [t.recipe for t in kept] == ["m0", "m1", "mild", "m2"]
    assert all(t.status == "alive" for t in kept) and trials[5].status == "pruned"


def test_halving_finds_the_best_and_drops_with_reasons():
    bench = Synthetic(TABLE)
    trials = [Trial(recipe, bench.cost(recipe)) for recipe in TABLE]
    best = halve(trials, lambda r, n: bench.scores(r, "choose", n), Budget.parse(), DENSE, ((100, 3), (600, 2)))
    assert best[0].recipe in ("good", "too much") and best[0].delta.n == 600
    poor = next(t for t in trials if t.recipe == "poor")
    assert poor.status == "rejected" and poor.reason.startswith("loses") and poor.delta.n == 100
    assert len([a for a in bench.asked if a[2] == 600]) < len(trials)  # few saw many samples


def test_choice_is_the_cheapest_within_one_standard_error():
    budget = Budget((Limit("flops", 0.5, True),))
    score = np.ones(400)
    nearly = score.copy()
    nearly[0] = 0
    trials = [Trial("dear", Cost(490, 1, 1)), Trial("cheap", Cost(300, 1, 1)), Trial("bad", Cost(100, 1, 1))]
    for trial, got in zip(trials, (score, nearly, score * 0)):
        trial.delta = paired_interval(score, got)
    assert choose(trials, budget, DENSE).recipe == "cheap"
    assert choose(trials[2:], budget, DENSE) is None
    assert choose(trials, Budget((Limit("flops", 0.01, True),)), DENSE) is None


def test_binding_names_what_stands_in_the_way():
    budget = Budget.parse(flops="0.5x", bytes="0.5x")
    only_flops, both = Trial("a", Cost(900, 100, 1)), Trial("b", Cost(900, 900, 1))
    assert binding([only_flops, both], budget, DENSE) == ["flops"]
    assert binding([both], budget, DENSE) == ["bytes", "flops"]
    lossy = Trial("c", Cost(100, 100, 1), delta=paired_interval(np.ones(100), np.zeros(100)))
    assert binding([lossy], budget, DENSE) == ["loss"]
    assert binding([lossy, only_flops, both], budget, DENSE) == ["flops", "loss"]  # either alone would do
    fine = Trial("d", Cost(100, 100, 1), delta=paired_interval(np.ones(100), np.ones(100)))
    assert binding([fine, both], budget, DENSE) == []
    dear = Trial("e", Cost(600, 100, 1), delta=paired_interval(np.ones(100), np.ones(100)))
    assert [t.recipe for t in nearest([lossy, dear, both], budget, DENSE)] == ["c", "e"]


# ---- the whole flow


def test_search_finds_the_winner_and_proves_it():
    bench = Synthetic(TABLE)
    found = search(bench, Budget.parse(loss="2pt"), QUICK, say=quiet)
    assert found.winner.recipe == "good" and found.winner.status == "chosen"
    assert found.met and found.proof.n == 1000 and found.binding == []
    assert [row["role"] for row in found.compare] == ["dense", "chosen", "random tokens"]
    assert found.compare[2]["mean_delta"] < -0.1
    assert {t.status for t in found.trials if t is not found.winner} <= {"pruned", "rejected"}
    assert all(t.reason for t in found.trials if t is not found.winner)
    assert {split for recipe, split, _ in bench.asked if recipe == "poor"} == {"choose"}  # the proof is for the winner


def test_the_baseline_wins_no_tie_and_the_winner_is_on_the_front():
    table = {"a": (0.4, 0.4, 0.0), "random(keep=0.5)": (0.4, 0.4, 0.0), "uniform(keep=0.5)": (0.4, 0.4, 0.0)}
    for names in (("random(keep=0.5)", "uniform(keep=0.5)"), ("a", "uniform(keep=0.5)")):
        bench = Synthetic({name: table[name] for name in names})
        found = search(bench, Budget.parse(), QUICK, say=quiet)
        assert found.winner.recipe == names["a" not in names]
        front = to_report(found, model="m", data="d", conditions={})["front"]
        assert [row["status"] for row in front] == ["chosen"] and front[0]["recipe"] == found.winner.recipe


def test_unreachable_budget_says_what_binds():
    found = search(Synthetic(TABLE), Budget.parse(flops="0.01x"), QUICK, say=quiet)
    assert found.winner is None and not found.met and found.binding == ["flops"]
    assert found.nearest and all(t.delta for t in found.nearest)
    assert {t.status for t in found.trials if t.delta} == {"rejected"} and all(t.reason for t in found.trials)
    assert "FLOPs: the lowest of all recipes weighed is 0.30x" in found.verdict and "not changed" in found.verdict


def test_too_lossy_is_not_met():
    found = search(Synthetic({"poor": TABLE["poor"]}), Budget.parse(), QUICK, say=quiet)
    assert found.winner is None and found.binding == ["loss"] and found.nearest[0].recipe == "poor"


def test_measured_time_can_overrule_the_prediction():
    found = search(Synthetic({"good": TABLE["good"]}), Budget.parse(ttft="0.4x"), QUICK, say=quiet)
    assert found.winner is None and found.binding == ["ttft"]
    assert found.nearest[0].cost.ttft_ms == pytest.approx(4.5)
    shown = text(to_report(found, model="m", data="d", conditions={}))
    assert "  good: FLOPs 450 FLOP (0.45x), bytes 450 B (0.45x), time to first token 4.5 ms (0.45x), accuracy" in shown
    met = search(Synthetic({"good": TABLE["good"]}), Budget.parse(ttft="0.5x"), QUICK, say=quiet)
    assert met.met and "first token, 0.45x [0.40, 0.60] of dense in 10 pairs, may lie beyond its limit" in met.verdict
    assert "proven" not in met.verdict
    sure = search(Synthetic({"good": TABLE["good"]}), Budget.parse(ttft="0.7x"), QUICK, say=quiet)
    assert sure.met and "beyond its limit" not in sure.verdict and "busy" not in sure.verdict
    bench = Synthetic({"good": TABLE["good"]})
    real = bench.time
    bench.time = lambda recipe: real(recipe) | {"noisy": True}
    assert "The machine was busy" in search(bench, Budget.parse(ttft="0.7x"), QUICK, say=quiet).verdict
    assert "busy" not in search(bench, Budget.parse(loss="2pt"), QUICK, say=quiet).verdict  # no time is limited


def test_ctrl_c_keeps_the_best_so_far():
    lines = []
    found = search(Synthetic(TABLE, interrupt_at=7), Budget.parse(), QUICK, say=lines.append)
    assert found.interrupted and not found.met and found.winner.recipe == "good"
    assert "not proven" in found.verdict and any("interrupted" in line for line in lines)
    bench = Synthetic(TABLE)
    search(bench, Budget.parse(loss="2pt"), QUICK, say=quiet)
    last = search(Synthetic(TABLE, interrupt_at=len(bench.asked)), Budget.parse(loss="2pt"), QUICK, say=quiet)
    assert last.interrupted and last.met and last.kept is last.winner and "interrupted before the naive" in last.verdict
    early = search(Synthetic(TABLE, interrupt_at=1), Budget.parse(), QUICK, say=quiet)
    assert early.interrupted and early.winner is None and "Interrupted" in early.verdict


def test_a_winner_that_fails_the_proof_is_not_kept():
    bench = Synthetic({"good": (0.4, 0.4, 0.0)})
    real = bench.scores
    bench.scores = lambda r, split, n: real(r, split, n) * (split == "choose" or r == "")
    found = search(bench, Budget.parse(), QUICK, say=quiet)
    assert found.winner.recipe == "good" and not found.met and found.kept is None
    assert found.verdict.startswith("Not met: -9") and "beyond noise" in found.verdict


def test_answers_that_are_all_wrong_are_no_success():
    bench, lines = Synthetic({"good": (0.4, 0.4, 0.0)}), []
    bench.scores = lambda recipe, split, n: np.zeros(n)
    found = search(bench, Budget.parse(), QUICK, say=lines.append)
    assert not found.met and found.kept is None and found.verdict.startswith("Nothing is proven")
    assert "right on no sample of 1000" in found.verdict and any("right on none of the first 100" in s for s in lines)
    bench.prove = Split([])
    assert "right on no sample" in search(bench, Budget.parse(), QUICK, say=quiet).verdict


def test_exploring_that_takes_too_long_is_cut_and_said():
    bench, memory = Synthetic(TABLE), {}
    effort = replace(QUICK, strategy="random", patience=-1.0)
    bench.recall = lambda key, value=None: memory.setdefault(key, value) if value else memory.get(key)
    context_batch = strategies_module.BATCH
    table = {f"m{i}": (0.4, 0.4, 0.0) for i in range(3 * context_batch)}
    bench.table = table
    found = search(bench, Budget.parse(), effort, say=quiet)
    assert found.cut == context_batch and f"{context_batch} of {effort.recipes} recipes were tried" in found.verdict
    assert to_report(found, model="m", data="d", conditions={})["space"]["cut"] == context_batch
    again = search(bench, Budget.parse(), replace(effort, patience=1e9), say=quiet)
    assert again.cut == found.cut  # a search that goes on from its log repeats it, whatever the clock says
    assert [t.recipe for t in again.trials if t.delta] == [t.recipe for t in found.trials if t.delta]
    memory.clear()
    assert search(bench, Budget.parse(), replace(effort, patience=1e9), say=quiet).cut is None


def test_the_verdict_says_what_no_recipe_reaches_and_what_is_possible_without_the_limit():
    bench = Synthetic({"small": (1.0, 0.3, 0.0), "lossy": (0.8, 0.3, 0.5)})
    real = bench.cost

    def cost(recipe):
        found = real(recipe)
        parts = {"tower": 700.0, "connector": 40.0, "prefill": found.flops - 740, "decode": 0.0, "selection": 0.0}
        return replace(found, parts={**parts, "weights": found.bytes, "cache": 0.0})

    bench.cost = cost
    found = search(bench, Budget.parse(flops="0.5x", bytes="0.5x"), QUICK, say=quiet)
    assert found.binding == ["flops"]
    assert "is 0.80x of dense, of which vision tower and connector are 0.74x, untouched." in found.verdict
    assert "Without the limit on FLOPs, small is within the rest: +0.0 pt" in found.verdict


def test_finalists_beyond_the_time_for_timing_or_that_cannot_be_timed_are_no_winners():
    budget, table = Budget.parse(ttft="0.5x"), {"good": TABLE["good"], "fine": (0.46, 0.45, 0.0)}
    bench, timed = Synthetic(table), []
    real = bench.time
    bench.time = lambda recipe: timed.append(recipe) or real(recipe)
    found = search(bench, budget, replace(QUICK, timing=-1.0), say=quiet)
    assert not timed and found.winner is None and any("not timed" in t.reason for t in found.trials)

    def refuse(recipe):
        raise UnsupportedError("that shape has other layers")

    bench.time = refuse
    found = search(bench, budget, QUICK, say=quiet)
    assert found.winner is None and any("other layers" in t.reason for t in found.trials)
    assert search(bench, Budget.parse(loss="2pt"), QUICK, say=quiet).met  # here times are for the report alone


def test_absolute_times_prune_by_what_is_predicted():
    bench = Synthetic({"fast": (0.3, 0.9, 0.0), "slow": (0.9, 0.9, 0.0)})
    real, asked = bench.cost, []
    bench.cost = lambda recipe: replace(real(recipe), hints={"ttft": real(recipe).flops / 1000})
    bench.base = lambda axes: asked.append(list(axes)) or {"ttft_ms": 100.0}
    found = search(bench, Budget.parse(ttft="40ms", loss="2pt"), QUICK, say=quiet)
    assert asked == [["ttft"]] and found.met and found.winner.recipe == "fast"
    assert [t.reason for t in found.trials if t.recipe == "slow"] == ["ttft 0.90x of dense by estimate"]
    assert "slow" not in {recipe for recipe, _, _ in bench.asked}


def test_nothing_held_back_is_not_a_proof():
    bench = Synthetic(TABLE)
    bench.prove = Split([])
    found = search(bench, Budget.parse(loss="2pt"), QUICK, say=quiet)
    assert found.winner.recipe == "good" and not found.met and "no held-back sample" in found.verdict


def test_a_falling_skill_is_marked_though_the_mean_holds():
    groups = ["colour"] * 200 + ["text_small"] * 40
    dense = np.ones(240)
    other = dense.copy()
    other[200:220] = 0
    table = skill_table(dense, other, groups, 0.01)
    assert table["colour"]["warning"] == "" and table["text_small"]["warning"] == "falls by 50 pt"
    assert table["text_small"]["delta"] == -0.5 and table["text_small"]["high"] < 0


def test_effort_scales_with_the_time_given():
    assert Effort().scaled(0.5).rungs[0][0] == Effort().rungs[0][0] // 2
    assert Effort().scaled(0.0001).prove == 32
