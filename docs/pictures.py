"""Draw the pictures of the docs that come from the library itself: the contact sheet and the kept tokens.

    python docs/pictures.py

`images/report.png` is a screenshot of a report.html in a browser.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import foveate
from foveate import world
from foveate.data.sample import as_media
from foveate.show import kept_picture
from foveate.vlm import Request
from foveate.world.show import contact_sheet

IMAGES = Path(__file__).parent / "images"
SCENES = (("scene", 12), ("tags", 5), ("bars", 3), ("dialogue", 2))
METHODS = ("random(keep=0.25)", "uniform(keep=0.25)", "fastervlm(keep=0.25)")
GAP = 8


def kept_tokens() -> Image.Image:
    """A row for each method, a column for each picture: what stays clear is what the language model is given."""
    vlm = foveate.load("nano")
    rows = []
    for method in METHODS:
        panels = []
        for kind, index in SCENES:
            picture = as_media(world.draw(kind, index, split="test").images[0])
            request = Request("What is this?", picture, reduce=method)
            plan = vlm.plan(request.to_messages())
            kept = vlm.answer([request], max_new_tokens=1)[0].kept
            panels.append(kept_picture(plan, vlm.spec, vlm.adapter.layout(plan), kept, side=200))
        rows.append(panels)
    widths = [max(row[column].width for row in rows) for column in range(len(SCENES))]
    height = max(panel.height for row in rows for panel in row)
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(widths) - 1), (height + GAP) * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            sheet.paste(panel, (sum(widths[:x]) + GAP * x, y * (height + GAP)))
    return sheet


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    contact_sheet().save(IMAGES / "world.png")
    kept_tokens().save(IMAGES / "kept.png")
