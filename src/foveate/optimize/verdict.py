"""What is said about a search at its end: the verdict, what stands in the way, why a recipe was not chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.optimize.budget import AXES, FLOORS, MEASURED, amount, points
from foveate.optimize.search import Trial, fallen_skill, loss_text

if TYPE_CHECKING:
    from foveate.optimize.run import Outcome

BLIND = "so no loss could be seen. Look at the answers in the data, and at --scorer."
STAGES = {
    "flops": {"tower": "vision tower", "connector": "connector", "prefill": "prefill", "decode": "decoding"},
    "bytes": {"weights": "weights", "cache": "cache"},
}
"""Parts of a cost that may be what no recipe reaches, in words."""


def fallen(found: Outcome) -> str:
    """The skill whose proven loss is beyond the allowed one and beyond noise, or ""."""
    limit = found.budget.max_skill_loss
    if limit is None:
        return ""
    names = [name for name, row in found.skills.items() if row["delta"] < -limit - 1e-9 and row["high"] < 0]
    return min(names, key=lambda name: found.skills[name]["delta"], default="")


def explain(trial: Trial, found: Outcome) -> None:
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
    elif skill := fallen_skill(trial, found.budget):
        trial.reason = f"loses {points(-trial.skills[skill].mean)} of the skill {skill}, more than allowed"
    else:
        trial.reason = f"meets the budget ({trial.delta.text()}); the chosen one is cheaper or better"


def verdict(found: Outcome) -> str:
    """One sentence: what was found, and how sure it is."""
    allowed = points(found.budget.max_loss)
    if found.winner is None:
        if found.interrupted:
            return "Interrupted before any recipe met the budget; the model was not changed."
        blind = f" The dense model is right on no sample, {BLIND}" if found.blind else ""
        return f"No recipe meets the budget. {hindrance(found)}{rest(found)} The model was not changed.{blind}"
    if found.proof is None:
        why = "the search was interrupted before the proof" if found.interrupted else "there is no held-back sample"
        blind = f" The dense model is right on no sample, {BLIND}" if found.blind else ""
        return f"Best so far, not proven: {why}.{blind}"
    shown = f"{found.proof.text()} against dense on {found.proof.n} held-back samples"
    if skill := fallen(found):
        return f"Not met: {shown}, but the skill {skill} loses {points(-found.skills[skill]['delta'])}."
    if found.blind:
        return f"Nothing is proven: the dense model is right on no sample of {found.proof.n}, {BLIND}"
    noise = _unsure_times(found)
    if found.met and found.interrupted:
        return f"Budget met: {shown}; interrupted before the naive choices were compared.{noise}"
    if found.met and found.proof.low >= -found.budget.max_loss:
        proven = "" if noise else " and proven"
        return f"Budget met{proven}: {shown}; even the lower end loses at most {allowed}.{noise}"
    if found.met:
        return f"Budget met: {shown}. The loss is within {allowed}, but the interval reaches further.{noise}"
    noise = "beyond noise" if found.proof.high < -found.budget.max_loss else "though not beyond noise"
    return f"Not met: {shown}, more than the {allowed} allowed, {noise}."


def _unsure_times(found: Outcome) -> str:
    """What makes a limit on time less than certain: an interval that reaches beyond it, a busy machine."""
    assert found.winner is not None
    row = next((row for row in found.timing if row["recipe"] == found.winner.recipe), None)
    said = ""
    for limit in found.budget.limits if row else ():
        part = {"ttft": row, "tpot": row.get("tpot")}.get(limit.axis)  # type: ignore[union-attr]
        bound, base = limit.bound(found.dense), found.dense.get(limit.axis)
        if part and bound and base and part["high"] > bound / base + 1e-9:
            shown = f"{part['ratio']:.2f}x [{part['low']:.2f}, {part['high']:.2f}]"
            said += f" The {AXES[limit.axis]}, {shown} of dense in {row['pairs']} pairs, may lie beyond its limit."  # type: ignore[index]
        if part and row.get("noisy") and "busy" not in said:  # type: ignore[union-attr]
            said += " The machine was busy while times were taken: take them again on a quiet one."
    return said


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
        if name == "skill":
            limit = points(found.budget.max_skill_loss or 0.0)
            said.append(f"Skills: in every recipe that meets the rest some skill loses more than {limit}.")
            continue
        values = [value for t in found.trials if (value := t.cost.get(name)) is not None]
        extreme, word = (max(values), "highest") if name in FLOORS else (min(values), "lowest")
        base = found.dense.get(name)
        shown = f"{extreme / base:.2f}x of dense" if base else amount(name, extreme)
        seen = "that was measured" if name in MEASURED else "of all recipes weighed"
        said.append(f"{AXES[name][0].upper()}{AXES[name][1:]}: the {word} {seen} is {shown}{_stuck(name, found)}.")
    return " ".join(said) or "Each limit can be met, but not all of them together."


def _stuck(axis: str, found: Outcome) -> str:
    """The parts of a cost that the recipe which is cheapest on this axis leaves as they are, when they matter."""
    dense, parts = found.dense.parts, STAGES.get(axis, {})
    lowest = min((t for t in found.trials if t.cost.parts), key=lambda t: t.cost.get(axis) or 0.0, default=None)
    whole = found.dense.get(axis)
    if lowest is None or not whole:
        return ""
    same = {words: dense[part] for part, words in parts.items() if lowest.cost.parts[part] > 0.99 * dense[part]}
    share = sum(same.values()) / whole
    return f", of which {' and '.join(same)} are {share:.2f}x, untouched" if share > 0.05 else ""


def rest(found: Outcome) -> str:
    """What is possible when the limits that bind are given up: the cheapest such recipe that holds the loss."""
    costs = [axis for axis in found.binding if axis not in ("loss", "skill")]
    if not costs or len(costs) == len(found.budget.limits):
        return ""
    run = [
        t
        for t in found.trials
        if t.delta
        and t.delta.mean >= -found.budget.max_loss - 1e-9
        and not fallen_skill(t, found.budget)
        and set(found.budget.broken(t.cost, found.dense)) <= set(costs)
    ]
    most = max((t.delta.n for t in run if t.delta), default=0)
    run = [t for t in run if t.delta and t.delta.n == most]
    if not run:
        return ""
    best = min(run, key=lambda t: (found.budget.relative_cost(t.cost, found.dense), t.recipe))
    assert best.delta is not None
    free = " and ".join(AXES[axis] for axis in costs)
    return f" Without the limit on {free}, {best.recipe} is within the rest: {best.delta.text()} on {most} samples."
