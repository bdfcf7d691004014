"""What the source of calibration data changes: one recipe, several sources and seeds, one measure.

The study of arXiv 2410.07461 (abx393/llm-pruning-calibration-data @ 8cd1b10) as a function: there the measure is
accuracy on downstream sets and perplexity, the recipe Wanda or SparseGPT at 50 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foveate.errors import InputError
from foveate.progress import track
from foveate.recipe import Recipe
from foveate.tasks.evaluate import Record, evaluate
from foveate.tasks.perplexity import perplexity
from foveate.tasks.stats import paired_bootstrap
from foveate.weights.samples import check_source

if TYPE_CHECKING:
    from foveate.vlm import VLM


def with_source(recipe: Recipe, calib: str, seed: int) -> Recipe:
    """The recipe with this calibration data in every method that looks at any. Raises InputError if none does."""
    methods = tuple(
        dataclasses.replace(method, calib=calib, seed=seed) if "calib" in method.parameters() else method
        for method in recipe
    )
    if not any("calib" in method.parameters() for method in methods):
        raise InputError(f"no method of {recipe.text()!r} looks at calibration data, so there is nothing to study")
    return Recipe(methods)


def study(
    vlm: VLM,
    recipe: Recipe,
    sources: Sequence[str],
    *,
    documents: Sequence[str] | None = None,
    limit: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    quiet: bool = True,
) -> dict[str, Any]:
    """{"recipe", "measure", "dense", "rows": [{"source", "values" (one a seed), "mean", "spread", ...}]}, best first.

    documents: measure perplexity on them; None: the mean accuracy over the drawn world with `limit` questions a skill,
    each row then with the paired difference to dense of its first seed ("paired": value, low, high). spread: largest
    minus smallest value over the seeds. Raises InputError (a source that is not there), RecipeError.
    """
    if not sources or not seeds:
        raise InputError("a study needs at least one source and one seed")
    for source in sources:
        check_source(source)
    runs: dict[tuple[str, int], list[Record]] = {}

    def measure(model: VLM, key: tuple[str, int]) -> float:
        if documents is not None:
            return perplexity(model, documents, limit=limit)["perplexity"]
        runs[key] = []
        return evaluate(model, ["world"], limit=limit, records=runs[key], progress=False)["mean"]

    dense = measure(vlm, ("", 0))
    rows = []
    for source in track(list(sources), "sources", quiet=quiet):
        values = [measure(with_source(recipe, source, seed).apply(vlm, quiet=True), (source, seed)) for seed in seeds]
        row: dict[str, Any] = {
            "source": source,
            "values": values,
            "mean": sum(values) / len(values),
            "spread": max(values) - min(values),
        }
        if documents is None:
            first, base = runs[source, seeds[0]], runs["", 0]
            groups = [record.task for record in base]
            row["paired"] = paired_bootstrap(
                [r.correct for r in first], [r.correct for r in base], groups=groups
            )._asdict()
        rows.append(row)
    rows.sort(key=lambda row: row["mean"], reverse=documents is None)
    kind = "accuracy" if documents is None else "perplexity"
    return {"recipe": recipe.text(), "measure": kind, "dense": dense, "seeds": list(seeds), "rows": rows}
