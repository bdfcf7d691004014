"""The search, as pure functions of costs and scores: it runs no model, so it can be tested on known truth.

Successive halving: many recipes see few samples, those that cannot win any more are dropped with the reason, the rest
see more. Each recipe is compared with the dense model on the *same* samples (paired bootstrap), because the difference
has far less noise than two accuracies (MEASURE.md, part 6). Source of the halving: Jamieson & Talwalkar, arXiv
1502.07943.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from foveate.optimize.budget import FLOORS, Budget, Cost, points
from foveate.tasks.stats import paired_bootstrap

Z = 1.959964
"""Standard deviations of a 95 % interval."""

ScoreFn = Callable[[str, int], np.ndarray]
"""(recipe, n) -> float scores in [0, 1] of the first n samples, shape [n]; the recipe "" is the dense model."""


@dataclass(frozen=True)
class Interval:
    """Mean of a paired difference with its 95 % interval, as fractions; `n` samples, standard error `error`."""

    mean: float
    low: float
    high: float
    n: int
    error: float = 0.0

    def text(self) -> str:
        """For people: `-1.2 pt [-2.0, -0.4]`."""
        return f"{points(self.mean, True)} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def to_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return {"mean_delta": self.mean, "low": self.low, "high": self.high, "n": self.n}


@dataclass
class Trial:
    """One recipe: what it costs, what it scored so far, and what became of it.

    status: "alive", "pruned" (by predicted cost, never run), "rejected" (after running) or "chosen". group: recipes
    that differ only in how many tokens stay share it. keep: the kept fraction, None where all tokens stay.
    """

    recipe: str
    cost: Cost
    group: str = ""
    keep: float | None = None
    status: str = "alive"
    reason: str = ""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    delta: Interval | None = None
    skills: dict[str, Interval] = field(default_factory=dict)
    """Differences of single skills, where a limit on them was given."""


def paired_interval(
    dense: np.ndarray, other: np.ndarray, groups: Sequence[str] | None = None, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Mean of `other - dense` (scores [n] of the same samples) with a 95 % paired bootstrap interval.

    groups: the task of each sample; the mean is then over tasks. A bootstrap of samples that all agree would claim
    certainty, so the interval reaches at least as far as Tango's for paired proportions without disagreement:
    z^2 / (n + z^2) to both sides when nothing differs, its standard error otherwise (Tango, 1998, Statistics in
    Medicine).
    """
    dense, other = np.asarray(dense, float), np.asarray(other, float)
    n = len(dense)
    if n == 0:
        return Interval(0.0, -1.0, 1.0, 0, 1.0)
    labels = np.asarray(["all"] * n if groups is None else list(groups))
    found = paired_bootstrap(other, dense, groups=labels, resamples=resamples, seed=seed)
    names = np.unique(labels)
    spread = [(other - dense)[labels == name] for name in names]
    error = sum(d.var(ddof=1) / len(d) if len(d) > 1 else 1.0 for d in spread) ** 0.5 / len(names)
    reach = Z**2 / (n + Z**2)
    error = float(max(error, reach / Z))
    if not (other != dense).any():
        return Interval(0.0, -reach, reach, n, error)
    low, high = min(found.low, found.value - reach / Z), max(found.high, found.value + reach / Z)
    return Interval(found.value, max(-1.0, low), min(1.0, high), n, error)


def front(costs: Sequence[Sequence[float]], quality: Sequence[float]) -> list[int]:
    """Indices of the Pareto front, cheapest first: no other point costs no more on every axis and is as good, or
    better.

    costs: one row of costs per point. Of points equal in everything the first stays.
    """
    rows = [(*map(float, row), -float(q)) for row, q in zip(costs, quality, strict=True)]

    def dominated(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(rows[j], rows[i])) and (rows[j] != rows[i] or j < i)
            for j in range(len(rows))
            if j != i
        )

    return sorted((i for i in range(len(rows)) if not dominated(i)), key=lambda i: rows[i])


def prune(trials: list[Trial], budget: Budget, dense: Cost, *, per_group: int = 2, nearest: int = 6) -> list[Trial]:
    """The trials worth running; the others get the status "pruned" and the reason.

    Dropped: what breaks a limit by its predicted cost (exact, so nothing is lost), and, of recipes that differ only in
    how many tokens stay, all but the `per_group` that keep most within the budget (fewer tokens of the same selection
    are not expected to be better). If nothing meets the limits, the `nearest` ones stay, to show what is nearly
    possible.
    """
    fitting = [trial for trial in trials if not pruned(trial, budget, dense)]
    if not fitting:
        return closest(trials, budget, dense, nearest)
    chosen = []
    for name in dict.fromkeys(trial.group for trial in fitting):
        members = sorted((t for t in fitting if t.group == name), key=lambda t: -(1.0 if t.keep is None else t.keep))
        picked = spread(members, per_group)
        chosen += picked
        for trial in members:
            if trial not in picked:
                trial.status = "pruned"
                trial.reason = f"'{picked[0].recipe}' keeps more tokens and meets the budget too"
    return chosen


def pruned(trial: Trial, budget: Budget, dense: Cost) -> bool:
    """Whether a counted cost breaks a limit; the trial then gets the status "pruned" and the reason."""
    overruns = budget.overruns(trial.cost, dense)
    worst = max(overruns, key=overruns.__getitem__, default=None)
    if worst is None or overruns[worst] <= 1 + 1e-9:
        return False
    trial.status, trial.reason = "pruned", f"{worst} {overruns[worst]:.2f} times the limit"
    return True


def improbable(trial: Trial, budget: Budget, dense: Cost) -> bool:
    """Whether an estimate makes a limit on time improbable; the trial then gets the status "pruned" and the reason."""
    found = budget.unlikely(trial.cost, dense)
    worst = max(found, key=found.__getitem__, default=None)
    if worst is None:
        return False
    shown = 1 / found[worst] if worst in FLOORS else found[worst]
    trial.status, trial.reason = "pruned", f"{worst} {shown:.2f}x of dense by estimate"
    return True


def closest(trials: list[Trial], budget: Budget, dense: Cost, count: int) -> list[Trial]:
    """Trials near a budget that none meets: one half the cheapest, one half the mildest that break fewest limits."""

    def overrun(trial: Trial) -> float:
        return max(budget.overruns(trial.cost, dense).values(), default=0.0)

    def mildness(trial: Trial) -> tuple[int, float, float, str]:
        kept = 1.0 if trial.keep is None else trial.keep
        return len(budget.broken(trial.cost, dense)), -kept, overrun(trial), trial.recipe

    found: dict[int, Trial] = {}
    for key, most in ((lambda t: (overrun(t), t.recipe), -(-count // 2)), (mildness, count)):
        groups = {trial.group for trial in found.values()}
        for trial in sorted(trials, key=key):
            if len(found) < most and trial.group not in groups:
                groups.add(trial.group)
                found[id(trial)] = trial
    for trial in found.values():
        trial.status, trial.reason = "alive", ""
    return list(found.values())


def spread(members: list[Trial], count: int) -> list[Trial]:
    """The first member and others that each keep at most 3/4 of the one before: neighbours teach little."""
    picked: list[Trial] = []
    for trial in members:
        if len(picked) < count and (not picked or (trial.keep or 1.0) <= 0.75 * (picked[-1].keep or 1.0)):
            picked.append(trial)
    return picked


def halve(
    trials: list[Trial],
    score: ScoreFn,
    budget: Budget,
    dense_cost: Cost,
    rungs: Sequence[tuple[int, int]],
    *,
    groups: Sequence[str] | None = None,
    skills: Sequence[str] | None = None,
    seed: int = 0,
    on_round: Callable[[str, int], None] | None = None,
) -> list[Trial]:
    """The survivors of successive halving, best first.

    rungs: (samples in all, recipes that go on) per round, samples growing. score is asked for the recipe "" too: the
    dense model. groups: the task of each sample. After each round a trial is rejected when its whole interval lies
    below the allowed loss, or when enough others are better. At least one trial survives, so that the nearest point is
    known. An exception or Ctrl-C in `score` leaves all results so far in the trials.
    """
    alive = list(trials)
    before = 0
    for place, (samples, survivors) in enumerate(rungs, 1):
        if on_round:
            on_round(f"round {place} of {len(rungs)}", (len(alive) + 1) * (samples - before))
        before = samples
        dense = score("", samples)
        for trial in alive:
            trial.scores = score(trial.recipe, samples)
            n = len(trial.scores)
            trial.delta = paired_interval(dense[:n], trial.scores, groups[:n] if groups else None, seed=seed)
            if skills is not None and budget.max_skill_loss is not None:
                trial.skills = by_skill(dense[:n], trial.scores, skills[:n], seed=seed)
        alive.sort(key=lambda t: rank(t, budget, dense_cost))
        kept = []
        for better, trial in enumerate(alive):
            assert trial.delta is not None
            fallen = fallen_skill(trial, budget)
            if kept and trial.delta.high < -budget.max_loss:
                trial.reason = f"loses {loss_text(trial.delta)} on {samples} samples"
            elif kept and fallen:
                trial.reason = f"loses {loss_text(trial.skills[fallen])} of the skill {fallen} on {samples} samples"
            elif len(kept) >= survivors:
                trial.reason = f"{better} recipes rank before it on {samples} samples ({trial.delta.text()})"
            else:
                kept.append(trial)
                continue
            trial.status = "rejected"
        alive = kept
    return alive


def by_skill(
    dense: np.ndarray, scores: np.ndarray, skills: Sequence[str], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """The paired difference of each skill by itself."""
    names = np.asarray(skills)
    return {
        name: paired_interval(dense[names == name], scores[names == name], seed=seed, resamples=resamples)
        for name in dict.fromkeys(skills)
    }


def fallen_skill(trial: Trial, budget: Budget) -> str:
    """The skill that loses most beyond the allowed loss of a skill and beyond noise (its interval lies below zero), ""
    when there is none. A few samples of each of many skills would else reject everything by chance."""
    if budget.max_skill_loss is None:
        return ""
    fallen = [n for n, d in trial.skills.items() if d.mean < -budget.max_skill_loss - 1e-9 and d.high < 0]
    return min(fallen, key=lambda name: trial.skills[name].mean, default="")


def loss_text(delta: Interval) -> str:
    """A loss in words, positive when accuracy fell: `6.1 pt [4.2, 8.0]`."""
    return f"{points(-delta.mean)} [{-100 * delta.high:.1f}, {-100 * delta.low:.1f}]"


def rank(trial: Trial, budget: Budget, dense: Cost) -> tuple[float, float, bool, str]:
    """Sort key: quality first, then cost; among equals the baseline `random` last, then the text (stable results)."""
    quality = trial.delta.mean if trial.delta else -1.0
    return (-quality, budget.relative_cost(trial.cost, dense), "random(" in trial.recipe, trial.recipe)


def choose(trials: list[Trial], budget: Budget, dense: Cost) -> Trial | None:
    """The winner: of the trials that meet every limit, the cheapest within one standard error of the best; None if
    none.

    Trials of the largest sample count compete; a trial that saw fewer samples was dropped for a reason.
    Source of the one-standard-error rule: Breiman et al., Classification and Regression Trees, 1984.
    """
    met = [
        t
        for t in trials
        if t.delta
        and t.delta.mean >= -budget.max_loss - 1e-9
        and not fallen_skill(t, budget)
        and not budget.broken(t.cost, dense)
    ]
    if not met:
        return None
    most = max(t.delta.n for t in met if t.delta)
    met = [t for t in met if t.delta and t.delta.n == most]
    best = min(met, key=lambda t: rank(t, budget, dense))
    assert best.delta is not None
    bar = best.delta.mean - best.delta.error
    near = [t for t in met if t.delta and t.delta.mean >= bar]
    return min(near, key=lambda t: (budget.relative_cost(t.cost, dense), rank(t, budget, dense)))


def binding(trials: list[Trial], budget: Budget, dense: Cost) -> list[str]:
    """Which constraints stand in the way when nothing meets all: axes of `AXES`, "loss" or "skill".

    A constraint binds when giving up it alone would let some trial through; if no single one does, all those that the
    nearest trial breaks. Trials that were never run count for the cost limits only, those that lost before they were
    timed not at all when a time is limited.
    """
    trials = [t for t in trials if all(t.cost.get(axis) is not None for axis in budget.axes)] or trials
    broken = [set(budget.broken(t.cost, dense)) for t in trials]
    for trial, constraints in zip(trials, broken):
        if trial.delta and trial.delta.mean < -budget.max_loss:
            constraints.add("loss")
        if fallen_skill(trial, budget):
            constraints.add("skill")
    if not broken or any(not b and t.delta for b, t in zip(broken, trials)):
        return []
    known = [b for b, t in zip(broken, trials) if t.delta or b]
    alone = {next(iter(b)) for b in known if len(b) == 1}
    return sorted(alone or min(known, key=len, default=set()))


def nearest(trials: list[Trial], budget: Budget, dense: Cost, count: int = 3) -> list[Trial]:
    """The trials that were run and miss least: the best within the cost limits, then the cheapest within the loss."""
    run = [t for t in trials if t.delta]

    def overrun(trial: Trial) -> float:
        return max([1.0, *budget.overruns(trial.cost, dense).values()])

    within_cost = sorted((t for t in run if overrun(t) <= 1), key=lambda t: rank(t, budget, dense))
    within_loss = sorted((t for t in run if t.delta and t.delta.mean >= -budget.max_loss), key=overrun)
    rest = sorted(run, key=lambda t: (overrun(t), *rank(t, budget, dense)))
    ordered = within_cost[:1] + within_loss[:1] + within_cost[1:] + within_loss[1:] + rest
    return list({id(t): t for t in ordered}.values())[:count]
