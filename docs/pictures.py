"""Draw the pictures of the docs that come from the library itself: the contact sheet, kept tokens, a report.

python docs/pictures.py                                the contact sheet and the kept tokens
python docs/pictures.py --report out/report.html       a screenshot of the report instead; needs Chromium
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
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


def browser() -> str | None:
    """The path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def open_page(page: Path, picture: Path | None = None, size: tuple[int, int] = (1180, 1240)) -> dict[str, object]:
    """What a headless browser says about a page: {"dom": its HTML as parsed, "console": lines, "urls": addresses that
    were asked for}. picture: where a screenshot goes. Raises SystemExit without a browser."""
    program = browser()
    if program is None:
        raise SystemExit("no Chromium was found; install one, for example: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "net.json"
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
            f"--user-data-dir={folder}/profile",
            f"--log-net-log={log}",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={picture.absolute()}" if picture else "--dump-dom",
            page.absolute().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        net = log.read_text(encoding="utf-8") if log.is_file() else ""
    return {
        "dom": done.stdout,
        "console": [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        "urls": sorted(set(re.findall(r'"url":"([^"]*)"', net))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="PAGE", help="a report.html of foveate optimize")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if args.report:
        if not args.report.is_file():
            sys.exit(f"{args.report} does not exist")
        open_page(args.report, IMAGES / "report.png")
        return
    contact_sheet().save(IMAGES / "world.png")
    kept_tokens().save(IMAGES / "kept.png")


if __name__ == "__main__":
    main()
