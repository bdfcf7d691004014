"""Recipes: what a file may say, and what an error about it says."""

from __future__ import annotations

import pytest
import yaml

from foveate.errors import RecipeError, UnknownNameError
from foveate.train.config import TrainRecipe, load_recipe, parse_recipe, shipped_recipes
from foveate.train.optimizer import lr_factor
from train_tiny import stage

STAGE = "{name: a, steps: 10, batch_size: 4, mixture: {world/scene: 1}}"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_survive_their_yaml_form(name: str) -> None:
    recipe = load_recipe(name)
    assert TrainRecipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.total_steps == sum(s.steps for s in recipe.stages)


def test_the_published_stages_have_the_papers_rates() -> None:
    stages = load_recipe("nvila-8b").stages
    assert [max(s.lr.values()) for s in stages] == [1e-3, 5e-5, 5e-5, 2e-5, 2e-5]
    assert {s.batch_size for s in stages} == {2048}
    assert [s.trained_parts() for s in stages[:3]] == [
        ("mm_projector",),
        ("vision_tower", "mm_projector"),
        ("mm_projector", "llm"),
    ]
    assert all(s.warmup_steps == round(0.03 * s.steps) for s in stages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"model: nano\nstagse: [{STAGE}]", ["'stagse'", "did you mean 'stages'"]),
        (
            "model: nano\nstages: [{name: a, steps: 10, batchsize: 3}]",
            ["stage 'a'", "'batchsize' (value 3)", "'batch_size'"],
        ),
        ("model: nano\nstages: [{name: a, steps: ten, batch_size: 3}]", ["steps", "'ten'", "whole number"]),
        ("model: nano\nstages: [{name: a, steps: 0, batch_size: 3}]", ["steps is 0", "at least 1"]),
        (f"model: nano\nprecision: fp8\nstages: [{STAGE}]", ["precision", "'fp8'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, optimizer: mion}}]", ["'mion'", "'muon'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, optimizer: muon}}]", ["adamw_lr"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, losses: {{lmm: 1}}}}]", ["'lmm'", "'lm'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, train: [vision_towr]}}]", ["'vision_towr'", "'vision_tower'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, train: llm, losses: {{dense: 1}}}}]", ["'heads'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, lr: {{llm: 1.0e-3}}}}]", ["'vision_tower'"]),
        (f"model: nano\nstages: [{STAGE[:-1]}, low_resolution: 2}}]", ["low_resolution is 2", "0 to 1"]),
        (f"model: nano\nstages: [{STAGE}, {STAGE}]", ["two stages", "'a'"]),
        (f"stages: [{STAGE}]", ["'model' is missing"]),
        ("model: nano", ["stages"]),
        ("a: [", ["not YAML"]),
    ],
)
def test_a_mistake_names_key_value_and_the_way_out(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nano'"):
        load_recipe("nanno")


def test_numbers_in_exponent_form_are_numbers() -> None:
    recipe = parse_recipe(f"model: nano\nstages: [{STAGE[:-1]}, lr: 1e-3}}]")
    assert recipe.stages[0].lr == {"*": 1e-3}


def test_scaling_keeps_the_shape_of_every_stage() -> None:
    recipe = load_recipe("nano")
    half = recipe.scaled(0.5)
    assert [s.steps for s in half.stages] == [round(s.steps / 2) for s in recipe.stages]
    assert recipe.scaled(1e-9).total_steps == len(recipe.stages)
    assert half.hash() != recipe.hash()


def test_rates_by_part_and_schedule() -> None:
    one = stage(steps=10, optimizer="muon", lr={"vision_tower": 0.01, "*": 0.02}, adamw_lr=0.004, warmup_steps=2)
    assert one.part_lr("vision_tower") == 0.01 and one.part_lr("llm") == 0.02
    assert one.part_adamw_lr("vision_tower") == pytest.approx(0.002) and one.part_adamw_lr("llm") == 0.004
    assert [lr_factor(one, s) for s in (0, 1, 9)] == [0.5, 1.0, 1.0]
    falling = stage(steps=10, schedule="linear", decay_fraction=0.5, final_lr_ratio=0.1)
    assert [round(lr_factor(falling, s), 3) for s in (0, 5, 7, 9)] == [1.0, 1.0, 0.64, 0.28]
    assert lr_factor(stage(steps=100, schedule="cosine"), 50) == pytest.approx(0.5)
