"""Times of a recipe against dense by a roofline: a hint at what is not worth measuring, never a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.bench import cost as costs
from foveate.bench.device import HERE, devices
from foveate.errors import FoveateError
from foveate.recipe import Recipe

if TYPE_CHECKING:
    from foveate.vlm import VLM


class Estimator:
    """Estimates for one request on the machine of `vlm`: the calibrated one (`foveate plan --calibrate`), else a row of
    the table of machines, whose ratios are what counts here."""

    def __init__(self, shape: costs.ModelShape, request: costs.Request, vlm: VLM) -> None:
        machines = devices()
        name = HERE if HERE in machines else "cpu" if vlm.device.type == "cpu" else "h200"
        self.device, self.dtype = machines[name], str(vlm.dtype).removeprefix("torch.")
        if self.dtype not in self.device.flops:
            self.dtype = next(iter(self.device.flops))
        self._shape, self._request = shape, request
        self._stored: dict[str, dict[str, float]] = {}
        self._dense = self._times("")

    def ratios(self, recipe: str) -> dict[str, float]:
        """{"ttft", "tpot", "throughput"}: predicted time of the recipe, or requests a second, as a multiple of dense;
        {} when nothing can be said, because a method of this model does not fit the shape that is timed."""
        try:
            found = {axis: ms / self._dense[axis] for axis, ms in self._times(recipe).items()}
        except FoveateError:
            return {}
        return {"ttft": found["ttft"], "tpot": found["tpot"], "throughput": 1 / found["total"]}

    def _times(self, recipe: str) -> dict[str, float]:
        parsed = Recipe.parse(recipe) if recipe else Recipe()
        effect = costs.Effect.of(parsed)
        key = Recipe(parsed.of("weights")).text()
        if key not in self._stored:
            self._stored[key] = costs.weights(self._shape, self.dtype, effect.weights)
        ms = costs.estimate(
            self._shape, self._request, self.device, dtype=self.dtype, effect=effect, stored=self._stored[key]
        )["ms"]
        return {"ttft": ms["ttft"], "tpot": ms["decode"], "total": ms["total"]}
