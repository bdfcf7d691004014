"""Where samples come from: deterministic, resumable, and honest about what it skips."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import InputError, RecipeError
from foveate.train.batch import StepData, prefetch
from foveate.train.sources import ListSource, Mixture, open_mixture
from foveate.train.tokenizer import SPECIAL_TOKENS, build_tokenizer, train_tokenizer
from train_tiny import TEXTS, noise_sample, tokenizer


class Numbers:
    """A source of numbers; multiples of `bad` cannot be used."""

    def __init__(self, name: str, bad: int = 0) -> None:
        self.name, self.bad = name, bad

    def sample(self, index: int):
        if self.bad and index % self.bad == 0:
            raise InputError(f"{index} is bad")
        return f"{self.name}{index}"


def keep(sample, rng) -> tuple[str, int]:
    return sample, int(rng.integers(1 << 30))


def test_the_next_samples_depend_on_step_and_counters_only() -> None:
    def mixture() -> Mixture:
        return Mixture({Numbers("a"): 3.0, Numbers("b"): 1.0}, seed=5, stage=1)

    whole = mixture()
    steps = [whole.take(step, 6, keep) for step in range(20)]
    names = [name[0] for step in steps for name, _ in step]
    assert 0.6 < names.count("a") / len(names) < 0.9
    half = mixture()
    for step in range(7):
        half.take(step, 6, keep)
    resumed = mixture()
    resumed.restore({"counters": half.counters, "skipped": {}})
    assert [resumed.take(step, 6, keep) for step in range(7, 20)] == steps[7:]
    other = Mixture({Numbers("a"): 3.0, Numbers("b"): 1.0}, seed=6, stage=1)
    assert [other.take(step, 6, keep) for step in range(20)] != steps


def test_stages_draw_different_samples() -> None:
    first, second = (Mixture({Numbers("a"): 1.0}, seed=0, stage=s).take(0, 4, keep) for s in (0, 1))
    assert not {name for name, _ in first} & {name for name, _ in second}


def test_a_bad_sample_is_counted_and_the_next_takes_its_place() -> None:
    mixture = Mixture({Numbers("a", bad=2): 1.0}, seed=0, stage=0)
    assert len(mixture.take(0, 4, keep)) == 4
    assert mixture.skipped == {"a": 4} and mixture.reasons[0] == "a: 0 is bad"
    with pytest.raises(InputError, match="100 samples in a row"):
        Mixture({Numbers("a", bad=1): 1.0}, seed=0, stage=0).take(0, 1, keep)


def test_a_finite_set_gives_every_sample_once_an_epoch_in_changing_order() -> None:
    samples = [noise_sample(i) for i in range(7)]
    source = ListSource("x", samples, seed=3)
    epochs = [[source.sample(e * 7 + i).id for i in range(7)] for e in range(3)]
    assert all(sorted(e) == sorted(s.id for s in samples) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = ListSource("x", samples, seed=3)
    assert [again.sample(14 + i).id for i in range(7)] == epochs[2]


def test_sources_by_name(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    with pytest.raises(RecipeError, match=r"world/scne.*known"):
        open_mixture({"world/scne": 1.0}, seed=0, stage=0)
    with pytest.raises(RecipeError, match="neither a name nor a file"):
        open_mixture({"no/such": 1.0}, seed=0, stage=0)
    with pytest.raises(RecipeError, match="--data"):
        open_mixture({"nlvr": 1.0}, seed=0, stage=0)
    opened: dict = {}
    for stage in range(2):
        mixture = open_mixture({"world/scene": 1.0, "nlvr?": 1.0}, seed=0, stage=stage, cache=opened)
    assert len(caplog.messages) == 1 and "optional source left out" in caplog.text
    assert list(mixture.counters) == ["world/scene"]
    assert {"world/scene"} == {s.name for s in mixture.sources}


def test_prefetched_steps_are_in_order_and_errors_reach_the_loop() -> None:
    def make(step: int) -> StepData:
        if step == 3:
            raise InputError("broken at 3")
        return StepData(step, [], {"a": step}, {})

    seen = []
    with pytest.raises(InputError, match="broken at 3"), prefetch(make, range(6)) as batches:
        seen += [data.step for data in batches]
    with prefetch(make, range(2)) as batches:
        seen = [data.step for data in batches]
    assert seen == [0, 1]


def test_the_prefetcher_stops_when_the_loop_does() -> None:
    made = []

    def make(step: int) -> StepData:
        made.append(step)
        return StepData(step, [], {}, {})

    with prefetch(make, range(10**6), depth=2) as batches:
        next(batches)
    assert len(made) <= 5


def test_the_tokenizer_reads_characters_one_by_one() -> None:
    small = tokenizer()
    assert small.tokenize("read A12\nB")[-5:] == ["A", "1", "2", "Ċ", "B"]
    assert len(small("\n", add_special_tokens=False).input_ids) == 1
    assert small.eos_token == "<|end|>" and set(SPECIAL_TOKENS) <= set(small.get_vocab())
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    assert small.apply_chat_template(turns, tokenize=False) == "<|system|>s<|user|>u<|assistant|>a<|end|>"
    text = "Grüße 7?\n ok  x"
    assert small.decode(small(text, add_special_tokens=False).input_ids) == text


def test_tokenizers_of_the_same_text_are_the_same() -> None:
    one, other = (train_tokenizer(TEXTS * 3, 300).backend_tokenizer.to_str() for _ in range(2))
    assert one == other
    drawn = build_tokenizer(scenes_per_kind=2, vocab_size=400)
    assert len(drawn) <= 400 and " colour" in drawn.decode(drawn(" colour").input_ids)


def test_branches_are_drawn_by_the_weights_of_their_skills() -> None:
    from foveate.train.batch import BatchMaker
    from train_tiny import stage, tiny_model

    sample = noise_sample(1, 4)
    sample.meta["skills"] = ["a", "b", "a", "b"]
    one = stage(questions_per_sample=2, skills={"a": 50.0})
    maker = BatchMaker(one, tiny_model().spec, tokenizer(), None)  # type: ignore[arg-type]
    picks = [maker._choose(sample, np.random.default_rng(i)) for i in range(200)]
    assert all(len(set(p)) == 2 for p in picks)
    assert sum(i % 2 == 0 for p in picks for i in p) > 350
