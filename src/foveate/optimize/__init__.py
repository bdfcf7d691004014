"""The main job: a budget in, a model out, with a proof.

    from foveate.optimize import Budget, optimize
    result = optimize(foveate.load("nano"), Budget.parse(bytes="0.5x"), out="smaller")

`run` holds the search, `search` its pure parts, `workbench` the model behind it, `report` the page.
"""

from __future__ import annotations

from typing import Any

from foveate.optimize.budget import Budget, Cost, Limit

__all__ = ["Budget", "Cost", "Limit", "optimize"]


def __getattr__(name: str) -> Any:
    if name == "optimize":  # needs torch, which parsing a budget does not
        from foveate.optimize.main import optimize

        return optimize
    raise AttributeError(f"module 'foveate.optimize' has no attribute {name!r}")
