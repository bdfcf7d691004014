"""Where adapters reach past the model classes of transformers, for whatever moves between its versions.

Everything else that the adapters use - blocks, projections, connectors, decoders - is the same from 5.19 to 5.23; the
tests run on both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def window_order(tower: Any, grids: Tensor) -> Tensor | None:
    """[tokens] int64: which merged token stands at each place of a Qwen tower; None where they stand in raster order.

    grids: [n, 3] int64, (frames, rows, columns) of patches of each picture or clip.
    """
    if not hasattr(tower, "window_size"):
        return None
    from transformers.vision_utils import get_vision_window_index  # new in 5.19, where it left the towers

    order, _ = get_vision_window_index(
        grids,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    return order
