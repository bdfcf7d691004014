"""The search from budget to verdict: prune by cost, halve by paired scores, time the finalists, choose, prove.

Everything that needs a model is behind `Workbench`, so the whole flow is tested on known truth without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from foveate.optimize.budget import AXES, Budget, Cost, amount, points
from foveate.optimize.search import Interval, Trial, binding, choose, halve, loss_text, nearest, paired_interval, prune

if TYPE_CHECKING:
    from pathlib import Path

    from foveate.optimize.report import Picture
    from foveate.optimize.samples import Split


class Workbench(Protocol):
    """What the search needs to know about a model and data. A recipe is its text; "" is the dense model."""

    name: str
    data: str
    choose: Split
    prove: Split

    def trials(self) -> tuple[list[Trial], dict[str, str]]:
        """(every candidate with its predicted cost, {method that does not fit: reason})."""

    def cost(self, recipe: str) -> Cost:
        """The exact cost of the mean request."""

    def scores(self, recipe: str, split: str, n: int) -> np.ndarray:
        """Scores [n] of the first n questions of "choose" or "prove"; what was asked before is not asked again."""

    def stage(self, title: str, questions: int) -> None:
        """Progress of the next answers."""

    def time(self, recipe: str) -> dict[str, Any]:
        """Time to first token of the recipe against dense: {"ms", "dense_ms", "ratio", "low", "high", "pairs", ...}."""

    def naive(self, recipe: str) -> dict[str, str]:
        """{role: recipe} of the naive choices of the same size."""

    def pictures(self, recipe: str) -> list[Picture]:
        """A few samples with the tokens that stay."""

    def save(self, recipe: str, folder: Path) -> None:
        """Write the model with the recipe in it."""


@dataclass(frozen=True)
class Effort:
    """How many questions each stage asks. rungs: (questions in all, recipes that go on); timed: finalists timed."""

    rungs: tuple[tuple[int, int], ...] = ((256, 8), (1024, 3))
    prove: int = 1600
    timed: int = 2

    @property
    def choose(self) -> int:
        """Questions of the last round of the choice."""
        return self.rungs[-1][0]

    def answers(self, recipes: int = 24) -> int:
        """Answers that are asked for in all, about: `recipes` in the first round, dense included, and four proved."""
        total, alive, before = 0, recipes, 0
        for n, survivors in self.rungs:
            total += (alive + 1) * (n - before)
            alive, before = min(alive, survivors), n
        return total + 4 * self.prove

    def limited(self, n: int) -> Effort:
        """At most n questions in each stage; earlier rounds keep their share of the last."""
        rungs = tuple((max(1, min(count, round(n * count / self.choose))), k) for count, k in self.rungs)
        return replace(self, rungs=rungs, prove=min(self.prove, n))

    def scaled(self, factor: float, least: int = 32) -> Effort:
        """All sample counts times `factor`, at least `least` each."""

        def count(n: int) -> int:
            return max(least, round(n * factor))

        return replace(self, rungs=tuple((count(n), k) for n, k in self.rungs), prove=count(self.prove))


@dataclass
class Outcome:
    """What a search found. `winner` is None when nothing meets the budget, or nothing was measured before Ctrl-C."""

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
    interrupted: bool = False
    seconds: float = 0.0

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
    trials, refused = bench.trials()
    found = Outcome(budget, dense, trials, refused=refused)
    try:
        _choose(bench, found, effort, seed, say)
        if found.winner:
            _prove(bench, found, found.winner, effort, seed, say)
    except KeyboardInterrupt:
        found.interrupted = True
        if found.winner is None:
            found.winner = choose(trials, budget, dense)
        say("interrupted: keeping the best so far")
    if found.winner:
        found.winner.status = "chosen"
        found.winner.reason = ""
    else:
        found.binding = binding(trials, budget, found.dense)
        found.nearest = nearest(trials, budget, found.dense)
    for trial in trials:
        if trial.status == "alive":
            _explain(trial, found)
    found.met = bool(found.winner and found.proof and found.proof.mean >= -budget.max_loss - 1e-9)
    found.verdict = verdict(found)
    if found.compare and not found.compare[0]["accuracy"]:
        found.verdict += " The dense model is right on no sample, so no loss could be seen."
    found.seconds = time.monotonic() - start
    return found


def _choose(bench: Workbench, found: Outcome, effort: Effort, seed: int, say: Say) -> None:
    alive = prune(found.trials, found.budget, found.dense)
    reachable = not any(found.budget.broken(t.cost, found.dense) for t in alive)
    say(
        f"{len(found.trials)} recipes; {len(alive)} worth running after exact costs"
        + ("" if reachable else "; none meets the budget, so the nearest are measured")
    )
    groups = bench.choose.tasks
    rungs = tuple((min(n, len(groups)), k) for n, k in effort.rungs)
    survivors = halve(
        alive,
        lambda recipe, n: bench.scores(recipe, "choose", n),
        found.budget,
        found.dense,
        rungs,
        groups=groups,
        seed=seed,
        on_round=bench.stage,
    )
    limited = any(limit.axis == "ttft" for limit in found.budget.limits)
    # Without a time limit a recipe that meets the others is timed for the report only; if there is none, nothing is.
    first = choose(survivors, found.budget, found.dense)
    timed = [first, *(t for t in survivors if t is not first)] if first else []
    for trial in timed[: None if limited else effort.timed]:
        say(f"time of {trial.recipe} beside dense")
        row = bench.time(trial.recipe)
        found.timing.append({"recipe": trial.recipe, **row})
        # One dense time for all: the ratio of each pair run is what is known, dense itself drifts with the machine.
        base = found.dense.ttft_ms or row["dense_ms"]
        found.dense = replace(found.dense, ttft_ms=base)
        trial.cost = replace(trial.cost, ttft_ms=base * row["ratio"])
    found.winner = choose(survivors, found.budget, found.dense)


def _prove(bench: Workbench, found: Outcome, winner: Trial, effort: Effort, seed: int, say: Say) -> None:
    n = min(effort.prove, len(bench.prove))
    roles = {"chosen": winner.recipe, **bench.naive(winner.recipe)}
    say(f"proof on {n} held-back samples: {winner.recipe}")
    if not n:
        return
    groups, skills = bench.prove.tasks[:n], bench.prove.skills[:n]
    bench.stage("proof", n * (1 + len(roles)))
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
    delta = paired_interval(dense, scores, groups, seed=seed)
    accuracy = [float(scores[np.asarray(groups) == name].mean()) for name in dict.fromkeys(groups)]
    return {
        "role": role,
        "recipe": recipe,
        "accuracy": sum(accuracy) / len(accuracy),
        **cost_dict(cost),
        **(delta.to_dict() if role != "dense" else {"mean_delta": 0.0, "low": 0.0, "high": 0.0, "n": len(scores)}),
    }


def cost_dict(cost: Cost) -> dict[str, float | None]:
    """The four axes for JSON."""
    return {"flops": cost.flops, "bytes": cost.bytes, "tokens": cost.tokens, "ttft_ms": cost.ttft_ms}


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


def _explain(trial: Trial, found: Outcome) -> None:
    """The reason why a trial that was never dropped was not chosen."""
    if trial.delta is None:
        trial.status, trial.reason = "pruned", "not run: the search was interrupted"
        return
    trial.status = "rejected"
    broken = found.budget.broken(trial.cost, found.dense)
    if broken:
        ratio = found.budget.overruns(trial.cost, found.dense)[broken[0]]
        trial.reason = f"{broken[0]} {ratio:.2f} times the limit ({trial.delta.text()} against dense)"
    elif trial.delta.mean < -found.budget.max_loss:
        trial.reason = f"loses {points(-trial.delta.mean)} on {trial.delta.n} samples, more than allowed"
    else:
        trial.reason = f"meets the budget ({trial.delta.text()}); the chosen one is cheaper or better"


def verdict(found: Outcome) -> str:
    """One sentence: what was found, and how sure it is."""
    allowed = points(found.budget.max_loss)
    if found.winner is None:
        if found.interrupted:
            return "Interrupted before any recipe met the budget; the model was not changed."
        return f"No recipe meets the budget. {hindrance(found)} The model was not changed."
    if found.proof is None:
        why = "the search was interrupted before the proof" if found.interrupted else "there is no held-back sample"
        return f"Best so far, not proven: {why}."
    shown = f"{found.proof.text()} against dense on {found.proof.n} held-back samples"
    if found.met and found.interrupted:
        return f"Budget met: {shown}; interrupted before the naive choices were compared."
    if found.proof.low >= -found.budget.max_loss:
        return f"Budget met and proven: {shown}; even the lower end loses at most {allowed}."
    if found.met:
        return f"Budget met: {shown}. The loss is within {allowed}, but the interval reaches further."
    noise = "beyond noise" if found.proof.high < -found.budget.max_loss else "though not beyond noise"
    return f"Not met: {shown}, more than the {allowed} allowed, {noise}."


def hindrance(found: Outcome) -> str:
    """What stands in the way, with the nearest value that was seen."""
    said = []
    for name in found.binding:
        if name == "loss":
            within = [t for t in found.trials if t.delta and not found.budget.broken(t.cost, found.dense)]
            best = max(within, key=lambda t: t.delta.mean if t.delta else -1.0, default=None)
            if best and best.delta:
                said.append(f"Loss: within the other limits the best recipe loses {loss_text(best.delta)}.")
            continue
        values = [value for t in found.trials if (value := t.cost.get(name)) is not None]
        lowest, base = min(values), found.dense.get(name)
        shown = f"{lowest / base:.2f}x of dense" if base else amount(name, lowest)
        seen = "that was measured" if name == "ttft" else "of all recipes"
        said.append(f"{AXES[name][0].upper()}{AXES[name][1:]}: the lowest {seen} is {shown}.")
    return " ".join(said) or "Each limit can be met, but not all of them together."
