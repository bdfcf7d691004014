"""The command line, in this process, on a tiny random model: output keys, error lines, exit codes, whole outputs."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cli_calls import fails
from foveate.cli import VERBS, main
from foveate.cli.common import bar, human, new_file, new_folder
from foveate.errors import InputError

# ---- start-up


def python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    return found.stdout


HEAVY = "('torch', 'transformers', 'PIL', 'numpy', 'rich', 'yaml')"


def test_import_is_silent_light_and_fast():
    code = (
        "import sys, time; start = time.process_time(); import foveate; spent = time.process_time() - start\n"
        f"print([m for m in {HEAVY} if m in sys.modules], spent < 0.5)"
    )
    assert python(code) == "[] True\n"


def test_help_needs_no_torch_and_is_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-m", "foveate", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, interpreter included: the limit is on our work, not on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert all(verb in found.stdout for verb in VERBS) and found.stderr == ""
    code = (
        "import sys, contextlib, io; from foveate.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    codes = [main([v, '--help']) for v in ('ask', 'eval', 'plan')]\n"
        f"print(codes, [m for m in {HEAVY} if m in sys.modules])"
    )
    assert python(code) == "[0, 0, 0] []\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(run, verb):
    code, out, err = run(verb, "--help")
    assert code == 0 and err == "" and (verb in ("world", "train") or "--json" in out)


def test_version_and_usage(run):
    from foveate import __version__, methods

    assert callable(methods)

    assert run("--version") == (0, f"foveate {__version__}\n", "")
    fails(run("aks"), "invalid choice", "aks")
    fails(run(), "COMMAND")
    fails(run("eval", "--limit", "0"), "--limit", "0", "at least 1")


def test_codes_of_interrupts_and_bugs(run, monkeypatch):
    from foveate.cli import methods

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "run", interrupted)
    assert run("methods") == (130, "", "foveate: interrupted\n")

    def bug(args):
        raise ZeroDivisionError

    monkeypatch.setattr(methods, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["methods"])


def test_a_closed_pipe_is_quiet():
    found = subprocess.run(
        f"{sys.executable} -m foveate plan --device list | true", shell=True, capture_output=True, text=True, check=True
    )
    assert found.stderr == ""


# ---- ask


def test_ask_json_has_the_promised_keys(run, nano_folder, pictures):
    argv = ["ask", pictures / "a.png", "What is this?", "--model", nano_folder, "--max-new-tokens", 4, "--json"]
    code, out, _ = run(*argv)
    answer = json.loads(out)
    assert code == 0 and set(answer) == {"answer", "tokens", "ms"}
    assert set(answer["tokens"]) == {"text", "visual", "kept"}
    assert set(answer["ms"]) == {"preprocess", "encode", "select", "prefill", "decode"}
    assert answer["tokens"]["kept"] == answer["tokens"]["visual"] > 0

    half = json.loads(run(*argv, "--reduce", "uniform(keep=0.5)")[1])
    assert half["tokens"]["kept"] == half["tokens"]["visual"] / 2
    recipe = json.loads(run(*argv, "--recipe", "uniform(keep=0.25) + int8")[1])
    assert recipe["tokens"]["kept"] == recipe["tokens"]["visual"] / 4
    chain = json.loads(run(*argv, "--reduce", "divprune(keep=0.5) + fastv(keep=0.5)")[1])
    assert chain["tokens"]["kept"] == chain["tokens"]["visual"] / 4
    none = json.loads(run(*argv, "--recipe", "uniform(keep=0.25) + int8", "--reduce", "none")[1])
    assert none["tokens"]["kept"] == none["tokens"]["visual"]


def test_ask_streams_the_same_text(run, nano_folder, pictures):
    argv = ["ask", pictures / "a.png", pictures / "b.jpg", "Which?", "--model", nano_folder, "--max-new-tokens", 6]
    code, out, err = run(*argv)
    assert code == 0 and "visual tokens" in err
    assert out.strip() == json.loads(run(*argv, "--json")[1])["answer"]


def test_ask_shows_what_stays(run, nano_folder, pictures, tmp_path):
    argv = ["ask", pictures / "a.png", "Which?", "--model", nano_folder, "--max-new-tokens", 1, "--show"]
    drawn = {}
    for reduce in ("uniform(keep=0.25)", "fastv(keep=0.25)", "uniform(keep=1.0)"):
        code, _, _ = run(*argv, tmp_path / f"{reduce}.png", "--reduce", reduce)
        assert code == 0
        with Image.open(tmp_path / f"{reduce}.png") as picture:
            drawn[reduce] = np.asarray(picture.convert("L"), float)
    whole = drawn.pop("uniform(keep=1.0)")
    for picture in drawn.values():  # most tokens are dropped, so most of the picture is veiled
        assert (picture != whole).mean() > 0.5


def test_ask_says_how_much_text_outweighs_the_picture(run, nano_folder, pictures):
    argv = ["ask", pictures / "a.png", "Which?", "--model", nano_folder, "--max-new-tokens", 2, "--dominance"]
    code, out, _ = run(*argv, "--json", "--reduce", "fastv(keep=0.25, layer=0.5)")
    layers = json.loads(out)["dominance"]
    assert code == 0 and [layer["layer"] for layer in layers] == list(range(len(layers)))
    assert layers[-1]["visual"] == round(layers[0]["visual"] * 0.25)
    for layer in layers:
        assert layer["mdi"] == pytest.approx(layer["aei_text"] / layer["aei_visual"])
    code, out, _ = run(*argv)
    assert code == 0 and "MDI" in out and "middle" in out


def test_ask_dry_run_runs_nothing(run, nano_folder, pictures, monkeypatch):
    from foveate.vlm import VLM

    monkeypatch.setattr(VLM, "_run", lambda *a, **k: pytest.fail("a dry run asked the model"))
    argv = ["ask", pictures / "a.png", "What is this?", "--model", nano_folder, "--dry-run"]
    code, out, _ = run(*argv)
    assert code == 0 and "visual" in out and "96 x 64" in out
    plan = json.loads(run(*argv, "--json")[1])
    assert plan["tokens"]["total"] == plan["tokens"]["text"] + plan["tokens"]["visual"]


# ---- chat


def test_chat_in_a_pipe(run, nano_folder, pictures, monkeypatch):
    lines = f"/image {pictures / 'a.png'}\nWhat is this?\nAnd now?\n/new\nHello\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = run("chat", "--model", nano_folder, "--max-new-tokens", 3, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "" and len(answers) == 3
    first, second, third = (answer["tokens"] for answer in answers)
    assert first["visual"] == second["visual"] > 0 == third["visual"]
    assert second["text"] > first["text"]  # the dialogue goes on


def test_chat_survives_a_bad_turn(run, nano_folder, pictures, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image nowhere.png\nWhat is this?\n"))
    code, out, err = run("chat", pictures / "b.jpg", "--model", nano_folder, "--max-new-tokens", 3)
    assert code == 2 and err == "foveate: no such picture or clip: 'nowhere.png'; check the path\n"
    assert out.endswith("\n")


# ---- eval


def test_eval_json_has_the_promised_keys(run, nano_folder, tmp_path):
    records = tmp_path / "records.jsonl"
    argv = ["eval", nano_folder, "--limit", 4, "--seed", 3, "--json", "--task", "world/colour"]
    code, out, _ = run(*argv, "--task", "world/count", "--records", records)
    result = json.loads(out)
    assert code == 0 and set(result) == {"model", "recipe", "tasks", "mean", "seconds"}
    assert list(result["tasks"]) == ["world/colour", "world/count"] and result["recipe"] is None
    for row in result["tasks"].values():
        assert {"n", "correct", "accuracy", "low", "high", "chance"} <= set(row)
        assert row["n"] == 4 and row["low"] <= row["accuracy"] <= row["high"] and row["skipped"] == 0
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(rows) == 8 and set(rows[0]) == {"task", "id", "answer", "prediction", "correct"}

    again = json.loads(run(*argv, "--reduce", "uniform(keep=0.5)")[1])
    assert again["recipe"] == "uniform(keep=0.5)"


def test_eval_prints_a_table(run, nano_folder):
    code, out, _ = run("eval", nano_folder, "--task", "world/shape", "--limit", 4)
    assert code == 0 and "world/shape" in out and "chance" in out and "95 % interval" in out and "mean" in out


def test_eval_reads_own_questions_and_counts_bad_ones(run, nano_folder, pictures, tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [
        {"image": str(pictures / "a.png"), "question": "Yes or no?", "answer": "yes"},
        {"image": str(pictures / "b.jpg"), "question": "Yes or no?", "answer": "no"},
        {"image": str(pictures / "b.jpg"), "question": "Yes or no, again?", "answer": "yes"},
        {"image": str(pictures / "gone.png"), "question": "Yes or no?", "answer": "no"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run("eval", nano_folder, "--data", data, "--json")
    row = json.loads(out)["tasks"]["data"]
    assert code == 0 and row["n"] == 3 and row["skipped"] == 1 and row["chance"] == pytest.approx(2 / 3)


# ---- plan, methods, bench


def test_plan_json_has_the_promised_keys(run):
    code, out, _ = run("plan", "nvila-8b", "--image", "1920x1080", "--json")
    plan = json.loads(out)
    assert code == 0 and {"tokens", "flops", "bytes", "ms"} <= set(plan)
    assert plan["tokens"]["visual"] == 3072 and plan["tokens"]["text"] == 65
    assert 14e9 < plan["bytes"]["weights"] < 17e9 and plan["ms"]["ttft"] > 0
    half = json.loads(run("plan", "nvila-8b", "--image", "1920x1080", "--recipe", "uniform(keep=0.5)", "--json")[1])
    assert half["tokens"]["kept"] == 1536 and half["flops"]["prefill"] < plan["flops"]["prefill"]


def test_plan_sees_weights_and_cache_methods(run):
    argv = ["plan", "nvila-8b", "--image", "448x448", "--json"]
    dense = json.loads(run(*argv)[1])
    small = json.loads(run(*argv, "--recipe", "rtn(bits=4) + int8")[1])
    assert small["bytes"]["weights"] < 0.5 * dense["bytes"]["weights"]
    assert 0.5 < small["bytes"]["kv"] / dense["bytes"]["kv"] < 0.6


def test_plan_agrees_with_the_real_plan(run, nano_folder, pictures):
    real = json.loads(run("ask", pictures / "a.png", "Hm?", "--model", nano_folder, "--max-new-tokens", 2, "--json")[1])
    planned = json.loads(run("plan", nano_folder, "--image", "96x64", "--json")[1])
    assert planned["tokens"]["visual"] == real["tokens"]["visual"]


def test_plan_as_text_and_its_mistakes(run):
    code, out, _ = run("plan", "nano", "--frames", 16)
    assert code == 0 and "prefill" in out and "FLOP" in out
    assert "h200" in run("plan", "--device", "list")[1]
    fails(run("plan", "nvila-9b"), "nvila-9b", "nvila-8b")
    fails(run("plan", "nano", "--image", "12"), "12", "1920x1080")
    fails(run("plan", "nano", "--device", "tpu"), "tpu", "h200")
    fails(run("plan", "nano", "--threads", 2), "--threads", "--calibrate")
    fails(run("plan", "nano", "--frame-size", "64x64"), "--frame-size", "--frames")
    fails(run("plan", "qwen2.5-vl-3b", "--frames", 2, "--frame-size", "30000x1"), "30000x1", "longer than")
    layers = "visual tokens by layer: 96 from layer 0, 24 from layer 2"
    assert layers in run("plan", "nano", "--image", "96x64", "--recipe", "fastv(keep=0.25, layer=2)")[1]


def test_plan_calibrates_this_machine_and_finds_it_again(run, monkeypatch, tmp_path, quick_calibration):
    from foveate.bench import calibrate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda **options: real("cpu", seconds=0.0, **options))
    fails(run("plan", "nano", "--device", "here"), "--calibrate")
    assert json.loads(run("plan", "nano", "--json")[1])["device"] == "h200"
    code, out, err = run("plan", "nano", "--calibrate", "--threads", 1, "--dtype", "float32", "--image", "96x64")
    assert code == 0 and "this machine" in out and "matrix products, bfloat16" in err and str(tmp_path) in err
    for device in ((), ("--device", "here"), ("--device", "this-machine")):
        assert json.loads(run("plan", "nano", *device, "--json")[1])["device"] == "this-machine"
    assert "with Python and its libraries" in run("plan", "nano")[1] and "note:" not in run("plan", "nano")[1]
    odd = run("plan", "nano", "--recipe", "rtn(bits=3)")[1]
    assert "note: what QuantizedLinear 3 takes was not measured here" in odd
    assert "this-machine" in run("plan", "--device", "list")[1]
    fails(run("plan", "nano", "--dtype", "float16"), "float16", "not measured")
    fails(run("plan", "nano", "--frames", "900"), "tokens", "nano takes")


def test_methods_json_has_the_promised_keys(run):
    code, out, _ = run("methods", "--json")
    rows = json.loads(out)
    assert code == 0 and {"random", "uniform", "fastervlm", "rtn", "int8"} <= {row["name"] for row in rows}
    for row in rows:
        assert {"name", "socket", "sites", "signals", "adapters", "status"} <= set(row)
        assert row["status"] in ("stable", "experimental")
    assert {row["socket"] for row in json.loads(run("methods", "--socket", "cache", "--json")[1])} == {"cache"}
    text = run("methods")[1]
    assert all(row["name"] in text and row["summary"] in text for row in rows)


def test_one_method_with_its_parameters_and_needs(run):
    row = json.loads(run("methods", "framefusion", "--json")[1])
    assert {"nvila", "llava", "qwen3_vl"} < set(row["families"]) and "llama" not in row["families"]
    assert [limit.split(":")[0].split(",")[0] for limit in row["limits"]] == [
        "made for clips",
        "how many tokens stay is known only when the request is seen",
        "keep is a fraction",
    ]
    code, out, _ = run("methods", "fastv")
    assert code == 0 and "last_attention" in out and "layer" in out and "0.0625" in out and "must be given" in out
    row = json.loads(run("methods", "rtn", "--json")[1])
    assert row["parameters"]["bits"] == 4 and row["parameters"]["parts"] == ["llm"] and row["socket"] == "weights"
    fails(run("methods", "fastw"), "fastw", "did you mean 'fastv'")


def test_bench_json_has_the_promised_keys(run, nano_folder, monkeypatch):
    from foveate.bench import breakeven, memory, requests, timing

    monkeypatch.setattr(timing, "busy_machine", lambda load, steal: False)
    real = requests.bench
    monkeypatch.setattr(requests, "bench", lambda *a, **k: real(*a, **k, min_seconds=0.0))
    crossed = breakeven.break_even
    monkeypatch.setattr(breakeven, "break_even", lambda *a, **k: crossed(*a, **k, min_seconds=0.0))
    monkeypatch.setattr(memory, "peak", lambda job: {"peak": 1e6 if job.recipe else 2e6})
    argv = ["bench", nano_folder, "--reduce", "uniform(keep=0.25)", "--pairs", 2, "--new-tokens", 2]
    code, out, _ = run(*argv, "--images", "96x64", "--memory", "--break-even", "--json")
    result = json.loads(out)
    assert result["memory"] == {"a": {"peak": 1e6}, "b": {"peak": 2e6}}
    crossing = result["break_even"]
    assert {"tokens", "low", "high", "points", "text"} <= set(crossing) and crossing["stages"] == ["select", "prefill"]
    assert code == 0 and {"device", "versions", "rows"} <= set(result)
    rows = {row["stage"]: row for row in result["rows"]}
    stages = {"decode_image", "preprocess", "tower", "select", "prefill", "decode"}
    assert set(rows) == stages | {"ttft", "total"}
    assert all({"ratio", "low", "high"} <= set(row) for row in rows.values())
    tokens = result["run"]["tokens"]
    assert tokens["a"]["kept"] == tokens["b"]["kept"] / 4 and result["run"]["recipe"] == "uniform(keep=0.25)"
    monkeypatch.setattr(requests, "bench", lambda *a, **k: result)
    code, out, _ = run(*argv)
    assert code == 0 and "A / B" in out and "2 pairs" in out
    monkeypatch.setattr(breakeven, "break_even", lambda *a, **k: crossing)
    code, out, _ = run(*argv, "--memory", "--break-even")
    assert code == 0 and crossing["text"] in out and "peak memory" in out and "2 MB" in out
    fails(run("bench", nano_folder, "--break-even"), "--break-even", "--reduce")
    given = []
    monkeypatch.setattr(requests, "bench", lambda *a, **k: given.append(k["recipe"].text()) or result)
    whole = [*argv, "--recipe", "fastervlm(keep=0.5) + kivi(bits=4)"]
    assert run(*whole)[0] == 0 and given == ["kivi(bits=4) + uniform(keep=0.25)"]  # in the place of the recipe's own
    fails(run(*argv[:2], "--reduce", "kivi(bits=4)"), "--reduce takes token reductions", "--recipe")
    fails(run("bench", nano_folder, "--memory", "--frames", 4), "--memory", "--frames")


# ---- world, convert, compress


def test_world_show_draws_a_sheet(run, tmp_path):
    from PIL import Image

    out = tmp_path / "sheets" / "sheet.png"
    code, text, _ = run("world", "show", "--out", out, "--n", 2, "--skill", "colour", "--skill", "needle")
    assert code == 0 and "2 skills" in text
    with Image.open(out) as sheet:
        assert min(sheet.size) > 200 and len(sheet.getcolors(1 << 20)) > 20
    assert [p.name for p in out.parent.iterdir()] == ["sheet.png"]
    fails(run("world", "show", "--out", tmp_path / "sheet.xyz"), "sheet.xyz", ".png")
    fails(run("world", "show", "--out", tmp_path / "x.png", "--skill", "color"), "color", "colour")


@pytest.mark.parametrize("form", ["plain", "llava", "openai", "webdataset"])
def test_world_write_gives_data_that_eval_reads(run, nano_folder, tmp_path, form):
    from foveate.data.formats import open_dataset

    out = tmp_path / "set"
    code, text, _ = run("world", "write", "--out", out, "--format", form, "--n", 3, "--skill", "colour", "--json")
    assert code == 0 and json.loads(text)["samples"] == 3
    assert len(list(open_dataset(out))) == 3
    fails(run("world", "write", "--out", out, "--n", 1), "already exists", "--out")


def test_world_write_writes_dense_scenes(run, tmp_path):
    from foveate.data.formats import open_dataset

    assert run("world", "write", "--out", tmp_path / "set", "--n", 4)[0] == 0
    assert len(list(open_dataset(tmp_path / "set"))) > 8


def test_convert_and_compress_write_all_or_nothing(run, nano_folder, tmp_path, pictures, monkeypatch):
    flat = tmp_path / "flat"
    code, out, _ = run("convert", nano_folder, flat, "--layout", "flat", "--json")
    assert code == 0 and "config.json" in json.loads(out)["files"]
    fails(run("convert", nano_folder, flat, "--layout", "three-folder"), "already exists")
    fails(run("convert", tmp_path / "gone", tmp_path / "x", "--layout", "flat"), "gone")

    small = tmp_path / "small"
    code, out, _ = run("compress", nano_folder, "--recipe", "uniform(keep=0.5) + rtn(bits=4)", "-o", small, "--json")
    effect = json.loads(out)
    llm = effect["weights"]["llm"]
    assert code == 0 and llm["after"] < llm["before"] and effect["tokens"]["after"] * 2 == effect["tokens"]["before"]
    answer = json.loads(run("ask", pictures / "a.png", "?", "--model", small, "--max-new-tokens", 2, "--json")[1])
    assert answer["tokens"]["kept"] == answer["tokens"]["visual"] / 2
    fails(run("compress", nano_folder, "--recipe", "rtn(bits=4)", "-o", small), "already exists")
    fails(run("compress", nano_folder, "--recipe", "rtn(bits=77)", "-o", tmp_path / "y"), "77")

    from foveate.vlm import VLM

    def broken(self, path):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(VLM, "save", broken)
    with pytest.raises(RuntimeError):
        main(["compress", str(nano_folder), "--recipe", "int8", "-o", str(tmp_path / "z")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "small"]


# ---- small things


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_file(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_file(tmp_path / "a.txt") as path:
        path.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="already exists"), new_folder(tmp_path / "a.txt"):
        pass


def test_numbers_and_bars_for_people():
    assert [human(n, "B") for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]
    assert human(1234567) == "1.23 M" and human(12) == "12"
    assert bar(0.5, width=4) == "██  " and bar(0, mark=0.5, width=4) == "  · " and bar(1, mark=0.5, width=4) == "██▌█"
