"""What choosing costs: signals that are made when they are read, time by signal, and the benchmark of reductions."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import foveate
from families import tiny
from foveate.clock import Clock
from foveate.llm_signals import LayerView
from foveate.reduce.base import Reducer, Reduction
from foveate.vlm import Request
from goldens_io import goldens_dir
from reduce_oracle import decoded

ROOT = Path(__file__).resolve().parents[1]
PICTURE = np.random.default_rng(4).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Reads(Reducer):
    """Asks for three signals of every layer, and reads two of them in the first."""

    name: ClassVar[str] = "reads"
    signals: ClassVar[tuple[str, ...]] = ("text_attention", "mean_text_attention", "hidden")

    def steps(self, shape):
        return tuple(self.step("llm", self.select, layer=layer) for layer in range(1, shape.layers))

    def select(self, signals, layout):
        assert all(name in signals for name in self.signals) and "keys" not in signals
        with pytest.raises(KeyError):
            signals["keys"]
        if "once" not in SEEN:
            SEEN["once"] = [signals["text_attention"], signals["mean_text_attention"]]
            assert signals["text_attention"] is SEEN["once"][0]
        return Reduction(torch.arange(len(layout)))


SEEN: dict[str, list[torch.Tensor]] = {}


@torch.inference_mode()
def test_signals_inside_the_language_model_are_made_when_they_are_read(monkeypatch):
    vlm = foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")
    made, real = [], LayerView._signal

    def signal(self, name):
        made.append(name)
        return real(self, name)

    monkeypatch.setattr(LayerView, "_signal", signal)
    SEEN.clear()
    decoded(vlm, [Request("what do you see?", PICTURE, reduce=Reads(keep=0.5))], [])
    assert made == ["text_attention", "mean_text_attention"]
    rows, mean = SEEN["once"]
    torch.testing.assert_close(mean, rows.mean(dim=1))


def test_merged_tokens_are_the_same_by_dense_and_by_sparse_weights():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 5, generator=generator)
    weights = torch.rand(4, 9, generator=generator) * (torch.rand(4, 9, generator=generator) > 0.6)
    for given in (weights, weights.to_sparse()):
        torch.testing.assert_close(Reduction(torch.arange(4), given).apply(features), weights @ features)


def test_each_signal_of_the_tower_has_its_time(vlm):
    plan = vlm.plan(Request("what?", PICTURE).to_messages())
    clock = Clock(vlm.device)
    with clock.stage("encode"):
        vlm.adapter.encode([vlm.prepare(plan)], [plan], {"keys@-1", "received_attention", "features"})
    assert set(clock.parts) == {"keys@-1", "received_attention"} and min(clock.parts.values()) > 0
    assert sum(clock.parts.values()) == pytest.approx(clock.ms["select"])


def test_the_benchmark_of_reductions_resumes_and_keeps_to_its_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed, out = importlib.import_module("speed"), tmp_path / "speed.json"

    def taken(*options):
        common = ["--dtype", "float32", "--memory", "", "--out", str(out), "--rounds", "1"]
        methods = ["--methods", "uniform", "fastervlm", "schedule"]
        monkeypatch.setattr(sys, "argv", ["speed.py", *common, *methods, *options])
        speed.main()
        return json.loads(out.read_text())

    (run,) = taken("--presets", "nano:64x64")["runs"]
    (size,) = run["sizes"]
    rows = {row["recipe"].partition("(")[0]: row for row in size["rows"]}
    assert set(rows) == {"uniform", "fastervlm", "schedule"} and size["visual"] == 64 and size["rounds"] == 1
    assert rows["uniform"]["tower_ms"] == size["dense"]["tower_ms"] > 0  # nothing leaves it
    assert rows["uniform"]["signals_ms"] == 0 < rows["fastervlm"]["signals_ms"] < rows["fastervlm"]["select_ms"]
    assert rows["fastervlm"]["signals_ms"] == pytest.approx(size["signals"]["received_attention"], abs=1e-3)
    assert rows["uniform"]["prefill_flops"] < rows["schedule"]["prefill_flops"] < 1 == rows["uniform"]["tower_flops"]
    assert all(row["recipe"] in run["break_even"] for row in rows.values())
    assert "visual tokens x batch" in capsys.readouterr().out

    monkeypatch.setattr(speed, "NEAR", 1)  # a dense request between any two
    resumed = taken("--resume", "--presets", "nano:64x64,1f")
    small, same = resumed["runs"][0]["sizes"]
    assert same == size and small["visual"] == 16
    nothing = taken("--resume", "--presets", "nano:64x64,2f", "--minutes", "0")
    assert nothing["runs"] == resumed["runs"]
    assert nothing["skipped"] == [{"preset": "nano", "size": [384, 384], "frames": 2}]


@torch.inference_mode()
def test_the_benchmark_of_reductions_predicts_with_the_tower_that_tokens_leave(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    speed, vlm = importlib.import_module("speed"), tiny("smolvlm")
    methods = speed.recipes(vlm, [0.25], ["tome", "uniform"])
    found = speed.measured(vlm, speed.loads("64x64")[0], methods, 1, 0.0)
    before, dense = found["dense"], found["dense"]["prefill_ms"]
    opened, tower = before["decode_image_ms"] + before["preprocess_ms"], before["tower_ms"]
    shares = {}
    for row in found["rows"]:
        shares[row["recipe"]] = row["tower_flops"]
        predicted = opened + tower * row["tower_flops"] + dense * row["prefill_flops"]
        assert row["ttft_predicted"] == pytest.approx(predicted / (opened + tower + dense))
    assert shares["uniform(keep=0.25)"] == 1 > shares["tome(keep=0.25)"] > 0.25
