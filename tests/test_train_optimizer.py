"""Which optimizer trains what."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import RecipeError
from foveate.train.optimizer import StageOptimizer, select_trainable, takes_muon
from train_tiny import stage, tiny_model


def groups(optimizer: torch.optim.Optimizer, model) -> dict[str, float]:
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = tiny_model()
    one = stage(optimizer="muon", lr={"vision_tower": 0.01, "*": 0.02}, adamw_lr=0.004, weight_decay=0.1)
    both = StageOptimizer(select_trainable(model.named_parameters(), one), one)
    muon, adamw = both.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    rates, others = groups(muon, model), groups(adamw, model)
    assert rates.keys().isdisjoint(others) and len(rates) + len(others) == len(list(model.parameters()))
    assert all(dict(model.named_parameters())[n].ndim == 2 for n in rates)
    assert {n.split(".")[0] for n in rates} == {"vision_tower", "mm_projector", "llm"}
    by_end = ("embed_tokens.weight", "lm_head.weight", "patch_embedding.weight", "position_embedding.weight", ".bias")
    assert all(not n.endswith(by_end) for n in rates)
    assert rates["vision_tower.encoder.layers.0.mlp.fc1.weight"] == 0.01
    assert rates["llm.model.layers.1.mlp.up_proj.weight"] == 0.02
    assert others["vision_tower.embeddings.patch_embedding.weight"] == pytest.approx(0.002)
    assert others["llm.lm_head.weight"] == pytest.approx(0.004)
    decays = {n: g["weight_decay"] for g in adamw.param_groups for p in g["params"] for n in [both._names[p]]}
    assert decays["llm.lm_head.weight"] == 0.1 and decays["llm.model.norm.weight"] == 0.0
    assert decays["llm.model.embed_tokens.weight"] == 0.0


def test_one_muon_step_moves_along_the_orthogonalised_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    one = stage(optimizer="muon", lr={"*": 0.1}, adamw_lr=0.1, clip_norm=0)
    optimizer = StageOptimizer([("mm_projector.layers.2.weight", weight)], one)
    weight.grad = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) * 100
    optimizer.step(0)
    lengths = torch.linalg.svdvals(weight.detach()) / 0.1
    # 5 Newton-Schulz steps bring singular values near 1, times sqrt(rows / columns) = 2
    assert ((lengths > 1.2) & (lengths < 2.6)).all()


def test_frozen_parts_get_no_gradient() -> None:
    model = tiny_model()
    named = select_trainable(model.named_parameters(), stage(train=("mm_projector",)))
    assert {n.split(".")[0] for n, _ in named} == {"mm_projector"}
    assert not model.llm.lm_head.weight.requires_grad
    with pytest.raises(RecipeError, match="trains nothing"):
        select_trainable(model.named_parameters(), stage(train=("heads",)))


def test_positions_and_tables_stay_with_adamw() -> None:
    assert not takes_muon("mm_projector.position.rows", torch.zeros(8, 4))
    assert takes_muon("mm_projector.layers.2.weight", torch.zeros(8, 4))
    assert not takes_muon("mm_projector.layers.2.bias", torch.zeros(8))
    assert not takes_muon("llm.lm_head.weight", torch.zeros(8, 4))


def test_state_survives_by_name() -> None:
    def run(optimizer: StageOptimizer, weight: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.full_like(weight, 0.5) * (step + 1)
            optimizer.step(step)

    one = stage(lr={"*": 0.1}, steps=4, schedule="linear")
    whole, halves = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = StageOptimizer([("llm.model.norm.weight", whole)], one)
    run(optimizer, whole, range(4))
    first = StageOptimizer([("llm.model.norm.weight", halves)], one)
    run(first, halves, range(2))
    second = StageOptimizer([("llm.model.norm.weight", halves)], one)
    second.load_state_tensors(first.state_tensors())
    run(second, halves, range(2, 4))
    assert torch.equal(whole, halves)
