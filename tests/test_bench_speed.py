"""Stages of time, break-even points, and machines that were calibrated: on clocks and rates that the tests control."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
import torch

from foveate import clock as clocks
from foveate.bench import calibrate, cost, overhead
from foveate.bench.breakeven import Point, crossing, ladder, search
from foveate.bench.counts import request_of_sizes
from foveate.bench.device import HERE, Device, calibration_file, chosen, devices, interpolated
from foveate.bench.meter import Meter
from foveate.bench.requests import Load, bench, timed_request
from foveate.bench.roofline import Kinds
from foveate.clock import OPENING, Clock, charge
from foveate.errors import InputError
from foveate.nvila.presets import PRESETS
from foveate.recipe import Recipe

# ---- stages


@pytest.fixture
def seconds(monkeypatch):
    """A clock that moves by one second whenever it is read."""
    ticking = count()
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(ticking)))


def test_time_is_charged_to_the_innermost_stage(seconds):
    clock = Clock("cpu")
    with clock.stage("encode"), charge("select"), charge("prefill"):
        pass
    # read at 0 1 2 3 4 5: five seconds in all, the middle one three, the inner one one
    assert clock.ms == {"preprocess": 0.0, "encode": 2000.0, "select": 2000.0, "prefill": 1000.0, "decode": 0.0}


def test_charges_without_a_clock_or_to_a_stage_it_does_not_know_change_nothing(seconds):
    with charge("select"):
        pass
    clock = Clock("cpu")
    with clock.stage("preprocess"), charge(OPENING):
        pass
    assert clock.ms["preprocess"] == 1000.0 and OPENING not in clock.ms
    more = Clock("cpu", extra=(OPENING,))
    with more.stage("preprocess"), charge(OPENING):
        pass
    assert more.ms[OPENING] == 1000.0 and more.ms["preprocess"] == 2000.0
    with charge("decode"):  # the clock stopped
        pass
    assert more.ms["decode"] == 0.0


def test_an_error_leaves_the_clock_as_it_was():
    clock = Clock("cpu")
    with pytest.raises(ZeroDivisionError), clock.stage("encode"), charge("select"):
        raise ZeroDivisionError
    with charge("decode"):
        pass
    assert clock.ms["decode"] == 0.0 and clock.ms["select"] > 0


def test_stages_of_a_request_add_up_and_signals_are_charged_to_the_method(vlm, monkeypatch):
    from foveate.adapters import nvila

    load = Load((96, 64), new_tokens=3)
    dense, tokens = timed_request(vlm, load)
    ms = dense(0)
    first = ("decode_image", "preprocess", "tower", "select", "prefill")
    assert ms["ttft"] == pytest.approx(sum(ms[name] for name in first)) and all(ms[name] > 0 for name in first)
    assert ms["total"] == pytest.approx(ms["ttft"] + 2 * ms["decode"]) and tokens["kept"] == tokens["visual"]

    slow, real = 0.05, nvila.measure

    def measure(*args, **kwargs):
        clocks.time.sleep(slow)
        return real(*args, **kwargs)

    monkeypatch.setattr(nvila, "measure", measure)
    small = Recipe.parse("fastervlm(keep=0.25)").apply(vlm, quiet=True)
    timed, tokens = timed_request(small, load)
    assert tokens["kept"] * 4 == tokens["visual"]
    assert timed(1)["select"] > 1000 * slow


def test_clips_and_batches_are_timed_too(vlm):
    one, tokens = timed_request(vlm, Load((64, 64), frames=3, new_tokens=1))
    assert one(0)["prefill"] > 0 and tokens["visual"] > 0
    result = bench(vlm, load=Load((64, 64), batch=2, new_tokens=2), pairs=1, min_seconds=0.0)
    assert result["run"]["batch"] == 2 and {row["stage"] for row in result["rows"]} >= {"tower", "decode_image"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: queues are drained around stages")
def test_stages_wait_for_the_device():
    clock = Clock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    with clock.stage("prefill"):
        for _ in range(20):
            x = x @ x
    assert clock.ms["prefill"] > 20 * 2 * 4096**3 / 2e15 * 1e3


# ---- break-even


def test_the_crossing_lies_between_the_sizes_around_it():
    points = [Point(100, 1.2, 1.1, 1.3), Point(1000, 0.8, 0.7, 0.9), Point(200, 1.1, 0.95, 1.2)]
    found = crossing(points)
    assert 200 < found["tokens"] < 1000
    assert found["tokens"] == pytest.approx(200 * 5 ** (0.1 / 0.3), abs=0.1)
    assert found["low"] < found["tokens"] < found["high"]
    assert [point["tokens"] for point in found["points"]] == [100, 200, 1000] and "pays from about" in found["text"]


def test_a_recipe_may_always_pay_or_never():
    always = crossing([Point(64, 0.9, 0.8, 1.05), Point(640, 0.5, 0.4, 0.6)])
    assert always["tokens"] is None and always["high"] is not None and "smallest has 64" in always["text"]
    never = crossing([Point(64, 1.5, 1.4, 1.6), Point(640, 1.01, 0.9, 1.1)])
    assert never["tokens"] is None and never["low"] is not None and "up to 640" in never["text"]


def test_the_search_halves_the_sizes():
    asked = []

    def measure(index: int) -> Point:
        asked.append(index)
        ratio = 1.5 - 0.1 * index
        return Point(2**index, ratio, ratio, ratio)

    found = crossing(search(17, measure))
    assert found["tokens"] == pytest.approx(2**6, rel=0.01) or 2**5 <= found["tokens"] <= 2**6
    assert len(asked) == len(set(asked)) <= 6
    assert len(search(1, measure)) == 1


def test_sizes_grow_in_tokens(vlm):
    for load in (Load((256, 192)), Load((256, 192), batch=4), Load((64, 64), frames=8)):
        sizes = [tokens for tokens, _ in ladder(vlm, load)]
        assert sizes == sorted(set(sizes)) and len(sizes) > 1


# ---- machines


def flat(rate: float) -> dict[str, list[list[float]]]:
    return {"float32": [[1.0, rate], [1e12, rate]]}


CALIBRATED = Device(
    HERE,
    "this machine",
    {"float32": 1e9},
    {"float32": 1e9},
    {"flops": 1.0, "bandwidth": 1.0},
    "a test",
    gemm=flat(1e9),
    reading=flat(5e8),
    attention=flat(1e9),
    attention_full=flat(1e9),
    attention_one=flat(2e8),
    stream={"float32": 1e9},
    activation={"float32": 1e9},
    block_ms={
        "tower float32": 2.0,
        "prefill float32": 3.0,
        "decode float32": 4.0,
        "prefill QuantizedLinear 4 float32": 20.0,
        "decode QuantizedLinear 4 float32": 30.0,
        "decode int8 float32": 50.0,
    },
    call_ms={
        "tower float32": 5.0,
        "select float32": 6.0,
        "choose float32": 9.0,
        "prefill float32": 7.0,
        "decode float32": 8.0,
    },
    unpacking={"QuantizedLinear 4 float32": 1e8},
    caching={"int8 float32": [1e7, 2e7]},
    process=1000.0,
)


@pytest.fixture
def asked() -> tuple[cost.ModelShape, cost.Request]:
    shape = cost.ModelShape.from_config(PRESETS.get("nano").config(), PRESETS.get("nano").spec)
    return shape, request_of_sizes(PRESETS.get("nano").spec, shape, images=[(128, 96)], text=20)


def test_a_calibrated_machine_counts_products_values_and_blocks(asked):
    shape, request = asked
    found = cost.estimate(shape, request, CALIBRATED, dtype="float32")
    prompt = request.prompt
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    values = prompt * ((26 * shape.width + 10 * (queries + keys) + 3 * shape.mlp) * 4 + shape.mlp)
    head = 4 * shape.head_params / 5e5  # one row reads its weights
    expected = found["flops"]["prefill"] / 1e6 - 2 * shape.head_params / 1e6 + head + 7.0
    expected += shape.layers * (3.0 + values / 1e6)
    assert found["ms"]["prefill"] == pytest.approx(expected, rel=1e-6)
    decode = 4 * shape.layers * shape.layer_params / 5e5 + head + 8.0
    each = (
        4.0 + 4 * queries * (prompt + 1) / 2e5 + 2 * 4 * 2 * keys * prompt / 1e6
    )  # block, attention, cache in and out
    assert found["ms"]["decode"] == pytest.approx(decode + shape.layers * each)
    tower = found["flops"]["tower"] / 1e6 + 5.0 + shape.vision_layers * 2.0
    rows = request.views * shape.patches
    tower += shape.vision_layers * rows * (12 * shape.vision_width * 4 + shape.vision_mlp) / 1e6
    assert found["ms"]["tower"] == pytest.approx(tower, rel=1e-6)
    assert found["ms"]["selection"] == 6.0
    assert found["bytes"]["process"] == found["bytes"]["peak"] + 1000
    half = replace(request, kept=request.kept // 2)
    assert cost.estimate(shape, half, CALIBRATED, dtype="float32")["ms"]["prefill"] < found["ms"]["prefill"]
    nothing = cost.Request(text=20, new=1)
    assert cost.estimate(shape, nothing, CALIBRATED, dtype="float32")["ms"]["tower"] == 0


def test_a_recipe_costs_what_its_layers_and_caches_take_more(asked):
    shape, request = asked[0], replace(asked[1], text=1000)  # so many that the prefill holds the most

    def planned(recipe: str) -> dict:
        effect = cost.Effect.of(Recipe.parse(recipe)) if recipe else None
        return cost.estimate(shape, request, CALIBRATED, dtype="float32", effect=effect)

    dense, small, cached = planned(""), planned("rtn(bits=4)"), planned("int8")
    made = shape.layers * shape.layer_params / 1e5
    more = {stage: small["ms"][stage] - dense["ms"][stage] for stage in ("tower", "prefill", "decode")}
    assert more == pytest.approx({"tower": 0, "prefill": made + 20 * shape.layers, "decode": made + 30 * shape.layers})
    largest = max(i * o for i, o, _ in shape.linears()["llm"])
    assert small["bytes"]["activations"] - dense["bytes"]["activations"] == largest * 13  # a byte and three floats
    values = 2 * shape.layers * shape.kv_heads * shape.head_size * request.prompt
    assert cached["ms"]["prefill"] - dense["ms"]["prefill"] == pytest.approx(values / 2e4)
    assert cached["ms"]["decode"] - dense["ms"]["decode"] == pytest.approx(
        values / 1e4 - 8 * values / 1e6 + 50 * shape.layers
    )
    assert planned("uniform(keep=1)")["ms"]["selection"] == 9.0
    assert [planned(r)["unmeasured"] for r in ("", "rtn(bits=4) + int8")] == [[], []]
    assert planned("rtn(bits=8) + kivi(bits=4, group=32)")["unmeasured"] == ["QuantizedLinear 8", "kivi 4"]
    sheet = cost.estimate(shape, request, devices()["cpu"], effect=cost.Effect.of(Recipe.parse("rtn(bits=8)")))
    assert sheet["unmeasured"] == [] and sheet["bytes"]["process"] is None


def test_rates_between_measured_sizes():
    points = [[10.0, 1.0], [1000.0, 3.0]]
    assert [interpolated(points, x) for x in (1, 10, 100, 1000, 1e6)] == pytest.approx([1, 1, 2, 3, 3])
    with pytest.raises(InputError, match="float16 was not measured"):
        CALIBRATED.compute_ms(1, "float16")


def test_what_was_calibrated_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert HERE not in devices() and chosen("auto", devices()).name == "h200"
    with pytest.raises(InputError, match="plan --calibrate"):
        chosen("here", devices())
    path = calibrate.store(CALIBRATED)
    assert path == calibration_file() and path.is_relative_to(tmp_path) and devices()[HERE] == CALIBRATED
    assert chosen("auto", devices()) == chosen("here", devices()) == CALIBRATED
    assert chosen("h100", devices()).name == "h100" and chosen("tpu", devices()) is None
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "reading"}
    for text in ("{}", json.dumps(old)):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            devices()


def test_calibrating_measures_every_rate(quick_calibration):
    calls = []
    device = calibrate.calibrate("cpu", seconds=0.0, advance=lambda: calls.append(1))
    assert len(calls) == calibrate.measurements()
    curves = (device.gemm, device.reading, device.attention, device.attention_full, device.attention_one)
    for table in (*curves, device.flops, device.bandwidth, device.stream, device.activation):
        assert set(table) == {"float32", "bfloat16"}
    assert all(rate > 0 for curve in curves for points in curve.values() for _, rate in points)
    assert all(points == sorted(points) for curve in curves for points in curve.values())
    both = ("float32", "bfloat16")
    assert set(device.unpacking) == {f"QuantizedLinear 4 {dtype}" for dtype in both}
    assert set(device.caching) == {f"int8 {dtype}" for dtype in both}
    kinds = [f"{stage} {kind}" for stage in ("prefill", "decode") for kind in ("QuantizedLinear 4", "int8")]
    stages = ("tower", "prefill", "decode", *kinds)
    assert set(device.block_ms) == {f"{stage} {dtype}" for stage in stages for dtype in both}
    stages = ("tower", "select", "choose", "prefill", "decode")
    assert set(device.call_ms) == {f"{stage} {dtype}" for stage in stages for dtype in both}
    assert device.process > 50e6
    assert json.dumps(vars(device))


def test_overhead_is_what_a_block_adds_and_what_is_left_at_none(monkeypatch):
    def left(device, meter, layers, dtype, recipe=""):
        more = {"": 0, overhead.CHOICE: 7, "int8": 16, "rtn(bits=4)": -1}[recipe]
        kinds = Kinds({} if recipe == "int8" else {"llm": "QuantizedLinear 4"}, recipe if recipe == "int8" else "")
        return dict.fromkeys(overhead.STAGES, 80.0 + 10 * layers + more), kinds

    monkeypatch.setattr(overhead, "left", left)
    recipes = ("int8", "rtn(bits=4)")
    made = overhead.with_overhead(CALIBRATED, None, torch.bfloat16, recipes)
    blocks = {"tower": 10, "prefill": 10, "decode": 10, "prefill int8": 2, "decode int8": 2}
    blocks |= {"prefill QuantizedLinear 4": 0, "decode QuantizedLinear 4": 0}
    calls = {"tower": 80, "select": 100, "prefill": 80, "decode": 80, "choose": 167}
    assert made.block_ms == CALIBRATED.block_ms | {f"{key} bfloat16": ms for key, ms in blocks.items()}
    assert made.call_ms == CALIBRATED.call_ms | {f"{key} bfloat16": ms for key, ms in calls.items()}


def test_what_is_left_is_the_time_without_the_known_parts(monkeypatch):
    took = dict.fromkeys(overhead.STAGES, 1e6)
    recipes = []

    def timed(vlm, load):
        linear = vlm.model.llm.model.layers[0].mlp.up_proj
        recipes.append((vlm.recipe.text(), type(linear).__name__))
        return (lambda i: took), None

    monkeypatch.setattr(overhead, "timed_request", timed)
    meter = Meter(torch.device("cpu"), 0.0, lambda: None)
    dense, _ = overhead.left(CALIBRATED, meter, 2, torch.float32)
    assert all(0 < 1e6 - ms < 1e6 for stage, ms in dense.items() if stage != "select")
    assert dense["select"] == 1e6  # overhead that is known already is not taken off
    _, kinds = overhead.left(CALIBRATED, meter, 2, torch.float32, "rtn(bits=4)")
    _, cached = overhead.left(CALIBRATED, meter, 2, torch.float32, "int8")
    assert kinds.weights == {"llm": "QuantizedLinear 4"} and cached.cache == "int8"
    assert recipes == [("", "Linear"), ("", "QuantizedLinear"), ("int8", "Linear")]
