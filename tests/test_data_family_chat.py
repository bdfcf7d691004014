"""Prompts, labels and specs of the families of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from families_hf import FAMILIES, Tiny, ask, frames_of, picture, tokenizer_of
from foveate.data.chat import codec, stop_token_ids
from foveate.data.execute import collate, execute
from foveate.data.families import DEFAULTS, family_spec, family_tokens
from foveate.data.fit import fit_image
from foveate.data.hf import hf_chat_template, spec_from_hf
from foveate.data.plan import plan, plan_sample
from foveate.data.sample import ImageSource, Sample
from foveate.data.spec import PreprocessSpec
from foveate.errors import BudgetError, CheckpointError, InputError, UnsupportedError

QUICK = settings(max_examples=20, deadline=None)


# ---- chat


@QUICK
@given(
    family=st.sampled_from(FAMILIES),
    pieces=st.lists(st.sampled_from(["IMAGE", "VIDEO", "WRAP", "<ima", "ge>", "<vid", "eo>", "a", " "]), max_size=8),
)
@example(family="llava", pieces=["<ima", "ge>"])
@example(family="llava", pieces=["<ima", "IMAGE", "ge>"])
def test_text_cannot_inject_media_of_a_family(tinies: dict[str, Tiny], family: str, pieces: list[str]) -> None:
    one = tinies[family]
    words = {"IMAGE": one.spec.image_token, "VIDEO": one.spec.video_token, "WRAP": family_tokens(one.spec)[-1]}
    texts = [words.get(piece, piece) for piece in pieces]
    content = [{"type": "text", "text": text} for text in texts]
    shown = {"type": "image", "image": picture(30, 30)}
    messages = [
        {"role": "system", "content": "".join(texts)},
        {"role": "user", "content": [*content, shown, *content]},
        {"role": "assistant", "content": "".join(texts)},
        {"role": "user", "content": content},
    ]
    made = plan(messages, one.spec, one.tokenizer)
    (item,) = made.media
    expected = plan(ask(picture(30, 30)), one.spec, one.tokenizer).media[0]
    assert item.num_tokens == expected.num_tokens
    image = codec(one.tokenizer, one.spec).image_id
    assert int((made.input_ids == image).sum()) == item.num_tokens


FIRST_PICTURES = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }} {% endfor %}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN = (
    "{{ '[PAD]' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'].strip() }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_media_stand_where_the_template_puts_them() -> None:
    """A template may show pictures before clips; media are then in the order of the prompt."""
    spec = family_spec("llava_onevision", tile_size=56, pinpoints=((56, 56), (56, 112)))
    tokenizer = tokenizer_of(spec)
    tokenizer.chat_template = FIRST_PICTURES
    content = [
        {"type": "text", "text": "before"},
        {"type": "video", "video": frames_of(3)},
        {"type": "image", "image": picture(60, 50)},
        {"type": "text", "text": "after"},
    ]
    made = plan([{"role": "user", "content": content}], spec, tokenizer)
    assert [item.kind for item in made.media] == ["image", "video"]
    assert [span.kind for span in made.spans] == ["text", "image", "text", "video", "text"]
    text = tokenizer.decode(
        [token for s in made.spans if s.media < 0 for token in made.input_ids[s.start :][: s.length]]
    )
    assert text == "USER: \n\nbefore after ASSISTANT:"
    split = [{"type": "text", "text": "<ima"}, content[2], {"type": "text", "text": "ge>"}]
    tokenizer.chat_template = FIRST_PICTURES.replace("{{ p['text'] }} ", "{{ p['text'] }}")
    with pytest.raises(InputError, match=r"made 2 media placeholders of 1; .*no piece of a placeholder"):
        plan([{"role": "user", "content": split}], spec, tokenizer)


@pytest.mark.parametrize("template", [None, FIRST_PICTURES, PLAIN], ids=["chatml", "parts", "text"])
def test_labels_are_the_answers(template: str | None) -> None:
    spec = family_spec("llava", tile_size=56, edge=56)
    tokenizer = tokenizer_of(spec)
    tokenizer.chat_template = template or tokenizer.chat_template
    question, answer = ("What is it?", "Two?"), (" a red box", "nó, één 🙂")
    messages = [
        *ask(picture(60, 50), text=question[0]),
        {"role": "assistant", "content": answer[0]},
        {"role": "user", "content": question[1]},
        {"role": "assistant", "content": answer[1]},
    ]
    made = plan(messages, spec, tokenizer)
    written = tokenizer.decode([int(t) for t in made.labels if t != -100])
    end = " " if template == FIRST_PICTURES else ""
    assert written.replace(end + "<|im_end|>", "<|im_end|>") == "".join(
        (text if template is None or template == FIRST_PICTURES else text.strip()) + "<|im_end|>" for text in answer
    )
    assert (made.labels[made.labels != -100] == made.input_ids[made.labels != -100]).all()
    assert stop_token_ids(tokenizer, spec) == [tokenizer.eos_token_id]
    sample = Sample("s", [ImageSource(picture(60, 50))], [[(question[0], answer[0])], [(question[1], answer[1])]])
    both = plan_sample(sample, spec, tokenizer)
    head = both.prefix.input_ids
    assert both.prefix.spans[-1].kind == "image" and both.prefix.spans[-1].start + spec.token_side**2 == len(head)
    for i, (ids, labels) in enumerate(both.branches):
        alone = plan(sample.messages(i), spec, tokenizer)
        assert np.array_equal(np.concatenate([head, ids]), alone.input_ids)
        assert np.array_equal(labels, alone.labels[len(head) :]) and (alone.labels[: len(head)] < 0).all()


def test_tokenizers_that_open_with_a_token(tinies: dict[str, Tiny]) -> None:
    """As transformers does: the opening token is added unless the template wrote it."""
    from tokenizers.processors import TemplateProcessing

    spec = family_spec("llava", tile_size=56, edge=56)
    tokenizer = tokenizer_of(spec)
    tokenizer.bos_token = "[PAD]"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[PAD] $A", special_tokens=[("[PAD]", tokenizer.pad_token_id)]
    )
    for template in (tokenizer.chat_template, PLAIN):
        tokenizer.chat_template = template
        made = plan(ask(picture(60, 50)), spec, tokenizer)
        assert (made.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
        answer = {"role": "assistant", "content": "x"}
        trained = plan([*ask(picture(60, 50)), answer], spec, tokenizer)
        assert len(trained.labels) == trained.num_tokens and trained.labels[0] == -100
        assert tokenizer.decode([int(t) for t in trained.labels if t != -100]) == "x<|im_end|>"


def test_what_a_family_cannot_take(tinies: dict[str, Tiny]) -> None:
    llava, onevision = tinies["llava"], tinies["llava_onevision"]
    with pytest.raises(InputError, match=r"llava takes no clips; give some of its frames as pictures"):
        plan(ask(frames_of(3), kind="video"), llava.spec, llava.tokenizer)
    with pytest.raises(InputError, match="num_frames is 0"):
        plan(ask(frames_of(3), kind="video"), onevision.spec, onevision.tokenizer, num_frames=0)
    with pytest.raises(InputError, match=r"lacks <\|image_pad\|>, <\|video_pad\|>; add them"):
        plan(ask(picture(30, 30)), family_spec("qwen2_vl"), llava.tokenizer)
    for one, way_out in ((llava, "fewer pictures"), (onevision, r"smaller canvases \(pinpoints\)")):
        with pytest.raises(BudgetError, match=f"limit is 9 .*use fewer frames .* or {way_out}"):
            plan(ask(picture(30, 30)), one.spec, one.tokenizer, max_context=9)
    one = plan(ask(picture(30, 30)), llava.spec, llava.tokenizer)
    both = collate([execute(one), execute(one)], 0)
    assert len(both.media) == 2 and both.input_ids.shape[0] == 2


def test_a_changed_picture_is_noticed(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    one, path = tinies["qwen2_5_vl"], tmp_path / "a.png"
    picture(20, 12).save(path)
    made = plan(ask(path), one.spec, one.tokenizer)
    picture(21, 12).save(path)
    with pytest.raises(InputError, match="21x12 pixels, but it was planned as 20x12"):
        execute(made)


# ---- specs


def test_specs_of_nvila_keep_their_hash() -> None:
    """Hashes that checkpoints saved before the families came hold."""
    assert PreprocessSpec().hash() == "75cf83414493593a"
    assert PreprocessSpec("dynamic", 16, 4, (), downsample=3, max_tiles=4).hash() == "2570390c2409ba71"


@pytest.mark.parametrize("family", DEFAULTS)
def test_specs_of_families_are_saved_whole(family: str) -> None:
    spec = family_spec(family)
    stored = json.loads(json.dumps(spec.to_dict() | {"hash": spec.hash()}))
    assert PreprocessSpec.from_dict(stored) == spec
    assert spec.hash() != family_spec(family, patch_size=7).hash()


def test_specs_of_families_are_checked() -> None:
    for family, changes, why in (
        ("llava", {"edge": 0}, "needs edge"),
        ("llava", {"image_token": ""}, "needs image_token"),
        ("llava", {"filter": "sinc"}, "must be one of bicubic"),
        ("llava_next", {"pinpoints": ()}, "needs pinpoints"),
        ("llava_next", {"pinpoints": ((336, 500),)}, r"canvas \(336, 500\) is not a whole number of tiles of 336"),
        ("qwen3_vl", {"min_area": 9, "max_area": 8}, "min_area 9 and max_area 8"),
        ("qwen3_vl", {"temporal_patch": 0}, "temporal_patch 0"),
    ):
        with pytest.raises(InputError, match=why):
            family_spec(family, **changes)
    with pytest.raises(InputError, match="mode 'native' needs a family"):
        PreprocessSpec("native")
    with pytest.raises(InputError, match="too long and thin"):
        fit_image(1, 2000, family_spec("llava_next"))


@pytest.mark.parametrize(
    ("family", "file", "changes", "why"),
    [
        ("llava", "preprocessor_config.json", {"do_normalize": False}, "do_normalize is false"),
        ("llava", "preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor is 0.5; only 1/255"),
        ("llava", "preprocessor_config.json", {"resample": 9}, "resample is 9; known: 0 to 5"),
        ("llava", "config.json", {"vision_feature_select_strategy": "full"}, "'full' keeps CLS"),
        ("llava", "config.json", {"model_type": "gpt2"}, "model_type 'gpt2' has no preprocessing here"),
        ("llava", "preprocessor_config.json", {"crop_size": {"height": 56, "width": 40}}, "only square views"),
        ("llava_next", "config.json", {"image_grid_pinpoints": [[56, 56]]}, "image_grid_pinpoints differ"),
        ("llava_onevision", "config.json", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'"),
        ("qwen2_5_vl", "video_preprocessor_config.json", {"patch_size": 16}, "14 for pictures and 16 for clips"),
        ("internvl", "config.json", {"image_seq_length": 5}, "5 tokens a view, but views of 56 px have 4"),
        ("smolvlm", "preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "only longest_edge"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    tinies: dict[str, Tiny], tmp_path: Path, family: str, file: str, changes: dict[str, Any], why: str
) -> None:
    for source in tinies[family].folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    old = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(old | changes))
    with pytest.raises(UnsupportedError, match=why):
        spec_from_hf(tmp_path)


def test_specs_are_read_from_all_layouts(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    """Newer transformers write one processor_config.json; clips may have a file of their own."""
    source = tinies["qwen2_5_vl"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((source.folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"neither preprocessor_config\.json nor an image_processor"):
        spec_from_hf(tmp_path)
    image = json.loads((source.folder / "preprocessor_config.json").read_text())
    video = image | {"min_pixels": 4 * 28 * 28, "max_pixels": 9 * 28 * 28, "fps": 4, "max_frames": 12, "min_frames": 2}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image, "video_processor": video}))
    spec = spec_from_hf(tmp_path)
    assert spec.image_token == "<|image_pad|>" and spec.family == "qwen2_5_vl"
    assert (spec.min_area, spec.max_area) == (source.spec.min_area, source.spec.max_area)
    assert (spec.video_min_area, spec.video_max_area) == (4 * 784, 9 * 784)
    assert (spec.fps, spec.num_frames, spec.min_frames) == (4.0, 12, 2)


def test_chat_templates_are_found(tmp_path: Path) -> None:
    assert hf_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert hf_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert hf_chat_template(tmp_path) == "j"
    (tmp_path / "chat_template.jinja").write_text("x")
    assert hf_chat_template(tmp_path) == "x"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        hf_chat_template(tmp_path)
