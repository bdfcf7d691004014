"""Scorers against the outputs of the official tools (`-k "golden and infer"`)."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.tasks import choices as mcq
from foveate.tasks import openended, strings, vqa, yesno
from goldens_io import goldens_dir, read_json


def load(name: str) -> Any:
    return read_json(goldens_dir("infer"), f"{name}.json")


VQA_FORMS = {
    "lmms_full": vqa.normalise_textvqa,
    "m4c_full": vqa.normalise_textvqa,
    "lmms_vqav2": vqa.normalise_vqav2,
    "vlmevalkit": vqa.normalise_vlmevalkit,
}
VQA_SCORES = {
    "lmms_textvqa": vqa.vqa_accuracy,
    "m4c_textvqa": vqa.vqa_accuracy,
    "lmms_vqav2": vqa.vqa_accuracy_v2,
    "vlmevalkit_vqa_score": vqa.vqa_accuracy_vlmevalkit,
}


def test_golden_infer_vqa_accuracy():
    golden = load("vqa_accuracy")
    for row in golden["normalise"]:
        found = {key: form(row["input"]) for key, form in VQA_FORMS.items()}
        assert found == {key: row[key] for key in VQA_FORMS}, row["input"]
    for case in golden["cases"]:
        for key, scorer in VQA_SCORES.items():
            if case[key] is not None:  # M4C scores questions with exactly ten answers only
                before = list(case["answers"])
                assert scorer(case["prediction"], case["answers"]) == pytest.approx(case[key], abs=1e-9), case
                assert case["answers"] == before
    assert golden["normalise"] and golden["cases"]


def test_golden_infer_anls():
    golden = load("anls")
    for case in golden["cases"]:
        score = strings.anls(case["prediction"], case["references"])
        assert score == pytest.approx(case["lmms_eval"], abs=1e-9), case
        assert score == pytest.approx(case["vlmevalkit"], abs=1e-9), case
        distances = [strings.normalised_distance(case["prediction"], answer) for answer in case["references"]]
        assert distances == pytest.approx(case["vlmevalkit_nl"], abs=1e-9), case
    for first, second, edits in golden["levenshtein"]:
        assert strings.levenshtein(first, second) == strings.levenshtein(second, first) == edits
    assert golden["cases"] and golden["levenshtein"]


def test_golden_infer_relaxed_accuracy():
    golden = load("relaxed_accuracy")
    for case in golden["cases"]:
        prediction, target = case["prediction"], case["target"]
        assert strings.relaxed_accuracy(prediction, [target]) == case["lmms_eval"], case
        assert strings.relaxed_match(prediction, target) is case["vlmevalkit_fn"], case
        try:
            line: Any = bool(strings.relaxed_accuracy_vlmevalkit(prediction, [target]))
        except Exception as error:
            line = f"EXC:{type(error).__name__}"
        assert line == case["vlmevalkit_line"], case
    assert golden["cases"]


def test_golden_infer_mcq_parsing():
    golden = load("mcq_parsing")
    options: dict[str, str] = golden["options"]

    def or_false(letter: str) -> str | bool:
        return letter or False

    for case in golden["cases"]:
        text = case["response"]
        official, lmms = mcq.parse_mmmu(text, options), mcq.parse_mmmu(text, options, lmms=True)
        found = {
            "mmmu": official or None,
            "mmmu_random_fallback": not official,
            "lmms_mmmu": lmms or None,
            "lmms_mmmu_random_fallback": not lmms,
            "lmms_mcq_extract": mcq.extract_lmms(text, options),
            "vlmevalkit_option": or_false(mcq.infer_option(text, options)),
            "vlmevalkit_can_infer": or_false(mcq.infer(text, options)),
            "vlmevalkit_regex_videomme": mcq.extract_videomme(text),
            "lmms_mmbench_can_infer": or_false(mcq.infer_mmbench(text, options)),
            **{
                key: mcq.mcq_scienceqa(text, [key.rpartition("_")[2]], options)
                for key in case
                if key.startswith("scienceqa_lmms_if_gold_")
            },
        }
        assert found == {key: value for key, value in case.items() if key != "response"}, text
    assert golden["cases"]


def test_golden_infer_pope():
    golden = load("pope")
    responses, labels = golden["responses"], golden["labels"]
    found = yesno.pope_metrics(responses, labels)
    assert [int(yesno.official_answer(text) == "yes") for text in responses] == golden["official"]["pred_list"]
    assert [int(label == "yes") for label in labels] == golden["official"]["label_list"]
    for key, value in found.items():
        assert value == pytest.approx(golden["official"][key]), key
    for key, value in yesno.pope_metrics_lmms(responses, labels).items():
        assert value == pytest.approx(golden["lmms_eval"][key]), key
    per_item = [yesno.pope_lmms(text, [label]) for text, label in zip(responses, labels)]
    assert per_item == golden["lmms_eval"]["per_item"]
    assert [yesno.extract_vlmevalkit(text) for text in responses] == golden["vlmevalkit_extract"]
    official = [yesno.pope(text, [label]) for text, label in zip(responses, labels)]
    assert sum(official) / len(official) == pytest.approx(golden["official"]["accuracy"])


def test_golden_infer_mmmu_open():
    golden = load("mmmu_open")
    for case in golden["parse"]:
        assert openended.parse_open(case["response"]) == set(case["parsed"]), case
        assert openended.numbers(case["response"]) == case["numbers"], case
        assert openended.normalise_open(case["response"]) == case["normalized"], case
    for case in golden["eval"]:
        gold = [case["gold"]] if isinstance(case["gold"], str) else case["gold"]
        assert openended.mmmu_open(case["response"], gold) == case["correct"], case
    assert golden["parse"] and golden["eval"]


def test_golden_infer_ocrbench():
    golden = load("ocrbench")
    for case in golden["cases"]:
        scorer = strings.ocrbench_hme if case["dataset"] == "HME100k" else strings.ocrbench
        answers = [case["answer"]] if isinstance(case["answer"], str) else case["answer"]
        assert scorer(case["prediction"], answers) == case["score"], case
    assert golden["cases"]
