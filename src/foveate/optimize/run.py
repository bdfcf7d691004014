"""The search from budget to verdict: explore, halve by paired scores, time the finalists, choose, prove.

Everything that needs a model is behind `Workbench`, so the whole flow is tested on known truth without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from foveate.errors import RecipeError, UnsupportedError
from foveate.optimize.budget import MEASURED, Budget, Cost, points
from foveate.optimize.search import (
    Interval,
    Trial,
    binding,
    by_skill,
    choose,
    halve,
    loss_text,
    nearest,
    paired_interval,
)
from foveate.optimize.strategies import STRATEGIES, Context
from foveate.optimize.verdict import explain, fallen, verdict

if TYPE_CHECKING:
    from pathlib import Path

    from foveate.optimize.report import Picture
    from foveate.optimize.samples import Split
    from foveate.optimize.space import Space


class Workbench(Protocol):
    """What the search needs to know about a model and data. A recipe is its text; "" is the dense model."""

    name: str
    data: str
    choose: Split
    prove: Split

    def space(self) -> tuple[Space, dict[str, str]]:
        """(the space, {method that does not fit: reason})."""

    def cost(self, recipe: str) -> Cost:
        """The counted cost of the mean request; nothing is run for it."""

    def scores(self, recipe: str, split: str, n: int) -> np.ndarray:
        """Scores [n] of the first n questions of "choose" or "prove"; what was asked before is not asked again."""

    def stage(self, title: str, questions: int) -> None:
        """Progress of the next answers."""

    def expect(self, recipes: Sequence[str]) -> None:
        """These are asked for next: what they share need be computed once only."""

    def time(self, recipe: str) -> dict[str, Any]:
        """Time to first token of the recipe against dense, {"ms", "dense_ms", "ratio", "low", "high", "pairs", ...},
        and the same under "tpot" for each further token. Raises RecipeError or UnsupportedError when the model that is
        timed cannot take the recipe."""

    def base(self, axes: Sequence[str]) -> dict[str, float]:
        """{"ttft_ms", "tpot_ms", "throughput"} of the dense model, measured: those of `axes`."""

    def measure(self, recipe: str, axis: str) -> dict[str, float]:
        """{"value", "dense"} of "throughput" or "memory", measured."""

    def recall(self, key: str, value: int | None = None) -> int | None:
        """A number that hangs on the clock: logged when it is given, and what the log holds, None for nothing. A search
        that goes on from its log repeats it instead of the clock."""

    def upgrades(self, recipe: str, most: int) -> list[str]:
        """The recipe with calibrated weight methods of the same size in the place of an uncalibrated one."""

    def layers(self) -> int:
        """Decoder layers of the model."""

    def divergence(self, recipe: str, n: int) -> float:
        """How far the next token's distribution is from the dense model's on n questions, 0 when it is the same."""

    def naive(self, recipe: str) -> dict[str, str]:
        """{role: recipe} of the naive choices of the same size."""

    def pictures(self, recipe: str) -> list[Picture]:
        """A few samples with the tokens that stay."""

    def save(self, recipe: str, folder: Path) -> None:
        """Write the model with the recipe in it."""


@dataclass(frozen=True)
class Effort:
    """How much each stage of a search does."""

    strategy: str = "surrogate"
    "what picks the recipes to try: a name of STRATEGIES"
    recipes: int = 40
    "recipes that are tried on a few questions"
    explore: int = 40
    "those few questions"
    upgrades: int = 2
    "calibrated weight methods that are tried in the best recipe"
    shortlist: int = 10
    "recipes that go on to the first round"
    rungs: tuple[tuple[int, int], ...] = ((160, 5), (512, 2))
    "rounds: questions in all, recipes that go on"
    prove: int = 1600
    "held-back questions of the proof"
    timed: int = 1
    "finalists that are timed where no time is limited"
    timing: float = 60.0
    "seconds of timing after which no further finalist is timed"
    patience: float = 120.0
    "seconds of work after which no further recipe is tried, which the report then says"

    @property
    def choose(self) -> int:
        """Questions of the last round of the choice."""
        return self.rungs[-1][0]

    def answers(self) -> int:
        """Answers that are asked for in all, at most, dense included."""
        total, alive, before = (self.recipes + 1) * self.explore, self.shortlist, self.explore
        for n, survivors in self.rungs:
            total += (alive + 1) * max(0, n - before)
            alive, before = min(alive, survivors), n
        return total + 4 * self.prove

    def limited(self, n: int) -> Effort:
        """At most n questions in each stage; earlier rounds keep their share of the last."""
        rungs = tuple((max(1, min(count, round(n * count / self.choose))), k) for count, k in self.rungs)
        explore = max(1, min(self.explore, rungs[0][0]))
        return replace(self, explore=explore, rungs=rungs, prove=min(self.prove, n))

    def scaled(self, factor: float, least: int = 32) -> Effort:
        """All sample counts times `factor`, at least `least` each."""

        def count(n: int) -> int:
            return max(least, round(n * factor))

        rungs = tuple((count(n), k) for n, k in self.rungs)
        return replace(self, explore=count(self.explore), rungs=rungs, prove=count(self.prove))


@dataclass
class Outcome:
    """What a search found. `winner` is None when nothing meets the budget, or nothing was measured before Ctrl-C.

    trials: all that were run, and examples of those that were not. space: recipes in the space; weighed: those whose
    cost was counted; dropped_by: how many of them were never run, by the limit that stood in the way. cut: recipes that
    were tried when the time for exploring was over, None when it was enough.
    """

    budget: Budget
    dense: Cost
    trials: list[Trial]
    winner: Trial | None = None
    met: bool = False
    verdict: str = ""
    proof: Interval | None = None
    compare: list[dict[str, Any]] = field(default_factory=list)
    skills: dict[str, dict[str, Any]] = field(default_factory=dict)
    timing: list[dict[str, Any]] = field(default_factory=list)
    binding: list[str] = field(default_factory=list)
    nearest: list[Trial] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    space: int = 0
    weighed: int = 0
    dropped_by: dict[str, int] = field(default_factory=dict)
    cut: int | None = None
    right: float = 1.0
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def blind(self) -> bool:
        """Whether the dense model is right on no sample: then no loss can be seen, and nothing is proven."""
        return not (self.compare[0]["accuracy"] if self.compare else self.right)

    @property
    def kept(self) -> Trial | None:
        """The winner when it is worth saving: proved, or not disproved because there was no time or no sample to."""
        return self.winner if self.met or self.proof is None else None


Say = Callable[[str], None]


def search(
    bench: Workbench, budget: Budget, effort: Effort | None = None, *, seed: int = 0, say: Say = print
) -> Outcome:
    """The best recipe within the budget, and the proof. Ctrl-C ends the search early and keeps the best so far.

    say: receives one line at the start of each stage.
    """
    effort = effort or Effort()
    start = time.monotonic()
    dense = bench.cost("")
    absolute = [limit.axis for limit in budget.limits if limit.axis in MEASURED and not limit.relative]
    if absolute:  # what is predicted is the ratio to dense
        say("time of the dense model")
        dense = replace(dense, **bench.base(absolute))
    space, refused = bench.space()
    found = Outcome(budget, dense, [], refused=refused, space=space.size)
    context = Context(bench, space, budget, dense, seed, samples=min(effort.explore, len(bench.choose)))
    try:
        _choose(bench, found, context, effort, seed, say)
        if found.winner:
            _prove(bench, found, found.winner, effort, seed, say)
    except KeyboardInterrupt:
        found.interrupted = True
        if found.winner is None:
            found.winner = choose(found.trials, budget, found.dense)
        say("interrupted: keeping the best so far")
    found.trials += context.dropped
    found.weighed, found.dropped_by = context.weighed, context.dropped_by
    if found.winner:
        found.winner.status = "chosen"
        found.winner.reason = ""
    else:
        found.binding = binding(found.trials, budget, found.dense)
        found.nearest = nearest(found.trials, budget, found.dense)
    for trial in found.trials:
        if trial.status == "alive":
            explain(trial, found)
    within = found.winner and found.proof and found.proof.mean >= -budget.max_loss - 1e-9 and not fallen(found)
    found.met = bool(within and not found.blind)
    found.verdict = verdict(found)
    if found.cut is not None:
        found.verdict += (
            f" Exploring was cut short: {found.cut} of {effort.recipes} recipes were tried in {effort.patience:g} s, "
            "so a faster machine may find another recipe."
        )
    found.seconds = time.monotonic() - start
    return found


def explore(bench: Workbench, found: Outcome, context: Context, effort: Effort, seed: int, say: Say) -> list[Trial]:
    """Try up to `effort.recipes` recipes of the strategy on a few questions; those worth more questions, best first.

    The order is that of the surrogate's belief, which pools what resembling recipes showed: a few questions alone would
    rank by chance.
    """
    n, groups, skills = context.samples, bench.choose.tasks, bench.choose.skills
    strategy = STRATEGIES.get(effort.strategy)(context)
    bench.stage(f"explore ({effort.strategy})", n * (effort.recipes + 1))
    start, cut = _clocks(), bench.recall("explored")
    dense = bench.scores("", "choose", n)
    found.right = float(dense.mean())
    if not dense.any():
        say(f"the dense model is right on none of the first {n} questions: no loss can be seen on them")

    def attempt(recipe: str) -> None:
        trial = context.trial(recipe)
        found.trials.append(trial)
        trial.scores = bench.scores(recipe, "choose", n)
        trial.delta = paired_interval(dense, trial.scores, groups[:n], seed=seed)
        if found.budget.max_skill_loss is not None:
            trial.skills = by_skill(dense, trial.scores, skills[:n], seed=seed)

    while len(found.trials) < effort.recipes:
        batch = strategy.ask(found.trials)[: effort.recipes - len(found.trials)]
        if not found.trials:
            reachable = any(not found.budget.broken(context.cost(r), found.dense) for r in batch)
            never = sum(context.dropped_by.values())
            say(f"{context.space.size} recipes in the space, {context.weighed} weighed, {never} of them break a limit")
            if not reachable and batch:
                say("none meets the budget, so the nearest are measured")
        if not batch:
            break
        tried = len(found.trials)
        if tried and (tried >= cut if cut else worked(start) > effort.patience):
            found.cut = bench.recall("explored", tried) or tried
            say(f"{effort.patience:g} s of exploring are over: {tried} recipes were tried")
            break
        bench.expect(batch)
        for recipe in batch:
            attempt(recipe)
    best = shortlist(list(found.trials), context, 1, final=False)
    known = {trial.recipe for trial in found.trials}
    for recipe in bench.upgrades(best[0].recipe, effort.upgrades) if best and effort.upgrades else ():
        if recipe not in known and context.fits(recipe):
            say(f"calibrating {recipe}")
            attempt(recipe)
    return shortlist(found.trials, context, effort.shortlist)


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def worked(start: tuple[float, float]) -> float:
    """Seconds since `start` without those in which other processes had the machine."""
    return min(now - then for now, then in zip(_clocks(), start))


def shortlist(trials: Sequence[Trial], context: Context, count: int, *, final: bool = True) -> list[Trial]:
    """The `count` trials that are believed to lose least, cheaper ones first among equals; the others are rejected,
    unless this is not the `final` word."""
    run = [trial for trial in trials if trial.delta]
    if not run:
        return []
    loss, _ = context.surrogate(run, [trial.recipe for trial in run]).predict([trial.recipe for trial in run])
    order = sorted(range(len(run)), key=lambda i: (round(float(loss[i]), 4), context.relative(run[i].recipe), i))
    kept: list[Trial] = []
    for place, index in enumerate(order):
        trial = run[index]
        assert trial.delta is not None
        if not final and len(kept) >= count:
            continue
        if kept and trial.delta.high < -context.budget.max_loss:
            trial.reason = f"loses {loss_text(trial.delta)} on {trial.delta.n} samples"
        elif len(kept) >= count:
            trial.reason = f"{place} recipes rank before it on {trial.delta.n} samples ({trial.delta.text()})"
        else:
            kept.append(trial)
            continue
        trial.status = "rejected"
    return kept


def _choose(bench: Workbench, found: Outcome, context: Context, effort: Effort, seed: int, say: Say) -> None:
    alive = explore(bench, found, context, effort, seed, say)
    groups, skills = bench.choose.tasks, bench.choose.skills
    rungs = tuple((min(n, len(groups)), k) for n, k in effort.rungs)
    bench.expect([trial.recipe for trial in alive])
    survivors = halve(
        alive,
        lambda recipe, n: bench.scores(recipe, "choose", n),
        found.budget,
        found.dense,
        rungs,
        groups=groups,
        skills=skills,
        seed=seed,
        on_round=bench.stage,
    )
    timed = [axis for axis in found.budget.axes if axis in (*MEASURED, "memory")]
    # Without such a limit a recipe that meets the others is timed for the report only; if there is none, nothing is.
    first = choose(survivors, found.budget, found.dense)
    finalists = [first, *(t for t in survivors if t is not first)] if first else []
    start = _clocks()
    for trial in finalists[: None if timed else effort.timed]:
        reason = ""
        if worked(start) > effort.timing:
            reason = f"not timed: timing others took {effort.timing:g} s"
        else:
            try:
                _measure(bench, found, trial, timed, say)
            except (RecipeError, UnsupportedError) as error:
                reason = f"cannot be timed: {error}"
        if reason:
            say(f"{trial.recipe}: {reason}")
        if reason and timed:  # what a limit asks for is not known
            trial.status, trial.reason = "rejected", reason
            survivors.remove(trial)
    found.winner = choose(survivors, found.budget, found.dense)


def _measure(bench: Workbench, found: Outcome, trial: Trial, limited: Sequence[str], say: Say) -> None:
    """Measured cost in the place of predicted cost. One dense value for all: what is known of a time is the ratio
    within its pairs, dense itself drifts with the machine."""
    say(f"time of {trial.recipe} beside dense")
    row = bench.time(trial.recipe)
    found.timing.append({"recipe": trial.recipe, **row})
    changes, base = {}, {}
    for key, part in (("ttft_ms", row), ("tpot_ms", row.get("tpot"))):
        if part:
            base[key] = getattr(found.dense, key) or part["dense_ms"]
            changes[key] = base[key] * part["ratio"]
    for axis in limited:
        if axis in ("throughput", "memory"):
            measured = bench.measure(trial.recipe, axis)
            base[axis] = measured["dense"]
            changes[axis] = measured["value"]
    found.dense = replace(found.dense, **base)
    trial.cost = replace(trial.cost, **changes)


def _prove(bench: Workbench, found: Outcome, winner: Trial, effort: Effort, seed: int, say: Say) -> None:
    n = min(effort.prove, len(bench.prove))
    roles = {"chosen": winner.recipe, **bench.naive(winner.recipe)}
    say(f"proof on {n} held-back samples: {winner.recipe}")
    if not n:
        return
    groups, skills = bench.prove.tasks[:n], bench.prove.skills[:n]
    bench.stage("proof", n * (1 + len(roles)))
    bench.expect(list(roles.values()))
    dense = bench.scores("", "prove", n)
    found.compare.append(_row("dense", "", found.dense, dense, dense, groups, seed))
    for role, recipe in roles.items():
        scores = bench.scores(recipe, "prove", n)
        cost = winner.cost if role == "chosen" else bench.cost(recipe)
        found.compare.append(_row(role, recipe, cost, dense, scores, groups, seed))
        if role == "chosen":
            found.proof = paired_interval(dense, scores, groups, seed=seed, resamples=10_000)
            found.skills = skill_table(dense, scores, skills, found.budget.max_loss, seed=seed)


def _row(
    role: str, recipe: str, cost: Cost, dense: np.ndarray, scores: np.ndarray, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    delta = paired_interval(dense, scores, groups, seed=seed, resamples=10_000)
    accuracy = [float(scores[np.asarray(groups) == name].mean()) for name in dict.fromkeys(groups)]
    return {
        "role": role,
        "recipe": recipe,
        "accuracy": sum(accuracy) / len(accuracy),
        **cost_dict(cost),
        **(delta.to_dict() if role != "dense" else {"mean_delta": 0.0, "low": 0.0, "high": 0.0, "n": len(scores)}),
    }


def cost_dict(cost: Cost) -> dict[str, float | None]:
    """All axes for JSON."""
    names = ("flops", "bytes", "tokens", "ttft_ms", "tpot_ms", "throughput", "size", "memory", "nonzeros")
    return {name: getattr(cost, name) for name in names}


def skill_table(
    dense: np.ndarray, scores: np.ndarray, groups: Sequence[str], max_loss: float, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Each skill by itself: accuracies, paired difference with interval, and a warning ("" when there is none).

    A warning: the whole interval lies below zero, or the loss is more than allowed and could be twice as large still.
    """
    table = {}
    names = np.asarray(groups)
    for name in dict.fromkeys(groups):
        mine = names == name
        delta = paired_interval(dense[mine], scores[mine], seed=seed)
        warning = ""
        if delta.high < 0:
            warning = f"falls by {points(-delta.mean)}"
        elif delta.mean < -max_loss and delta.low < 2 * delta.mean:
            warning = f"may fall: {points(-delta.mean)}, not beyond noise"
        table[name] = {
            "n": delta.n,
            "dense": float(dense[mine].mean()),
            "accuracy": float(scores[mine].mean()),
            "delta": delta.mean,
            "low": delta.low,
            "high": delta.high,
            "warning": warning,
        }
    return table
