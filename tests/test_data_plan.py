"""The plan tells exactly what executing it gives, and no text can forge or lose media."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data import chat
from foveate.data.chat import clean_text, codec, encode_chat, stop_token_ids
from foveate.data.execute import collate, cut_views, execute
from foveate.data.plan import Plan, plan, plan_sample
from foveate.data.sample import ImageSource, Sample, VideoSource
from foveate.data.spec import PreprocessSpec
from foveate.data.tiling import image_layout
from foveate.errors import BudgetError, InputError
from goldens_io import goldens_dir

S2 = PreprocessSpec("dynamic_s2", 16, 4, (16, 32), max_tiles=6)
LITE = PreprocessSpec("dynamic", 16, 4, (), downsample=3, max_tiles=4)
VIDEO = PreprocessSpec("resize", 16, 4, (), num_frames=4, video_pool=((2, 1, 1), (4, 2, 2)), video_sep="\n")
PAD = PreprocessSpec("pad", 16, 4, (), image_end="")
SPECS = (S2, LITE, VIDEO, PAD)
QUICK = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(goldens_dir("nvila") / "nvila" / "ckpt" / "llm"))


def _picture(width: int = 20, height: int = 12) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)


def _user(*parts: Any) -> dict[str, Any]:
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def _check(made: Plan, tokenizer: Any) -> None:
    """Everything a plan promises, against itself and against its execution."""
    assert made.num_tokens == len(made.input_ids) == sum(s.length for s in made.spans)
    assert made.num_text + made.num_visual == made.num_tokens
    at = 0
    for span in made.spans:
        assert span.start == at
        at += span.length
    ids = codec(tokenizer)
    per_media = [sum(s.length for s in made.spans if s.media == i) for i in range(len(made.media))]
    assert per_media == [m.num_tokens for m in made.media]
    for kind, token in (("image", ids.image_id), ("video", ids.video_id)):
        features = sum(m.num_features for m in made.media if m.kind == kind)
        assert int((made.input_ids == token).sum()) == features
    inputs = execute(made)
    size = made.spec.tile_size
    views = sum(len(m.views) for m in made.media if m.kind == "image")
    frames = sum(len(m.frames) for m in made.media)
    assert (None if inputs.pixel_values is None else inputs.pixel_values.shape) == (
        (views, 3, size, size) if views else None
    )
    assert (0 if inputs.frames is None else len(inputs.frames)) == frames
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (1, made.num_tokens)
    if inputs.image_grids is not None:
        assert len(inputs.image_grids) == sum(m.blocks for m in made.media if m.kind == "image")
    json.dumps(made.to_dict())


sides = st.integers(1, 90)
pictures = st.builds(_picture, sides, sides).filter(lambda a: max(a.shape[:2]) <= 200 * min(a.shape[:2]))
clips = st.builds(lambda n, w, h: [_picture(w, h)] * n, st.integers(1, 6), sides, sides)
texts = st.text(max_size=30)


@QUICK
@given(spec=st.sampled_from(SPECS), parts=st.lists(st.one_of(pictures, clips, texts), min_size=1, max_size=4))
def test_plan_and_execution_agree(tokenizer: Any, spec: PreprocessSpec, parts: list[Any]) -> None:
    _check(plan([_user(*parts)], spec, tokenizer), tokenizer)


@QUICK
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    spec=st.sampled_from((*SPECS, PreprocessSpec(), PreprocessSpec("dynamic"))),
    tiled=st.booleans(),
)
def test_views_cover_the_picture(width: int, height: int, spec: PreprocessSpec, tiled: bool) -> None:
    layout = image_layout(width, height, spec, tiled)
    scales: dict[int, list[Any]] = {}
    for view in layout.views:
        scales.setdefault(view.scale, []).append(view.box)
    for boxes in scales.values():
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        assert min(b[0] for b in boxes) <= 0 and max(b[2] for b in boxes) >= width - 1e-6
        assert min(b[1] for b in boxes) <= 0 and max(b[3] for b in boxes) >= height - 1e-6
        whole = max(width, height) ** 2 if spec.mode == "pad" else width * height
        assert area == pytest.approx(whole)
    assert len(layout.views) == sum(c * r for c, r in layout.resizes)
    if tiled and spec.mode.startswith("dynamic"):
        c, r = layout.resizes[0 if spec.mode == "dynamic" else -1]
        assert spec.min_tiles <= c * r <= spec.max_tiles


def test_cuts_equal_crops(tokenizer: Any) -> None:
    """The reshaped view of the resized picture is what PIL's crop gives."""
    image = Image.fromarray(_picture(71, 43))
    made = plan([{"role": "user", "content": [{"type": "image", "image": image}]}], S2, tokenizer)
    views, grids, _, _ = cut_views(made.media, S2)
    at = 0
    for cols, rows in image_layout(71, 43, S2).resizes:
        resized = image.resize((cols * 16, rows * 16), Image.Resampling.BICUBIC)
        for r in range(rows):
            for c in range(cols):
                crop = np.asarray(resized.crop((c * 16, r * 16, c * 16 + 16, r * 16 + 16)))
                assert np.array_equal(views[at], crop.transpose(2, 0, 1))
                at += 1
    assert at == len(views)
    assert grids == [image_layout(71, 43, S2).block]


def test_counts_by_hand(tokenizer: Any) -> None:
    made = plan([_user(_picture(40, 20), "hi")], S2, tokenizer)
    (item,) = made.media
    assert (item.block, item.grid, item.num_tokens) == ((2, 3), (1, 4, 6), 25)  # 6 tiles of 2 x 2 tokens, a line feed
    two = plan([_user(_picture(), _picture(), "hi")], S2, tokenizer)
    assert [m.num_tokens for m in two.media] == [5, 5]  # one square each: 2 x 2 tokens and a line feed
    clip = plan([_user([_picture()] * 4, "hi")], VIDEO, tokenizer)
    # 2 groups of 2x2 + end, 1 group of 1x1 + end, a separator after each of the two levels
    assert clip.media[0].num_tokens == 2 * 5 + 1 * 2 + 2
    assert clip.media[0].grid == (2, 2, 2)
    lite = plan([_user(_picture(64, 16), "hi")], LITE, tokenizer)
    assert lite.media[0].blocks == 5 and lite.media[0].num_tokens == 5 * (4 + 1)
    assert [s.kind for s in lite.spans][1:-1] == ["image", "text"] * 4 + ["image"]


def test_the_last_group_of_a_clip_may_be_shorter(tokenizer: Any) -> None:
    made = plan([_user([_picture()] * 9, "hi")], VIDEO, tokenizer, num_frames=7)
    assert made.media[0].frames == (0, 1, 3, 4, 5, 7, 8)
    assert made.media[0].grid == (4, 2, 2)
    _check(made, tokenizer)
    once = PreprocessSpec("resize", 16, 4, (), num_frames=8, repeat_frames=False)
    assert plan([_user([_picture()] * 3, "hi")], once, tokenizer).media[0].frames == (0, 1, 2)
    thirds = PreprocessSpec("resize", 16, 4, (), video_pool=((1, 3, 3),))
    assert plan([_user([_picture()], "")], thirds, tokenizer).media[0].grid[1:] == (1, 1)
    with pytest.raises(InputError, match="num_frames is -1"):
        plan([_user([_picture()], "")], VIDEO, tokenizer, num_frames=-1)


def test_too_long_a_prompt_names_ways_out(tokenizer: Any) -> None:
    message = [_user(_picture(), "hi")]
    need = plan(message, S2, tokenizer).num_tokens
    assert plan(message, S2, tokenizer, max_context=need).num_tokens == need
    with pytest.raises(
        BudgetError, match=rf"needs {need} tokens .*limit is {need - 1} .*num_frames.*max_tiles.*'resize'"
    ):
        plan(message, S2, tokenizer, max_context=need - 1)


# ---- what text and messages can and cannot do


@QUICK
@given(
    pieces=st.lists(
        st.sampled_from(["<image>", "<vila/sentinel>", "<vila/video>", "<ima", "ge>", "<vila/", "video>", "a", " "]),
        max_size=9,
    )
)
@example(pieces=["<ima", "ge>"])
@example(pieces=["<ima", "<image>", "ge>"])
@example(pieces=["<ima", "<vila/sentinel>", "ge>"])
def test_text_cannot_inject_media(tokenizer: Any, pieces: list[str]) -> None:
    text = "".join(pieces)
    cleaned = clean_text(text)
    assert "<image>" not in cleaned and "<vila/video>" not in cleaned
    messages = [_user(*pieces, "."), {"role": "assistant", "content": text}, _user(_picture(), *pieces, text)]
    made = plan(messages, S2, tokenizer)
    assert len(made.media) == 1
    _check(made, tokenizer)


def test_spec_is_checked() -> None:
    for changes, why in (
        ({"scales": (32, 16)}, "start with tile_size"),
        ({"scales": (32, 64), "max_tiles": 9}, "start with tile_size"),
        ({"scales": (16, 40)}, "multiples of tile_size"),
        ({"resize_to_scale": 2}, "there are 2 scales"),
        ({"num_frames": 0}, "above 0"),
        ({"video_pool": ((2, 0, 1),)}, "above 0"),
        ({"mode": "huge"}, "dynamic_s2, dynamic, resize, pad"),
    ):
        with pytest.raises(InputError, match=why):
            dataclasses.replace(S2, **changes)


def test_stripping_warns_once(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_warned", set())
    with caplog.at_level(logging.WARNING, "foveate"):
        for _ in range(3):
            plan([_user("<image>")], S2, tokenizer)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "role is 'robot'"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'audio'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part 'image'"),
        (
            [{"role": "assistant", "content": [{"type": "image", "image": np.zeros((2, 2, 3), np.uint8)}]}],
            "cannot hold",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}], "not fetched"),
        ([{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}], r"nowhere\.png: no such file"),
    ],
)
def test_bad_messages(messages: list[Any], why: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=why):
        plan(messages, S2, tokenizer)


def test_system_prompt_rules(tokenizer: Any) -> None:
    default = tokenizer.decode(plan([_user("hi")], S2, tokenizer).input_ids)
    assert default.startswith(
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nhi<|im_end|>"
    )
    assert default.endswith("<|im_start|>assistant\n")
    empty = plan([{"role": "system", "content": ""}, _user("hi")], S2, tokenizer)
    assert tokenizer.decode(empty.input_ids).startswith("<|im_start|>system\n<|im_end|>")
    assert not tokenizer.decode(plan([_user("hi")], S2, tokenizer, add_generation_prompt=False).input_ids).endswith(
        "nt\n"
    )


def test_changed_file_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(_picture(20, 12)).save(path)
    made = plan([_user(path, "hi")], S2, tokenizer)
    Image.fromarray(_picture(21, 12)).save(path)
    with pytest.raises(InputError, match="21x12 pixels, but it was planned as 20x12"):
        execute(made)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        execute(made)


# ---- training: labels and branches


def test_training_plan_has_labels(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "a red box"}
    made = plan([_user(_picture(), "What?"), answer], S2, tokenizer)
    targets = [int(t) for t in made.labels if t != -100]
    assert tokenizer.decode(targets) == "a red box<|im_end|>"
    assert len(made.labels) == made.num_tokens
    assert plan([_user("What?")], S2, tokenizer).labels is None
    assert int(execute(made).labels[0].max()) == max(targets)


QWEN_THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = "{% for m in messages %}{{ messages|length }} {{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
words = st.sampled_from(
    ["what is it?", "", " two  spaces ", "\nline", "red", "it's 12", "<image>?", "<|im_end|>", "é🙂"]
)
branches = st.lists(st.lists(st.tuples(words, words), min_size=1, max_size=3), min_size=1, max_size=4)
media = st.lists(st.one_of(pictures.map(ImageSource), clips.map(VideoSource)), max_size=3)


@QUICK
@given(
    spec=st.sampled_from(SPECS), media=media, branches=branches, template=st.sampled_from([None, QWEN_THINK, COUNTING])
)
def test_prefix_and_branch_equal_the_branch_alone(
    tokenizer: Any, spec: PreprocessSpec, media: list[Any], branches: list[Any], template: str | None
) -> None:
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or original
        sample = Sample("s", media, branches)
        made = plan_sample(sample, spec, tokenizer)
        for i, (ids, labels) in enumerate(made.branches):
            alone = plan(sample.messages(i), spec, tokenizer)
            assert np.array_equal(np.concatenate([made.prefix.input_ids, ids]), alone.input_ids)
            assert np.array_equal(np.concatenate([made.prefix.labels, labels]), alone.labels)
        if media and template is None:
            assert len(made.prefix.input_ids) > made.prefix.num_visual  # shared, not repeated in each branch
    finally:
        tokenizer.chat_template = original


def test_interleaved_sample_is_one_whole_branch(tokenizer: Any) -> None:
    turns = [_user("Look: ", _picture(), " what?"), {"role": "assistant", "content": "x"}]
    made = plan_sample(Sample("s", [], [[("Look:  what?", "x")]], turns=turns), S2, tokenizer)
    alone = plan(turns, S2, tokenizer)
    assert made.prefix.num_tokens == 0 and len(made.prefix.media) == 1
    assert np.array_equal(made.branches[0][0], alone.input_ids)
    assert np.array_equal(made.branches[0][1], alone.labels)


@QUICK
@given(
    text=st.text(max_size=40),
    more=st.lists(st.sampled_from(["<image>", "<|im_end|>", "[PAD]", " ", "\n", "a"]), max_size=6),
)
def test_cut_encoding_equals_plain_encoding(tokenizer: Any, text: str, more: list[str]) -> None:
    whole = text.join(more) if more else text
    assert codec(tokenizer)._cut is not None  # the fast path is in use
    assert list(codec(tokenizer).encode(whole)) == tokenizer(whole, add_special_tokens=False).input_ids


def test_a_tokenizer_that_looks_across_special_tokens_is_asked_for_whole_texts() -> None:
    """One that marks only the first piece of a text: its pieces would each be marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({c: i for i, c in enumerate("?▁abA\n")}, [], unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<image>", "<vila/video>", "<vila/sentinel>"]
    marking = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", additional_special_tokens=special)
    text = "a<image>b"
    assert [len(marking.tokenize(piece)) for piece in ("a", "<image>", "b", text)] == [2, 1, 2, 4]
    assert list(codec(marking).encode(text)) == marking(text, add_special_tokens=False).input_ids


def test_rendering_equals_the_template(tokenizer: Any) -> None:
    roles, contents = ("system", "user", "assistant", "user"), ["", "a b", "c", " d"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    for generate in (False, True):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert codec(tokenizer).render(roles, contents, generate) == expected


def test_a_changed_template_is_followed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan([_user("hi")], S2, tokenizer).input_ids.tolist()
    ends_with_pad = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[PAD]{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", ends_with_pad)
    assert plan([_user("hi")], S2, tokenizer).input_ids.tolist() != before
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_tokenizer_without_media_tokens_is_refused() -> None:
    class Bare:
        chat_template = None
        unk_token_id = 0

        def __len__(self) -> int:
            return 1

        def convert_tokens_to_ids(self, token: str) -> int:
            return 0

    with pytest.raises(InputError, match="lacks <image>, <vila/video>, <vila/sentinel>"):
        codec(Bare())


def test_encode_chat_and_stops(tokenizer: Any) -> None:
    ids, labels = encode_chat([_user("a"), {"role": "assistant", "content": "b"}], tokenizer)
    assert ids.dtype == labels.dtype == np.int64
    assert (labels >= 0).sum() == 2
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


# ---- batches


def test_collate(tokenizer: Any) -> None:
    plans = [
        plan([_user(_picture(), "a long question here")], S2, tokenizer),
        plan([_user([_picture()] * 3, "b")], S2, tokenizer, num_frames=2),
        plan([_user("c")], S2, tokenizer),
    ]
    items = [execute(p) for p in plans]
    batch = collate(items, pad_id=7)
    assert batch.input_ids.shape == (3, max(p.num_tokens for p in plans))
    for row, mask, made in zip(batch.input_ids, batch.attention_mask, plans):
        assert row[-made.num_tokens :].tolist() == made.input_ids.tolist()
        assert (row[: -made.num_tokens] == 7).all() and int(mask.sum()) == made.num_tokens
    right = collate(items, pad_id=7, side="right")
    assert right.input_ids[2, : plans[2].num_tokens].tolist() == plans[2].input_ids.tolist()
    kwargs = batch.model_kwargs()
    assert sorted(kwargs) == sorted(
        ["input_ids", "attention_mask", "pixel_values", "image_grids", "pixel_values_videos", "video_frames"]
    )
    assert kwargs["video_frames"].tolist() == [2]
    assert kwargs["pixel_values"].shape[0] == plans[0].num_views
    assert set(items[2].model_kwargs()) == {"input_ids", "attention_mask"}
    for bad, why in (([], "nothing"), ([items[0], execute(plan([_user("c")], LITE, tokenizer))], "different specs")):
        with pytest.raises(InputError, match=why):
            collate(bad, 0)
    with pytest.raises(InputError, match="left or right"):
        collate(items, 0, side="up")


def test_small_pictures_are_fast(tokenizer: Any) -> None:
    """Training prepares 24 pictures in each 0.3 s step; a generous limit against slow paths coming back."""
    spec = PreprocessSpec("dynamic_s2", 64, 8, (64, 128), max_tiles=6)
    sample = Sample("s", [ImageSource(_picture(128, 128))], [[(f"what {i}?", "x")] for i in range(10)])
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        execute(plan_sample(sample, spec, tokenizer).prefix)
        best = min(best, time.process_time() - start)
    assert best < 0.01
