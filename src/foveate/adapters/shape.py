"""`Shape`: the few numbers of a model that decide where a token reduction acts, and the order of the places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SITES = ("encoder", "post_encoder", "post_projector", "llm", "compute", "cache")
"""Where a reducer may act, in the order in which a request passes: inside the encoder, after it, after the connector,
inside the language model, in what its layers compute, in the cache while decoding. What comes before - views, tiles,
frames, thumbnails of a clip - is preprocessing, which the plan decides and no reducer changes."""

INSIDE = ("llm", "compute", "cache")
"""Sites inside the language model."""


@dataclass(frozen=True)
class Shape:
    """blocks: encoder blocks that are used, with attention of `heads` (0: not known). layers: decoder layers, with
    attention of `text_heads`. cls: the encoder has a CLS token. sites: where reducers may act. signals: base names of
    the encoder-side signals on offer, without "@block". no_encoder: why there is no site "encoder", if it is known."""

    blocks: int
    layers: int
    cls: bool = False
    sites: tuple[str, ...] = SITES
    signals: tuple[str, ...] = ()
    heads: int = 0
    text_heads: int = 1
    no_encoder: str = ""

    def unserved(self, name: str, sites: Iterable[str]) -> str:
        """One line for method `name`, none of whose `sites` is served: why, and what to use instead."""
        if "post_projector" not in self.sites:
            return f"{name} reduces visual tokens; this model takes text only and has none. Use a cache method ('int8')"
        why = f" ({self.no_encoder})" if self.no_encoder and "encoder" in sites else ""
        return (
            f"{name} acts at site {' or '.join(sites)}, which this model does not serve{why}; it serves "
            f"{', '.join(self.sites)}. Try 'visionzip', 'uniform' or 'fastv'"
        )


def steps_of(reducers: Iterable[Any], shape: Shape) -> tuple[Any, ...]:
    """The steps of all reducers in the order in which a request passes them; fresh ones, for one request."""
    steps = [step for reducer in reducers for step in reducer.steps(shape)]
    return tuple(sorted(steps, key=lambda step: (SITES.index(step.site), step.layer)))
