"""The report in a real browser, without network: what is on the page, what the console says, what is asked for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

from foveate.optimize.budget import Budget
from foveate.optimize.report import Picture, render
from foveate.optimize.result import to_report
from foveate.optimize.run import search
from foveate.show import png
from test_optimize_search import QUICK, TABLE, Synthetic

SCRIPT = Path(__file__).parents[1] / "docs" / "pictures.py"
spec = importlib.util.spec_from_file_location("pictures", SCRIPT)
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)

pytestmark = pytest.mark.skipif(docs.browser() is None, reason="no Chromium on this machine")
OF_THE_BROWSER = ("google.com", "googleapis.com", "gvt1.com")
"""What the browser asks for by itself."""


def asked(found):
    hosts = {urlparse(url).hostname or "" for url in found["urls"] if url.startswith(("http", "ws", "ftp"))}
    return sorted(host for host in hosts if not host.endswith(OF_THE_BROWSER))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of the synthetic search, with five pictures."""
    found = search(Synthetic(TABLE), Budget.parse(loss="2pt"), QUICK, say=lambda line: None)
    conditions = {"machine": "a <machine>", "versions": "torch 2", "seed": 0}
    report = to_report(found, model="nano", data="the drawn world", conditions=conditions)
    pictures = [Picture(png(Image.new("RGB", (96, 64), (40 * i, 90, 120))), f"sample {i}") for i in range(5)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(report, pictures), encoding="utf-8")
    return path


def test_report_opens_without_network_or_errors(page):
    found = docs.open_page(page)
    assert found["console"] == [] and asked(found) == []
    ids = set(re.findall(r'<h2 id="(\w+)">', found["dom"]))
    assert ids >= {"front", "proof", "skills", "time", "pictures", "rejected", "pruned", "conditions"}
    assert found["dom"].count("<figure><img ") == 5 and found["dom"].count("<svg") >= 3
    for shown in ("Budget met", "random tokens", "break the limit of FLOPs", "a &lt;machine&gt;", "95 %"):
        assert shown in found["dom"], shown


def test_the_check_sees_errors_and_requests(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<script>undefined.x</script><img src="http://example.com/x.png">')
    found = docs.open_page(path)
    assert len(found["console"]) == 1 and "TypeError" in found["console"][0]
    assert asked(found) == ["example.com"]


def test_screenshot_is_a_picture_of_the_page(page, tmp_path):
    docs.open_page(page, tmp_path / "report.png", size=(900, 700))
    pixels = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"))
    assert pixels.shape == (700, 900, 3)
    assert (pixels == 255).all(axis=2).mean() < 0.97 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
