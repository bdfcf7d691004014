"""Mistakes at the command line: one line with the value, the limit and the way out, code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from cli_calls import fails


def test_ask_show_needs_a_picture_file(run, nano_folder, pictures, tmp_path):
    argv = ["ask", pictures / "a.png", "Which?", "--model", nano_folder, "--max-new-tokens", 1, "--show"]
    fails(run(*argv, tmp_path / "plain"), "no suffix", ".png")
    fails(run(*argv, tmp_path / "x.pngg"), ".pngg", ".png")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_ask_are_one_line(run, nano_folder, pictures, tmp_path):
    model = ("--model", nano_folder)
    picture = pictures / "a.png"
    fails(run("ask", "nowhere.png", "What?", *model), "no such picture", "nowhere.png")
    fails(run("ask", picture, *model), "no question given", "a.png")
    fails(run("ask", "only.png", *model), "no question given", "only.png")
    fails(run("ask", "What is this?", *model), "no picture or clip")
    fails(run("ask", picture, " ", *model), "question is empty")
    fails(run("ask", "https://example.org/a.png", "What?", *model), "local files only")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:100])
    fails(run("ask", broken, "What?", *model), "broken.png")
    (tmp_path / "text.png").write_text("no picture")
    fails(run("ask", tmp_path / "text.png", "What?", *model), "text.png")
    fails(run("ask", picture, "What?", "--model", "nanoo"), "nanoo", "nano")
    fails(run("ask", picture, "What?", "--model", tmp_path), str(tmp_path))
    fails(run("ask", picture, "What?", *model, "--recipe", "unifrm(keep=0.5)"), "unifrm", "uniform")
    fails(run("ask", picture, "What?", *model, "--reduce", "int8"), "int8", "--recipe")
    fails(run("ask", picture, "What?", *model, "--max-new-tokens", "100000"), "100000", "tokens")


def test_mistakes_of_eval_are_one_line(run, nano_folder, tmp_path):
    fails(run("eval", nano_folder, "--task", "world/color"), "world/color", "world/colour")
    fails(run("eval", nano_folder, "--task", "colour"), "did you mean 'world/colour'")
    fails(run("eval", nano_folder, "--task", "data"), "--data")
    fails(run("eval", nano_folder, "--data", tmp_path / "gone.jsonl"), "gone.jsonl", "does not exist")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    fails(run("eval", nano_folder, "--data", empty), "empty.jsonl")
    fails(run("eval", "no-such-model", "--task", "world/colour"), "no-such-model")


def test_attention_backends_that_there_are_not(run, nano_folder, pictures):
    argv = ("ask", pictures / "a.png", "What?", "--model", nano_folder, "--attn")
    fails(run(*argv, "sdpaa"), "sdpaa", "sdpa or eager")
    fails(run(*argv, "flash_attention_2"), "flash_attention_2", "sdpa or eager")


def test_a_config_with_a_value_of_the_wrong_type(run, nano_folder, pictures, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(nano_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    fails(run("ask", pictures / "a.png", "What?", "--model", folder), "config.json", "hidden_size", "wide")


def test_weights_that_are_not_numbers_give_no_answer(run, nano_folder, pictures, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(nano_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(run("ask", pictures / "a.png", "What?", "--model", folder), "not numbers", "--dtype float32")
    fails(run("eval", folder, "--task", "world/colour", "--limit", 2), "not numbers")


def test_recipe_files_and_empty_recipes(run, nano_folder, pictures, tmp_path):
    argv = ("ask", pictures / "a.png", "What?", "--model", nano_folder, "--recipe")
    fails(run(*argv, tmp_path / "gone.yaml"), "no recipe file", "gone.yaml")
    fails(run("compress", nano_folder, "--recipe", "", "-o", tmp_path / "x"), "--recipe is empty")
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_cannot_go_on_leaves_nothing(run, nano_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "gone.png", "question": "q", "answer": "a"}\n')
    argv = ("compress", nano_folder, "--recipe", "wanda(sparsity=0.5)", "--samples", 1, "-o", tmp_path / "x", "--calib")
    fails(run(*argv, rows), "rows.jsonl", "no usable sample")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bad_rows_are_counted_and_named(run, nano_folder, pictures, tmp_path):
    rows = tmp_path / "mine.jsonl"
    good = json.dumps({"image": str(pictures / "a.png"), "question": "Yes or no?", "answer": "yes"})
    bad = json.dumps({"image": "gone.png", "question": "Yes or no?", "answer": "yes"})
    rows.write_text(f"{good}\n{bad}\nno json\n")
    code, out, _ = run("eval", nano_folder, "--data", rows)
    assert code == 0 and "skipped 2 bad samples of data" in out
    assert "mine.jsonl:2" in out and "gone.png" in out and "mine.jsonl:3" in out
    row = json.loads(run("eval", nano_folder, "--data", rows, "--json")[1])["tasks"]["data"]
    assert row["skipped"] == 2 and set(row["reasons"]) == {"mine.jsonl:2", "mine.jsonl:3"}
    rows.write_text(bad)
    fails(run("eval", nano_folder, "--data", rows), "no usable question", "mine.jsonl:1", "gone.png")


def test_convert_takes_names_and_refuses_changed_weights(run, nano_folder, tmp_path):
    fails(run("convert", "nanoo", tmp_path / "x", "--layout", "flat"), "nanoo", "did you mean 'nano'")
    small = tmp_path / "small"
    assert run("compress", nano_folder, "--recipe", "rtn(bits=4)", "-o", small)[0] == 0
    fails(run("convert", small, tmp_path / "x", "--layout", "flat"), "rtn(bits=4", "convert the model it was made from")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_training_goes_into_folders_of_its_own(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    fails(run("train", "nano", "--output", tmp_path), "thesis.tex", "new folder")
    fails(run("train", "nano", "--output", tmp_path / "thesis.tex"), "thesis.tex", "is a file")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    fails(run("train", tmp_path / "latin.yaml"), "latin.yaml", "cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.yaml", "thesis.tex"]
