"""The façade: one path to an answer, batches equal to single requests, files, and errors."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

import foveate.vlm
from foveate.errors import BudgetError, CheckpointError, FoveateError, InputError, UnknownNameError, UnsupportedError
from foveate.reduce.uniform import Uniform
from foveate.runtime import Clock, TextStream, open_batch
from foveate.vlm import VLM, Request
from goldens_io import goldens_dir

FAMILIES = ("nvila", "lite", "video")
RNG = np.random.default_rng(0)
PICTURE, OTHER = (RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8) for _ in range(2))
CLIP = RNG.integers(0, 256, (7, 60, 60, 3), dtype=np.uint8)
MEDIA = {"picture": PICTURE, "two": [PICTURE, OTHER], "clip": CLIP, "text": None}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    return foveate.load(goldens_dir("nvila") / request.param / "ckpt", device="cpu")


@pytest.fixture(scope="module")
def nvila():
    return foveate.load(goldens_dir("nvila") / "nvila" / "ckpt", device="cpu")


@pytest.mark.parametrize("media", MEDIA)
def test_ask_gives_the_tokens_of_generate(tiny, media):
    plan = tiny.plan(Request("what?", MEDIA[media]).to_messages())
    with torch.inference_mode():
        out = tiny.model.generate(**tiny.prepare(plan).model_kwargs(), max_new_tokens=6, do_sample=False)
    found = out[0, -6:].tolist() if out.shape[1] > plan.num_tokens else out[0].tolist()
    answer = tiny.ask(MEDIA[media], "what?", max_new_tokens=6)
    assert answer.ids == [token for token in found if token not in tiny.stop_ids][: len(answer.ids)]
    assert len(answer.ids) == 6 or found[len(answer.ids)] in tiny.stop_ids
    assert answer.tokens["visual"] == sum(item.num_features for item in plan.media)
    assert answer.tokens["text"] + answer.tokens["kept"] == plan.num_tokens
    assert list(answer.ms) == ["preprocess", "encode", "select", "prefill", "decode"]


def test_logits_are_those_of_the_model(tiny):
    request = Request("what?", PICTURE)
    inputs = tiny.prepare(tiny.plan(request.to_messages()))
    with torch.inference_mode():
        expected = tiny.model(**inputs.model_kwargs()).logits[0, -1]
    torch.testing.assert_close(tiny.logits(request), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_equal_the_requests_alone(tiny):
    """Unequal lengths, kinds of media and reducers in one batch: each row is its request alone."""
    reduces = (None, "uniform(keep=0.5)", "fastervlm(keep=0.25)", "random(keep=0.3)")
    requests = [Request("what is it? " * (i % 3 + 1), m, reduce=reduces[i % 4]) for i, m in enumerate(MEDIA.values())]
    requests.append(Request("and this?", OTHER, reduce=reduces[2]))
    plans = [tiny.plan(r.to_messages()) for r in requests]
    reducers = [tiny.reducers(r.reduce) for r in requests]
    with torch.inference_mode():
        rows = tiny._rows(plans, [tiny.prepare(p) for p in plans], reducers, Clock(tiny.device))
        together = open_batch(tiny.adapter, rows, tiny.new_cache(), Clock(tiny.device)).prefill()
    assert len({len(row) for row in rows}) > 2
    for request, logits in zip(requests, together):
        torch.testing.assert_close(tiny.logits(request), logits, atol=2e-5, rtol=1e-5)
    answers = tiny.answer(requests, max_new_tokens=5, batch_size=3)
    for request, answer in zip(requests, answers):
        alone = tiny.respond(request, 5)
        assert (answer.ids, answer.tokens, answer.kept) == (alone.ids, alone.tokens, alone.kept)


def test_decoding_with_the_cache_equals_prompts_without_one(nvila, monkeypatch):
    """Each step's logits equal a prefill of the prompt with all tokens so far, whatever the position policy."""
    steps: list[torch.Tensor] = []
    forward = nvila.adapter.forward
    monkeypatch.setattr(nvila.adapter, "forward", lambda **kw: steps.append(forward(**kw)) or steps[-1])
    for reduce in ("uniform(keep=0.5)", "fastervlm(keep=0.5)"):
        request = Request("what?", PICTURE, reduce=reduce)
        steps.clear()
        ids = nvila.respond(request, 4).ids
        found = list(steps)
        plan = nvila.plan(request.to_messages())
        with torch.inference_mode():
            inputs = [nvila.prepare(plan)]
            (row,) = nvila._rows([plan], inputs, [nvila.reducers(reduce)], Clock(nvila.device))
            for step, logits in enumerate(found):
                expected = open_batch(nvila.adapter, [row], nvila.new_cache(), Clock(nvila.device)).prefill()
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                if step < len(ids):
                    row.input_ids = torch.cat([row.input_ids, torch.tensor([ids[step]])])
                    row.positions = torch.cat([row.positions, torch.tensor([row.next_position])])
                    row.next_position += 1


def test_requests_in_two_threads_do_not_meet(nvila):
    requests = [Request("what?", PICTURE, reduce=r) for r in ("fastervlm(keep=0.25)", None)]
    expected = [nvila.respond(r, 4).ids for r in requests]
    found: list[list[list[int]]] = [[], []]

    def work(index: int) -> None:
        found[index] += [nvila.respond(requests[index], 4).ids for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[ids] * 3 for ids in expected]


def test_nothing_is_left_on_the_modules(nvila, monkeypatch):
    monkeypatch.setattr(nvila.model, "connect", None)  # fails in the middle of encoding, inside the hooks
    with pytest.raises(TypeError):
        nvila.ask(PICTURE, "what?", reduce="fastervlm(keep=0.5)")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in nvila.model.modules())


def test_text_streams_in_whole_characters(vlm):
    pieces: list[str] = []
    stream = TextStream(vlm.tokenizer, pieces.append)
    text = "naïve 漢字 ✓ end"
    ids = vlm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # tokens are bytes, so characters come in parts
    for token in ids:
        stream(token)
    stream.close()
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    said: list[str] = []
    answer = vlm.ask(PICTURE, "what?", max_new_tokens=8, on_text=said.append)
    assert "".join(said).strip() == answer.text


def test_stop_tokens_end_an_answer(nvila):
    first = nvila.ask(PICTURE, "what?", max_new_tokens=4).ids
    stopping = VLM(nvila.adapter, "stopping")
    stopping._stop = [first[2]]
    assert stopping.ask(PICTURE, "what?", max_new_tokens=4).ids == first[:2]


def test_a_row_that_stops_early_leaves_the_others_as_they_are(nvila):
    requests = [Request("what?", media, reduce="uniform(keep=0.7)") for media in (PICTURE, OTHER, CLIP, None)]
    free = [answer.ids for answer in nvila.answer(requests, max_new_tokens=6)]
    stopping = VLM(nvila.adapter, "stopping")
    stopping._stop = [free[0][1], free[2][3]]
    together = [answer.ids for answer in stopping.answer(requests, max_new_tokens=6)]
    assert together == [stopping.respond(request, 6).ids for request in requests]
    assert len(together[0]) <= 1 and len(together[2]) <= 3
    assert len({len(ids) for ids in together}) > 1


def test_sampling_is_seeded_and_greedy_by_default(nvila):
    def ask(**options):
        return nvila.ask(PICTURE, "what?", max_new_tokens=6, **options).ids

    assert ask() == ask(temperature=5.0, top_p=1e-6)
    assert ask(temperature=5.0, seed=1) == ask(temperature=5.0, seed=1) != ask(temperature=5.0, seed=2)


def test_a_prompt_too_long_for_the_context_is_an_error_with_numbers(vlm):
    limit = vlm.adapter.max_context
    with pytest.raises(BudgetError, match=rf"64 visual.* model takes {limit}"):
        vlm.ask(np.zeros((64, 64, 3), np.uint8), "what?", max_new_tokens=limit)


def test_a_saved_checkpoint_answers_the_same(nvila, tmp_path):
    nvila.save(tmp_path / "copy")
    again = foveate.load(tmp_path / "copy", device="cpu")
    assert again.ask(PICTURE, "what?", max_new_tokens=5).ids == nvila.ask(PICTURE, "what?", max_new_tokens=5).ids
    assert not again.recipe
    assert again.spec == nvila.spec
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="mine"):
        nvila.save(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_an_edited_preprocessing_spec_is_refused(nvila, tmp_path):
    nvila.save(tmp_path / "copy")
    path = tmp_path / "copy" / "preprocess.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_tiles": 11}))
    with pytest.raises(CheckpointError, match="hash"):
        foveate.load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nanoo", UnknownNameError, "did you mean 'nano'"),
        ("nvila-8b", CheckpointError, "random_weights"),
        ("/no/such/folder", CheckpointError, "not a folder"),
    ],
)
def test_unknown_models_are_named_with_the_way_out(name, error, words):
    with pytest.raises(error, match=words) as caught:
        foveate.load(name)
    assert "\n" not in str(caught.value)


def test_the_name_nano_is_the_embedded_model(nano_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foveate.vlm, "EMBEDDED", tmp_path / "missing")
    with pytest.raises(CheckpointError, match="foveate train nano"):
        foveate.load("nano")
    monkeypatch.setattr(foveate.vlm, "EMBEDDED", nano_folder)
    (tmp_path / "nano").mkdir()
    assert foveate.load("nano", device="cpu").name == "nano"
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        foveate.load("./nano")


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        foveate.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(UnsupportedError, match=r"'martian'.*foveate_nvila"):
        foveate.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        foveate.load(tmp_path)


@pytest.mark.parametrize("options", [{"device": "cuda:99"}, {"device": "toaster"}, {"dtype": "int3", "device": "cpu"}])
def test_unknown_devices_and_dtypes_are_refused(nano_folder, options):
    with pytest.raises(FoveateError, match="use"):
        foveate.load(nano_folder, **options)


def test_requests_that_cannot_be_answered(nvila):
    with pytest.raises(InputError, match="empty"):
        nvila.ask(PICTURE, "  ")
    with pytest.raises(FoveateError, match="int8 is a cache method"):
        nvila.ask(PICTURE, "what?", reduce="int8")
    with pytest.raises(FoveateError, match="both reduce at site post_projector"):
        nvila.ask(PICTURE, "what?", reduce="uniform(keep=0.5) + random(keep=0.5)")


def test_attached_methods_hold_in_their_block_only(nvila):
    other = VLM(nvila.adapter, "other")
    inside: list[int] = []
    with Uniform(keep=0.5).attach(nvila) as vlm:
        assert vlm.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"] == 24
        assert vlm.ask(PICTURE, "what?", max_new_tokens=1, reduce="none").tokens["kept"] == 48
        assert other.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"] == 48
        thread = threading.Thread(
            target=lambda: inside.append(nvila.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"])
        )
        thread.start()
        thread.join()
    assert inside == [48]
    assert nvila.ask(PICTURE, "what?", max_new_tokens=1).tokens["kept"] == 48


def test_a_model_loaded_in_inference_mode_can_still_be_calibrated():
    with torch.inference_mode():
        vlm = foveate.load("nano", random_weights=True, device="cpu")
    assert not any(parameter.is_inference() for parameter in vlm.model.parameters())


def test_the_head_gets_a_row_and_not_a_slice_of_the_prompt(vlm):
    seen = []
    hook = vlm.model.llm.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embeds, places = torch.randn(2, 9, vlm.model.config.text_config.hidden_size), torch.arange(9)[None]
    with torch.inference_mode():
        inputs = {"inputs_embeds": embeds, "position_ids": places}
        found = vlm.adapter.forward(**inputs, past_key_values=vlm.new_cache())
        plain = vlm.model.llm(**inputs, past_key_values=vlm.new_cache(), use_cache=True, logits_to_keep=1).logits[:, -1]
    hook.remove()
    assert seen[0].dim() == 2 and torch.allclose(found, plain, atol=1e-5)
