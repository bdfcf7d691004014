"""`optimize`: the main job as one call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import foveate
from foveate.errors import InputError
from foveate.optimize.budget import Budget
from foveate.optimize.result import FILES, check_out, to_report, write
from foveate.optimize.run import Effort, search
from foveate.optimize.samples import Split, splits
from foveate.optimize.strategies import STRATEGIES
from foveate.optimize.study import FILE as STUDY
from foveate.optimize.study import Study, fingerprint
from foveate.optimize.workbench import ModelWorkbench
from foveate.tasks.base import Task, find_tasks

if TYPE_CHECKING:
    from foveate.optimize.report import Picture
    from foveate.optimize.run import Outcome
    from foveate.vlm import VLM

RESERVE = 0.7
"""Share of the minutes given that is planned for answers; the rest is for costs, times, pictures and writing."""


def optimize(
    vlm: VLM,
    budget: Budget | None = None,
    *,
    tasks: Sequence[str | Task] = (),
    data: str | Path | None = None,
    scorer: str | None = None,
    limit: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    methods: Sequence[str] | None = None,
    pin: Sequence[str] = (),
    forbid: Sequence[str] = (),
    add: Sequence[str] = (),
    strategy: str | None = None,
    time_on: str | None = None,
    effort: Effort | None = None,
    command: str = "",
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The best recipe for `vlm` within `budget`, proved on held-back samples: the dictionary of report.json.

    tasks, data, scorer: as `foveate eval`; without them the drawn world. limit: questions per task in the last round of
    the choice and again in the proof. minutes: scale the numbers of questions to this time, measured first; without
    it they are fixed, and the result depends on the seed alone. out: folder for the model, report.html and report.json;
    with None nothing is written. methods: search only these; pin, forbid, add: methods by name or with parameters that
    are in every recipe, in none, or may be as well. strategy: a name of STRATEGIES. time_on: an architecture preset on
    which finalists are timed with random weights, instead of this model. A killed search goes on from its log in `out`.
    Ctrl-C ends the search and keeps the best so far. Raises InputError, BudgetError,
    UnknownNameError.
    """
    budget, effort = budget or Budget.parse(), effort or Effort()
    say = say or (lambda line: None)
    if vlm.recipe:
        raise InputError(
            f"{vlm.name} already holds the recipe {vlm.recipe.text()!r}; optimize the dense model it came from"
        )
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least one question per task is needed")
    if out is not None:
        check_out(Path(out))
    chosen, folder = _tasks(tasks, data, scorer)
    if strategy is not None:
        STRATEGIES.get(strategy)
        effort = replace(effort, strategy=strategy)
    if limit is not None:
        effort = effort.limited(limit * len(chosen))
    if minutes is not None:
        effort = effort.scaled(_factor(vlm, chosen, folder, effort, minutes, seed, methods))
    start = time.monotonic()
    per_task = [-(-n // len(chosen)) for n in (effort.choose, effort.prove)]
    say(f"drawing and planning {len(chosen) * sum(per_task)} questions at most")
    first, second = splits(chosen, choose=per_task[0], prove=per_task[1], seed=seed, data_dir=folder)
    names = ", ".join(dict.fromkeys("drawn world" if t.name.startswith("world/") else t.name for t in chosen))
    about = f"{names} ({len(set(first.skills))} skills)" if len(set(first.skills)) > 1 else names
    if data is not None and folder is None:
        about = f"{Path(data).name} ({about})" if about != "data" else Path(data).name
    study = _study(vlm, first, second, out, seed)
    if study.resumed:
        say(f"going on from the log of an earlier search, {study.path}")
    choices = {"methods": methods, "pin": pin, "forbid": forbid, "add": add, "time_on": time_on, "budget": budget}
    bench = ModelWorkbench(vlm, first, second, data=about, study=study, quiet=quiet, **choices)

    def told(line: str) -> None:
        study.event(line)
        say(line)

    found = search(bench, budget, effort, seed=seed, say=told)
    bench.close()
    study.close()
    found.seconds = time.monotonic() - start
    report: dict[str, Any] = to_report(
        found, model=Path(vlm.name).name, data=about, conditions=_conditions(vlm, bench, effort, seed, command)
    )
    if out is not None:
        kept, pictures = found.kept, _pictures(bench, found)
        report["out"] = str(out) if kept else None
        write(Path(out), report, pictures, (lambda path: bench.save(kept.recipe, path)) if kept else None)
    return report


def _study(vlm: VLM, choose: Split, prove: Split, out: str | Path | None, seed: int) -> Study:
    """The log of this search in the folder `out`. That of a search which came to its end is begun anew."""
    if out is None:
        return Study(None)
    path, report = Path(out) / STUDY, Path(out) / FILES[0]
    if report.is_file() and not json.loads(report.read_text(encoding="utf-8")).get("interrupted"):
        path.unlink(missing_ok=True)
    weights = sum(float(p.float().abs().sum()) for p in list(vlm.model.parameters())[:8] if not p.is_meta)
    conditions = {
        "model": vlm.name,
        "weights": fingerprint(round(weights, 4), sum(p.numel() for p in vlm.model.parameters())),
        "preprocessing": vlm.spec.hash(),
        "questions": fingerprint([[(q.item.id, q.scorer) for q in split.questions] for split in (choose, prove)]),
        "seed": str(seed),
        "version": foveate.__version__,
    }
    return Study(path, conditions)


def _pictures(bench: ModelWorkbench, found: Outcome) -> list[Picture]:
    if found.winner is None or found.interrupted:
        return []
    try:
        return bench.pictures(found.winner.recipe)
    except KeyboardInterrupt:  # all that matters is known by now: write it
        return []


def _tasks(tasks: Sequence[str | Task], data: str | Path | None, scorer: str | None) -> tuple[list[Task], Path | None]:
    own = [task for task in tasks if isinstance(task, Task)]
    names = [task for task in tasks if isinstance(task, str)]
    if own and not names:
        return own, None if data is None else Path(data)
    found, folder = find_tasks(names, data, scorer)
    return own + found, folder


def _factor(
    vlm: VLM, tasks: Sequence[Task], folder: Path | None, effort: Effort, minutes: float, seed: int, methods: Any
) -> float:
    """How many times the questions of `effort` fit into the minutes, from the time of a few dense answers."""
    if minutes <= 0:
        raise InputError(f"--minutes {minutes:g}: give a time above 0")
    per_task = -(-32 // len(tasks))
    first, second = splits(tasks, choose=per_task, prove=1, seed=seed, data_dir=folder)
    bench = ModelWorkbench(vlm, first, second, data="", methods=methods, quiet=True)
    n = len(bench.choose)
    bench.scores("", "choose", min(n, 4))  # the first answers pay for imports and memory
    start = time.monotonic()
    bench.scores("", "choose", n)
    encode_and_answer = (time.monotonic() - start) / max(1, n - 4)
    return min(8.0, RESERVE * 60 * minutes / max(1e-6, encode_and_answer * effort.answers()))


def _conditions(vlm: VLM, bench: ModelWorkbench, effort: Effort, seed: int, command: str) -> dict[str, Any]:
    from foveate.machine import machine

    device, versions = machine()
    skipped = {**bench.choose.skipped, **bench.prove.skipped}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **({"command": command} if command else {}),
        "seed": seed,
        "model": f"{vlm.name}: {vlm.adapter.family}, {str(vlm.dtype).removeprefix('torch.')} on {vlm.device}",
        "preprocessing": vlm.spec.hash(),
        "machine": ", ".join(f"{key} {value}" for key, value in device.items() if value is not None),
        "versions": ", ".join(f"{key} {value}" for key, value in versions.items()),
        "strategy": f"{effort.strategy}: {effort.recipes} recipes on {effort.explore} questions, best "
        f"{effort.shortlist} go on",
        "rounds": "; ".join(f"{n} questions, best {k} go on" for n, k in effort.rungs) + f"; proof {effort.prove}",
        "skipped questions": f"{len(skipped)}" + (f", first: {next(iter(skipped.items()))}" if skipped else ""),
    }
