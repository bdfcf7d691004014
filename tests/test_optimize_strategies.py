"""Strategies on known truth: surrogate, Optuna, evolution, programmes, schedules; the log; the space."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foveate.errors import InputError, RecipeError, UnknownNameError, UnsupportedError
from foveate.optimize.budget import Budget, Cost, Limit
from foveate.optimize.evolution import POPULATION, GeneticStrategy, best_by_rank
from foveate.optimize.layers import allocate
from foveate.optimize.run import Effort, explore, search
from foveate.optimize.search import Interval, Trial
from foveate.optimize.space import Space, build_space, fitting, ranges, variants
from foveate.optimize.strategies import STRATEGIES, Context, area
from foveate.optimize.study import Study, fingerprint
from foveate.optimize.surrogate import Part, Surrogate, gains, hypervolume
from foveate.registry import METHODS

KEEPS = (0.8, 0.6, 0.4, 0.2)
GOOD = {"uniform": 0.05, "random": 0.4, "fastervlm": 0.02}  # loss of keeping nothing, by method
BITS = {8: 0.0, 4: 0.01, 3: 0.05}


class Bench:
    """A world in which losses add up: costs and losses of every recipe are known, scores are drawn around them."""

    name, data = "made", "made up"

    def __init__(self, noise: bool = True) -> None:
        reduce = [f"{name}(keep={keep})" for name in GOOD for keep in KEEPS]
        weights = [f"rtn(bits={bits}, group=32)" for bits in BITS]
        slots = [["", *reduce], ["", *weights], ["", "int8"]]
        self._space = Space(slots, sockets=("reduce", "weights", "cache"))
        self.asked: list[str] = []
        self.noise = noise
        self.choose = self.prove = SimpleNamespace(tasks=["t"] * 4000, skills=["s"] * 4000)

    def space(self):
        return self._space, {}

    def _parts(self, recipe):
        parts = recipe.split(" + ")
        keep = next((float(p.split("keep=")[1][:-1]) for p in parts if "keep=" in p), 1.0)
        bits = next((int(p.split("bits=")[1].split(",")[0]) for p in parts if "bits=" in p), 16)
        return keep, bits, "int8" in parts, parts[0].partition("(")[0]

    def cost(self, recipe):
        keep, bits, small, _ = self._parts(recipe)
        return Cost(200 + 800 * keep, 900 * bits / 16 + 100 * keep * (0.5 if small else 1), 100 * keep)

    def loss(self, recipe):
        keep, bits, small, name = self._parts(recipe)
        return GOOD.get(name, 0.0) * (1 - keep) ** 2 + BITS.get(bits, 0.0) + 0.002 * small

    def scores(self, recipe, split, n):
        self.asked.append(recipe)
        dense = np.ones(n)
        rng = np.random.default_rng(zlib.crc32(recipe.encode()))
        lost = rng.random(4000)[:n] < self.loss(recipe) if self.noise else np.arange(n) < round(n * self.loss(recipe))
        return dense - (lost if recipe else 0)

    def stage(self, title, questions):
        pass

    def expect(self, recipes):
        pass

    def recall(self, key, value=None):
        return value

    def upgrades(self, recipe, most):
        return []

    def layers(self):
        return 4

    def divergence(self, recipe, n):
        return float(len(recipe))


def context(bench: Bench, budget: Budget | None = None, **options) -> Context:
    return Context(bench, bench.space()[0], budget or Budget.parse(), bench.cost(""), samples=200, **options)


def tried(bench: Bench, made: Context, strategy: str, count: int) -> list[Trial]:
    found = SimpleNamespace(trials=[], budget=made.budget, dense=made.dense)
    effort = Effort(strategy=strategy, recipes=count, explore=made.samples, shortlist=count)
    explore(bench, found, made, effort, made.seed, lambda line: None)
    return found.trials


SEARCHERS = ("surrogate", "random", "tpe", "nsga2", "genetic")


@pytest.mark.parametrize("strategy", SEARCHERS)
def test_every_strategy_stays_within_the_budget_and_never_repeats_itself(strategy):
    bench, budget = Bench(), Budget.parse(flops="0.6x", bytes="0.6x")
    made = context(bench, budget)
    count = POPULATION + 8  # so that evolution breeds
    trials = tried(bench, made, strategy, count)
    recipes = [trial.recipe for trial in trials]
    assert len(recipes) == len(set(recipes)) == count
    assert not any(made.budget.broken(bench.cost(recipe), made.dense) for recipe in recipes)
    assert [
        t.recipe for t in tried(Bench(), context(Bench(), budget), strategy, count)
    ] == recipes  # same seed, same search


def test_the_surrogate_finds_the_good_method_with_few_trials():
    bench = Bench()
    trials = tried(bench, context(bench), "surrogate", 14)
    assert "fastervlm" in min(trials, key=lambda t: bench.loss(t.recipe)).recipe
    best = min(bench.loss(r) for r in bench.space()[0].recipes(999, random.Random(0)) if r and context(bench).fits(r))
    assert min(bench.loss(t.recipe) for t in trials) <= best + 0.005


def test_the_surrogate_finds_more_of_the_front_than_random_search():
    found = {}
    for strategy in ("surrogate", "random"):
        areas = []
        for seed in range(3):
            bench = Bench()
            made = context(bench, seed=seed, front=True)
            run = tried(bench, made, strategy, 12)
            for trial in run:  # judged by the truth
                trial.delta = Interval(-bench.loss(trial.recipe), 0, 0, 1)
            areas.append(area(run, made))
        found[strategy] = np.median(areas)
    assert found["surrogate"] > found["random"]


def test_an_unreachable_budget_is_approached():
    bench = Bench()
    made = context(bench, Budget((Limit("flops", 0.01, True),)))
    for strategy in ("surrogate", "random", "tpe"):
        trials = tried(bench, made, strategy, 4)
        assert trials and all(bench.cost(t.recipe).flops > 10 for t in trials)


def test_surrogate_learns_that_losses_add_up_and_grow():
    parts = {
        "": (),
        "a": (Part("reduce", "a", 0.7),),
        "b": (Part("weights", "b", 1.0),),
        "a + b": (Part("reduce", "a", 0.7), Part("weights", "b", 1.0)),
        "A": (Part("reduce", "a", 1.4),),
        "other": (Part("cache", "c", 0.5),),
    }
    model = Surrogate(parts)
    model.fit(["a", "b"], [0.10, 0.05], [0.005, 0.005])
    mean, spread = model.predict(["a + b", "", "A", "other"])
    assert mean[0] == pytest.approx(0.15, abs=0.02) and mean[1] == 0 and mean[2] > mean[0] - 0.06
    assert spread[1] < 1e-5 and spread[0] < spread[2] and mean[3] == 0


def test_hypervolume_is_the_area_below_the_reference():
    points = [(0.2, 0.4), (0.5, 0.1), (0.6, 0.2), (2.0, 0.0)]
    grid = [((i + 0.5) / 200, (j + 0.5) / 200) for i in range(200) for j in range(200)]
    counted = sum(any(c <= x and loss <= y for c, loss in points) for x, y in grid) / len(grid)
    assert hypervolume(points, (1.0, 1.0)) == pytest.approx(counted, abs=0.01)
    more = hypervolume([*points, (0.1, 0.1)], (1.0, 1.0)) - hypervolume(points, (1.0, 1.0))
    assert gains(np.array(points), np.array([[0.1, 0.1], [0.7, 0.7]]), (1.0, 1.0)) == pytest.approx([more, 0.0])
    assert more > 0.1


def test_ranks_put_the_front_first_and_spread_it():
    rows = np.array([[1, 5], [2, 2], [5, 1], [3, 3], [2.1, 2.1], [6, 6]])
    assert set(best_by_rank(rows, 3)) == {0, 1, 2} and best_by_rank(rows, 6)[-1] == 5
    crowded = np.array([[0, 10], [1, 9], [5, 5], [10, 0]])
    assert set(best_by_rank(crowded, 3)) == {0, 2, 3}


def test_evolution_mixes_the_slots_of_two_parents_and_changes_some():
    bench = Bench()
    strategy, space = GeneticStrategy(context(bench)), bench.space()[0]
    first, second = (1, 0, 1), (5, 2, 0)
    bred = [space.genome(strategy._child(first, second, random.Random(seed)) or "") for seed in range(600)]
    assert set(itertools.product(*zip(first, second))) <= set(bred)
    seen = Counter(genome[0] for genome in bred)
    assert set(seen) == set(range(len(space.slots[0])))
    assert min(seen[2], seen[6]) > 2 * seen[4]  # the neighbouring settings of the parents' methods are more likely


def test_evolution_measures_the_children_that_promise_most():
    good = bad = 0
    for seed in range(3):
        bench = Bench()
        bred = tried(bench, context(bench, seed=seed, front=True), "genetic", POPULATION + 8)[POPULATION:]
        good += sum("fastervlm" in trial.recipe for trial in bred)
        bad += sum("random" in trial.recipe for trial in bred)
    assert good > 3 * bad


# ---- programmes and schedules


def test_programmes_are_as_good_as_trying_everything():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    scores, sizes = rng.random((4, 3)), rng.random((4, 3))
    for limit, falling in itertools.product((1.2, 1.8), (False, True)):
        every = [
            plan
            for plan in itertools.product(range(3), repeat=4)
            if sum(sizes[i, a] for i, a in enumerate(plan)) <= limit
            and (not falling or all(a <= b for a, b in itertools.pairwise(plan)))
        ]
        found = allocate(scores, [sizes], [limit], falling=falling)
        if not every:
            assert found is None
            continue
        best = min(sum(scores[i, a] for i, a in enumerate(plan)) for plan in every)
        assert tuple(found) in every
        assert sum(scores[i, a] for i, a in enumerate(found)) == pytest.approx(best)
    assert allocate(scores, [sizes], [0.0]) is None


def test_each_layer_gets_its_own_bits(vlm, tmp_path):
    import foveate
    from foveate.recipe import Recipe
    from foveate.weights.linear import QuantizedLinear

    depth = vlm.adapter.shape.layers
    bits = [8, 4, 0, 3][:depth] + [0] * max(0, depth - 4)
    small = Recipe.parse(f"mixed(bits={bits})").apply(vlm, quiet=True)
    found = {}
    for index, layer in enumerate(small.adapter.layers):
        found[index] = {m.bits for m in layer.modules() if isinstance(m, QuantizedLinear)}
    assert [found[i] for i in range(depth)] == [{b} if b else set() for b in bits]
    small.save(tmp_path / "mixed")
    assert foveate.load(tmp_path / "mixed").recipe.text() == small.recipe.text()
    with pytest.raises(RecipeError, match=f"bits has 1 numbers, this model has {depth}"):
        Recipe.parse("mixed(bits=[4])").apply(vlm, quiet=True)
    with pytest.raises(RecipeError, match="bits holds 5"):
        Recipe.parse("mixed(bits=[5])")


@pytest.mark.parametrize("pruner", ["magnitude", "wanda"])
def test_each_layer_gets_its_own_zeros(vlm, tmp_path, pruner):
    import foveate
    from foveate.recipe import Recipe

    depth, parts = vlm.adapter.shape.layers, vlm.adapter.parts()
    shares = [0.5, 0.0, 0.75, 0.25][:depth] + [0.0] * max(0, depth - 4)
    recipe = Recipe.parse(f"layered(shares={shares}, pruner={pruner}, samples=2)")
    small = recipe.apply(vlm, quiet=True)
    zeros = 0
    for share, layer in zip(shares, small.adapter.layers):
        weights = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        gone = sum(int((weight == 0).sum()) for weight in weights)
        zeros += gone
        assert gone / sum(weight.numel() for weight in weights) == pytest.approx(share, abs=0.02)
    assert recipe.methods[0].zeros(parts) == pytest.approx(zeros, rel=0.02)
    assert recipe.methods[0].needs_data is (pruner == "wanda")
    small.save(tmp_path / "layered")
    assert foveate.load(tmp_path / "layered").recipe.text() == recipe.text()
    for wrong, said in (("[0.5]", f"shares has 1 numbers, this model has {depth}"), ("[1.5]", "shares holds 1.5")):
        with pytest.raises(RecipeError, match=said):
            Recipe.parse(f"layered(shares={wrong})").apply(vlm, quiet=True)


def test_the_programme_prunes_where_it_disturbs_least():
    pytest.importorskip("scipy")
    bench, harm = Bench(), (9.0, 1.0, 4.0, 1.0)

    def shares(recipe):
        return (
            [float(x) for x in recipe.split("shares=[")[1].split("]")[0].split(", ")] if "shares" in recipe else [0] * 4
        )

    bench.cost = lambda recipe: Cost(1, 1, 1, nonzeros=1000 - 200 * sum(shares(recipe)))
    bench.divergence = lambda recipe, n: sum(h * s * s for h, s in zip(harm, shares(recipe)))
    made = context(bench, Budget.parse(nonzeros="0.7x"))
    asked = STRATEGIES.get("milp")(made).ask([])
    assert {"pruner=magnitude" in recipe for recipe in asked} == {True, False} and len(asked) >= 4
    for recipe in asked:
        found = shares(recipe)
        assert bench.cost(recipe).nonzeros <= 700 and found[0] <= found[2] <= min(found[1], found[3])
    mild = min((shares(recipe) for recipe in asked), key=sum)
    every = [s for s in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8), repeat=4) if 1000 - 200 * sum(s) <= 700 + 1e-9]
    assert sum(h * s * s for h, s in zip(harm, mild)) == pytest.approx(
        min(sum(h * s * s for h, s in zip(harm, plan)) for plan in every)
    )
    assert STRATEGIES.get("milp")(context(bench, Budget.parse(tokens="2x"))).recipes != asked


def test_zeros_are_searched_where_their_number_is_limited(vlm):
    _, refused = fitting(vlm, ["magnitude", "rtn"])
    assert refused == {} and {m.sparsity for m in variants(METHODS.get("magnitude"))} == {0.3, 0.5, 0.7}
    from foveate.optimize.space import upgrades

    better = upgrades(vlm, "uniform(keep=0.5) + magnitude(sparsity=0.7)", 9)
    assert any("wanda(sparsity=0.7" in recipe for recipe in better)
    assert all("uniform(keep=0.5)" in recipe and "sparsity=0.7" in recipe for recipe in better)
    assert not any("bits" in recipe for recipe in better)


# ---- space and log


def test_space_is_pinned_forbidden_and_added_to(vlm):
    methods, _ = fitting(vlm, ["uniform", "random", "rtn", "int8"])
    plain = build_space(vlm, methods)
    pinned = build_space(vlm, methods, pin=["rtn(bits=4)"], forbid=["random", "uniform(keep=0.5)"])
    recipes = pinned.recipes(5000, random.Random(0))
    assert recipes and all("rtn(bits=4" in recipe for recipe in recipes)
    assert not any("random" in recipe or "uniform(keep=0.5)" in recipe for recipe in recipes)
    assert any("uniform(keep=0.5)" in recipe for recipe in plain.recipes(5000, random.Random(0)))
    named = build_space(vlm, methods, pin=["uniform"])
    assert all("uniform" in recipe for recipe in named.recipes(5000, random.Random(0)))
    added = build_space(vlm, methods, add=["uniform(keep=7)"])
    assert "uniform(keep=7)" in added.slots[0]
    for wrong, said in (
        ({"pin": ["int8", "int8"]}, "more methods"),
        ({"add": ["uniform(keep=7) + int8"]}, "one at a time"),
    ):
        with pytest.raises(RecipeError, match=said):
            build_space(vlm, methods, **wrong)
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        build_space(vlm, methods, forbid=["unifrom"])
    with pytest.raises(RecipeError, match="the space is empty"):
        build_space(vlm, methods, forbid=["uniform", "random", "rtn", "int8"])


def test_recipes_of_a_space_can_be_applied_and_read_back(vlm):
    methods, _ = fitting(vlm, ["uniform", "fastv", "rtn", "int8"])
    space = build_space(vlm, methods)
    drawn = space.recipes(60, random.Random(3))
    assert len(set(drawn)) == len(drawn) and any("uniform" in r and "fastv" in r for r in drawn)
    from foveate.recipe import Recipe

    for recipe in drawn[::7]:
        Recipe.parse(recipe).check(vlm)
        assert space.text(space.genome(recipe)) == recipe and Recipe.parse(recipe).text() == recipe
    assert space.genome("fastv(keep=0.5) + uniform(keep=0.5)") is None  # the wrong order is no recipe


def test_the_space_stays_small_with_many_methods():
    bench = Bench()
    bench._space = Space(
        [
            ["", *(f"m{i}(keep={k / 20})" for i in range(40) for k in range(1, 20))],
            ["", *(f"w{i}" for i in range(12))],
            [""],
        ],
        sockets=("reduce", "weights", "cache"),
    )
    bench.cost = lambda r: Cost(400 if "m" in r else 1000, 400 if "w" in r else 1000, 40 if "m" in r else 100)
    bench.loss = lambda r: 0.0
    assert len(tried(bench, context(bench), "surrogate", 40)) == 40


def test_grids_of_many_parameters_are_thinned():
    class Wide(METHODS.get("schedule")):
        space = {"keep": tuple(i / 100 for i in range(1, 90)), "steepness": (1.0, 2.0, 3.0)}  # noqa: RUF012

    assert len(variants(Wide)) == 60 and set(ranges(Wide)) == {"keep", "steepness"}


def test_log_survives_and_belongs_to_its_conditions(tmp_path):
    path = tmp_path / "out" / "study.db"
    study = Study(path, {"seed": "0"})
    study.add("a", "choose", {0: 1.0, 3: 0.5})
    study.add_cost("a", "time", {"ratio": 0.5})
    study.event("hello")
    again = Study(path, {"seed": "0"})
    assert again.resumed and again.scores() == {("a", "choose"): {0: 1.0, 3: 0.5}}
    assert again.cost("a", "time") == {"ratio": 0.5} and again.cost("b", "time") is None and again.events() == ["hello"]
    with pytest.raises(InputError, match="log of another search: its seed is '0', now it is '1'"):
        Study(path, {"seed": "1"})
    path.write_bytes(b"no database" * 200)
    with pytest.raises(InputError, match="cannot be used"):
        Study(path)
    assert fingerprint([1, "a"]) == fingerprint([1, "a"]) != fingerprint([1, "b"])


KILLED = """
import sys
from foveate.optimize.study import Study
from pathlib import Path
study = Study(Path(sys.argv[1]))
for i in range(100000):
    study.add(f"r{i}", "choose", {j: 1.0 for j in range(5)})
    print(i, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_logged(tmp_path):
    path = tmp_path / "study.db"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
    scores = Study(path).scores()
    assert len(scores) >= seen[-1] + 1 and all(len(row) == 5 for row in scores.values())


def test_a_falling_skill_is_refused_though_the_mean_holds():
    from foveate.optimize.search import by_skill, choose, fallen_skill, paired_interval

    skills = ["a"] * 300 + ["b"] * 60
    dense, other = np.ones(360), np.ones(360)
    other[300:312] = 0
    trial = Trial("r", Cost(1, 1, 1), delta=paired_interval(dense, other), skills=by_skill(dense, other, skills))
    budget = Budget((Limit("flops", 1.0, True),), max_loss=0.1, max_skill_loss=0.05)
    assert fallen_skill(trial, budget) == "b" and choose([trial], budget, Cost(1, 1, 1)) is None
    assert choose([trial], Budget(budget.limits, 0.1), Cost(1, 1, 1)) is trial


def test_measured_axes_bind_too():
    class Timed(Bench):
        def time(self, recipe):
            first = {"ms": 5.0, "dense_ms": 10.0, "ratio": 0.5, "low": 0.49, "high": 0.51}
            return first | {"tpot": {"ms": 9.0, "dense_ms": 10.0, "ratio": 0.9, "low": 0.89, "high": 0.91}}

        def measure(self, recipe, axis):
            return {"value": 12.0, "dense": 10.0}

        def naive(self, recipe):
            return {}

    effort = Effort(recipes=6, explore=50, rungs=((100, 2), (200, 1)), prove=100)
    for limit, met in (
        ({"tpot": "0.95x"}, True),
        ({"tpot": "0.5x"}, False),
        ({"throughput": "1.1x"}, True),
        ({"throughput": "2x"}, False),
    ):
        bench = Timed(noise=False)
        bench.choose = bench.prove = type(
            "Half", (), {"tasks": ["t"] * 400, "skills": ["s"] * 400, "__len__": lambda s: 400}
        )()
        found = search(bench, Budget.parse(loss="50pt", **limit), effort, say=lambda line: None)
        assert found.met is met, limit
        if not met:
            assert found.binding == list(limit)
    with pytest.raises(Exception, match="no limit on 'speed'"):
        Budget.parse(speed="2x")
    assert Limit.parse("throughput", "20req/s").value == 20 and Limit.parse("memory", "8GiB").value == 8 * 2**30


def test_optuna_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    bench = Bench()
    with pytest.raises(UnsupportedError, match="pip install optuna"):
        STRATEGIES.get("tpe")(context(bench)).ask([])
