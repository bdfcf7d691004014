"""Recipes: one line, YAML and JSON are the same thing; errors point at the column; models change only as they say."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.cache.int8 import Int8Cache
from foveate.effect import effect
from foveate.errors import FoveateError, RecipeError
from foveate.recipe import Recipe
from foveate.reduce.fastervlm import FasterVLM
from foveate.reduce.random import Random
from foveate.reduce.uniform import Uniform
from foveate.weights.rtn import RTN
from goldens_io import goldens_dir

PICTURE = np.random.default_rng(4).integers(0, 256, (90, 120, 3), dtype=np.uint8)
KEEP = st.one_of(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True))
METHOD = st.one_of(
    st.builds(Random, keep=KEEP, seed=st.integers(-(2**40), 2**40)),
    st.builds(Uniform, keep=KEEP),
    st.builds(FasterVLM, keep=KEEP),
    st.builds(Int8Cache),
    st.builds(
        RTN,
        parts=st.lists(st.sampled_from(["llm", "vision_tower", "mm_projector"]), min_size=1, unique=True).map(tuple),
        bits=st.sampled_from([2, 3, 4, 8]),
        group=st.integers(0, 4096),
        symmetric=st.booleans(),
    ),
)


@pytest.fixture(scope="module")
def tiny():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@given(st.lists(METHOD, max_size=4))
@settings(max_examples=100, deadline=None)
def test_text_json_and_yaml_are_the_same_recipe(methods):
    recipe = Recipe(tuple(methods))
    assert Recipe.parse(recipe.text()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(recipe.text()) == recipe
    assert Recipe.parse(recipe.text()).text() == recipe.text()


def test_forms_that_people_write():
    expected = Recipe((Uniform(keep=0.5), RTN(bits=8), Int8Cache()))
    for text in (
        "uniform(keep=0.5)+rtn(bits=8)+int8",
        "  uniform ( keep = .5 ) + rtn ( bits = 8 , ) + int8()",
        "uniform(keep=5e-1) + rtn(bits=8, parts=[llm]) + int8",
        "uniform(keep=0.5) + rtn(bits=8, parts=['llm']) + int8",
        'uniform(keep=0.5) + rtn(bits=8, parts="llm", symmetric=False) + int8',
    ):
        assert Recipe.parse(text) == expected, text
    file = "methods:\n  - uniform: {keep: 0.5}\n  - rtn(bits=8)\n  - name: int8\n"
    assert Recipe.from_dict(yaml.safe_load(file)) == expected
    assert not Recipe.parse("") and not Recipe.parse(" none ") and Recipe().text() == ""
    assert len(expected) == 3 and expected.of("reduce") == (Uniform(keep=0.5),)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("unifrom(keep=0.5)", 1, "did you mean 'uniform'"),
        ("int8 + rtm(bits=4)", 8, "did you mean 'rtn'"),
        ("uniform(kep=0.5)", 9, "did you mean 'keep'"),
        ("int8(bits=4)", 6, "it takes none"),
        ("uniform(keep=0.5, keep=0.1)", 19, "given twice"),
        ("uniform(keep=0.5", 17, "found the end"),
        ("uniform(keep 0.5)", 14, "'=' after 'keep'"),
        ("uniform(keep=)", 14, "a value is expected, found '\\)'"),
        ("uniform(keep=0.5) rtn", 19, "found 'rtn'"),
        ("int8 + ", 8, "name of a method"),
        ("+ int8", 1, "name of a method"),
        ("int8 & rtn", 6, "'&' is not expected"),
        ("uniform", 1, "needs keep"),
        ("int8 + uniform(keep=1.5)", 8, "at most 1.0"),
        ("uniform(keep=half)", 1, "keep is 'half'; it must be a number or an integer"),
        ("rtn(bits=5)", 1, "bits is 5; it must be 2 or 3 or 4 or 8"),
        ("rtn(bits=4.0)", 1, r"bits is 4\.0"),
        ("rtn(parts=[llm, tower])", 1, "vision_tower"),
        ("rtn(group=-1)", 1, "group is -1"),
        ("rtn(symmetric=1)", 1, "true or false"),
    ],
)
def test_errors_point_at_the_column(text, column, words):
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.parse(text)
    assert f"column {column}:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [3, {"x": 1}, [3], [{}], [{"uniform": 3}], [{"name": 3}], {"methods": 3}])
def test_files_that_hold_something_else_are_refused(data):
    with pytest.raises(RecipeError):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uniform(keep=0.5) + random(keep=0.5)", "post_projector"),
        ("int8 + int8", "both caches"),
        ("rtn(bits=8, group=16) + rtn(bits=4, group=16)", "storage of llm"),
        ("rtn(group=16) + rtn(group=16, parts=[mm_projector, llm])", "storage of llm"),
    ],
)
def test_methods_that_contradict_each_other_are_refused(tiny, text, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(text).apply(tiny, quiet=True)


def test_reducers_stand_in_the_order_of_their_sites(tiny):
    with pytest.raises(RecipeError, match="write uniform first"):
        Recipe.parse("fastv(keep=0.5) + uniform(keep=0.5)").check(tiny)
    with pytest.raises(RecipeError, match="both reduce at layer 1 of site llm"):
        Recipe.parse("fastv(keep=0.5, layer=1) + fastv(keep=0.25, layer=1)").check(tiny)
    Recipe.parse("uniform(keep=0.5) + fastv(keep=0.5, layer=1) + fastv(keep=0.25, layer=2)").check(tiny)


def test_a_recipe_on_top_of_another_is_checked_against_it(tiny):
    first = Recipe.parse("rtn(group=16)").apply(tiny, quiet=True)
    with pytest.raises(RecipeError, match="storage of llm"):
        Recipe.parse("rtn(bits=8, group=16)").apply(first, quiet=True)
    second = Recipe.parse("rtn(bits=8, group=16, parts=[vision_tower]) + uniform(keep=0.5)").apply(first, quiet=True)
    assert second.recipe == first.recipe + Recipe.parse(
        "rtn(bits=8, group=16, parts=[vision_tower]) + uniform(keep=0.5)"
    )
    assert not tiny.recipe and len(first.recipe) == 1


def test_the_effect_is_measured_and_printed(tiny, capsys):
    small = Recipe.parse("uniform(keep=0.5) + rtn(bits=4, group=16) + int8").apply(tiny)
    said = capsys.readouterr()
    assert said.out == "" and "weights" in said.err and "bytes per token" in said.err and "-> 24" in said.err
    found = effect(tiny, small).to_dict()
    assert found["tokens"] == {"before": 48, "after": 24}
    assert found["weights"]["vision_tower"]["before"] == found["weights"]["vision_tower"]["after"]
    assert found["weights"]["llm"]["after"] < found["weights"]["llm"]["before"]
    width, layers, heads = 12, 3, 2
    assert found["cache"] == {"before": 2 * layers * heads * width * 4, "after": 2 * layers * heads * (width + 2)}
    assert json.loads(json.dumps(found)) == found
    assert small.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"] == 24
    Recipe.parse("int8").apply(tiny, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_reducers_and_caches_share_the_model(tiny):
    other = Recipe.parse("uniform(keep=0.5) + int8").apply(tiny, quiet=True)
    assert other.model is tiny.model
    assert type(other.new_cache().layers[0]).__name__ == "PackedLayer"
    assert type(tiny.new_cache().layers[0]).__name__ == "DynamicLayer"
    assert tiny.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"] == 48


def test_a_recipe_is_in_the_checkpoint(tiny, tmp_path):
    recipe = Recipe.parse("fastervlm(keep=0.25) + int8")
    recipe.apply(tiny, quiet=True).save(tmp_path / "quick")
    stored = json.loads((tmp_path / "quick" / "recipe.json").read_text())
    assert stored["recipe"] == recipe.text() and Recipe.from_dict(stored) == recipe
    again = foveate.load(tmp_path / "quick", device="cpu")
    assert again.recipe == recipe
    assert again.ask(PICTURE, "what?", max_new_tokens=2).tokens["kept"] == 12


def test_every_method_is_listed_with_its_needs():
    rows = {row["name"]: row for row in foveate.methods()}
    assert {"random", "uniform", "fastervlm", "rtn", "int8"} <= set(rows)
    for row in rows.values():
        assert set(row) == {"name", "socket", "sites", "signals", "adapters", "status", "summary"}
        assert row["socket"] in ("reduce", "cache", "weights", "decode") and row["summary"]
        assert row["status"] in ("stable", "experimental")
    assert json.loads(json.dumps(list(rows.values())))


def test_methods_are_found_in_the_package_by_their_names(tiny):
    with foveate.fastv(keep=0.25, layer=1).attach(tiny):
        assert [method.text() for method in tiny.reducers()] == ["fastv(keep=0.25, layer=1)"]
    assert foveate.int8 is Int8Cache
    with pytest.raises(AttributeError, match="no attribute 'fastw'"):
        foveate.fastw  # noqa: B018


def test_parsing_names_needs_no_torch():
    code = "import sys; from foveate.recipe import Recipe; Recipe.parse('none'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_weights_method_that_fails_leaves_no_half_model(tiny):
    before = {name: type(module) for name, module in tiny.model.named_modules()}
    with pytest.raises(FoveateError, match="group=7"):
        Recipe.parse("uniform(keep=0.5) + rtn(group=7)").apply(tiny, quiet=True)
    assert {name: type(module) for name, module in tiny.model.named_modules()} == before
