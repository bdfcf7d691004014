"""The small tokenizer of `nano`: a byte-level BPE learned from the questions it will be asked.

Digits and capital letters are always tokens of their own, so a number or a code on a picture is read character by
character. Learning is deterministic: the same texts in the same order give the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
IMAGE, VIDEO, SENTINEL, PAD = "<image>", "<vila/video>", "<vila/sentinel>", "[PAD]"
SPECIAL_TOKENS = (END, USER, ASSISTANT, SYSTEM, IMAGE, VIDEO, SENTINEL, PAD)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""`<|user|>question<|assistant|>answer<|end|>`: three tokens of frame for a dialogue of one turn."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens (special ones included) learned from `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A digit, a capital, a mark and a line feed stand alone; a word keeps the space before it.
            pre_tokenizers.Split(Regex(r"[0-9A-Z\n]|\p{P}| ?[^\s\p{P}0-9A-Z]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM, IMAGE, VIDEO, SENTINEL],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tokenizer(
    data_dir: str | Path | None = None, *, scenes_per_kind: int = 400, vocab_size: int = 1024, seed: int = 0
) -> PreTrainedTokenizerFast:
    """The tokenizer of `nano`: learned on drawn questions and, where `data_dir` is given, easy-vqa and NLVR text."""
    return train_tokenizer(_corpus(data_dir, scenes_per_kind, seed), vocab_size)


def _corpus(data_dir: str | Path | None, scenes_per_kind: int, seed: int) -> Iterator[str]:
    from foveate import world

    for kind in (k for k in world.KINDS if k not in world.LESSONS):
        for index in range(scenes_per_kind):
            scene = world.draw(kind, index, split="train", seed=seed)
            for question in scene.questions:
                for text in (t for turn in question.turns for t in turn):
                    yield text
    if data_dir is None:
        return
    from foveate.data.datasets import load_named

    for name, split in (("easy-vqa", "train"), ("nlvr", "dev")):
        for sample in load_named(name, data_dir, split):
            for branch in sample.branches:
                for text in (t for turn in branch for t in turn):
                    yield text
