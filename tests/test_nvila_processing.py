"""The NVILA processor: one path for every way of asking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.errors import InputError
from foveate.nvila import NvilaProcessor, load
from goldens_io import goldens_dir

ROOT = goldens_dir("nvila")
PICTURES = sorted((ROOT / "images").iterdir())


@pytest.fixture(scope="module", params=["nvila", "lite", "video"])
def loaded(request: pytest.FixtureRequest):
    return load(ROOT / request.param / "ckpt")


def ask(*parts: str | Path) -> list[dict]:
    content = [{"type": "image", "image": p} if isinstance(p, Path) else {"type": "text", "text": p} for p in parts]
    return [{"role": "user", "content": content}]


def test_nvila_processor_calls_agree(loaded) -> None:
    processor = NvilaProcessor(loaded.tokenizer, loaded.spec)
    chat = ask(PICTURES[0], "What is this?")
    expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    for inputs in (
        processor(text="What is this?", images=PICTURES[0]),
        processor(text="<image>What is this?", images=[PICTURES[0]]),
        processor(text=["What is this?"], images=[[PICTURES[0]]]),
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "path": str(PICTURES[0])}, chat[0]["content"][1]]}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        ),
    ):
        assert set(inputs) == set(expected) <= set(processor.model_input_names)
        assert all(torch.equal(inputs[k], expected[k]) for k in expected)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and text.count("<image>") == 1
    ids = processor.apply_chat_template(chat, tokenize=True)
    assert ids.shape[1] < expected["input_ids"].shape[1]  # without the opening of the answer


@torch.no_grad()
def test_nvila_processor_batch_equals_each_alone(loaded) -> None:
    processor = NvilaProcessor(loaded.tokenizer, loaded.spec)
    chats = [ask(PICTURES[0], "What is this?"), ask(*PICTURES[1:3], "Compare the two images."), ask("question 3")]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(chats, **options)
    made = loaded.model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = processor.batch_decode(made, skip_special_tokens=True)
    for chat, text in zip(chats, texts):
        one = processor.apply_chat_template(chat, **options)
        alone = loaded.model.generate(**one, max_new_tokens=6, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert processor.decode(alone, skip_special_tokens=True) == text


def test_nvila_processor_saves_and_refuses(loaded, tmp_path: Path) -> None:
    processor = NvilaProcessor(loaded.tokenizer, loaded.spec)
    with pytest.raises(InputError, match="2 <image> placeholders, 1 images"):
        processor(text="<image> and <image>", images=PICTURES[0])
    with pytest.raises(InputError, match="rendered prompt"):
        processor(text="<|im_start|>user\n<image>", images=PICTURES[0])
    with pytest.raises(InputError, match="2 texts came with media for 1"):
        processor(text=["a", "b"], images=[PICTURES[0]])
    with pytest.raises(InputError, match="chat template"):
        processor.apply_chat_template(ask("hello"), chat_template="{{ messages }}")
    clips = processor(text="What moves?", videos=ROOT / "clips" / "clip8", num_frames=4)
    assert clips["video_frames"].tolist() == [4] and "pixel_values" not in clips
